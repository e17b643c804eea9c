"""A saved adapter with a trained head."""

import pytest
import torch

import lowdim
from lowdim.adapters import LoRA
from lowdim.testing.small_model import small_model


@pytest.fixture
def saved(tmp_path):
    """The adapter and its folder; every trained number is random."""
    model = small_model()
    adapted = lowdim.adapt(model, LoRA(rank=2), modules_to_save=["score"])
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    assert adapted.save(tmp_path / "a") == tmp_path / "a"
    return adapted, tmp_path / "a"
