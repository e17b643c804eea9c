"""What a file of SaRA holds, and which files, options and layers are refused."""

import pytest
import torch
from torch import nn
from trained_values import moved

import lowdim
from lowdim.adapters import SaRA
from lowdim.adapters.sara.entries import EntriesLayer
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.testing.small_model import small_model


def test_a_checkpoint_holds_bits_values_and_what_is_active(tmp_path):
    adapted = moved_model()
    adapted.layers["body.first"].update.select(0.1)
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    mine = {key.rsplit(".", 1)[1]: value for key, value in tensors.items() if key.startswith("body.first")}
    assert set(mine) == {"mask", "values", "active"}
    assert mine["mask"].dtype == torch.uint8
    assert len(mine["mask"]) == 12 * 8 // 8
    loaded = lowdim.load_adapter(small_model(), tmp_path)
    for name, layer in adapted.layers.items():
        other = loaded.layers[name]
        assert isinstance(other, EntriesLayer)
        for key, value in layer.update.state_dict().items():
            assert torch.equal(value, other.update.state_dict()[key]), key
        assert torch.equal(layer.update.index, other.update.index)


def moved_model():
    adapted = lowdim.adapt(small_model(), SaRA(0.15))
    moved(adapted.model)
    return adapted


def test_a_file_that_does_not_fit_is_refused():
    adapted = SaRA(0.2).attach(nn.Linear(4, 3))
    saved = {key: value.clone() for key, value in adapted.update.saved().items()}
    with pytest.raises(CheckpointError, match="mask"):
        adapted.update.restore({key: value for key, value in saved.items() if key != "mask"}, torch.ones(3, 4))
    flipped = {**saved, "mask": saved["mask"] ^ 1}
    with pytest.raises(CheckpointError, match="the mask has"):
        adapted.update.restore(flipped, torch.ones(3, 4))


def test_bad_input():
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="progressive_iter"):
            SaRA(progressive_iter=bad)
    for bad in (-1e-9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lambda_rank"):
            SaRA(lambda_rank=bad)
    for name in ("nuclear_min_dim", "nuclear_min_count", "seed"):
        with pytest.raises(ValueError, match=name):
            SaRA(**{name: -1})
    with pytest.raises(ValueError, match="threshold"):
        SaRA.default_lr(0.0)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="floating point"):
        SaRA().attach(layer)
    for other in (nn.ReLU(), nn.Embedding(4, 4), nn.LayerNorm(4)):
        with pytest.raises(TypeError, match="adapts"):
            SaRA().attach(other)
