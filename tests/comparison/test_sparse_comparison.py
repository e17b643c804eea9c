"""Methods of every family have a row in the result; one that takes weights away hands over a sparse model."""

import pytest
import torch
from safetensors.torch import load_file

from comparing import by_name, run
from lowdim.catalogue import FAMILIES, methods
from lowdim.comparison.result import summarise


@pytest.mark.parametrize("variant", methods("all"), ids=lambda variant: variant.name)
def test_every_method_has_a_row(variant):
    row = summarise(variant, [], [], None, "left out")
    assert row.family in {"baseline", *FAMILIES}
    assert (row.status, row.reason) == ("skipped", "left out")


def test_nm_decay_takes_part_and_its_winner_is_sparse(make, tmp_path):
    result, _ = run(make(methods=("nm-decay",), steps=4, seeds=1), tmp_path / "out")
    assert by_name(result)["nm-decay"]["status"] == "ok"
    assert by_name(result)["nm-decay"]["family"] == "compress"
    tensors = load_file(tmp_path / "out" / "winner" / "model.safetensors")
    query = next(value for name, value in tensors.items() if name.endswith("attention.self.query.weight"))
    assert torch.equal((query.view(-1, 4) != 0).sum(1), torch.full((query.numel() // 4,), 2))


def test_what_tunes_frozen_weights_needs_a_trained_model():
    assert methods("pst")[0].unfit("pretrain") == "PST needs a trained model; --task pretrain starts from random weights"
    assert methods("pst")[0].unfit("causal-lm") is None
    assert methods("nm-decay")[0].unfit("pretrain") is None


@pytest.mark.slow
def test_pst_takes_part_and_its_winner_is_sparse(make, tmp_path):
    result, _ = run(make(methods=("pst",), steps=4, seeds=1), tmp_path / "out")
    assert by_name(result)["pst"]["status"] == "ok"
    tensors = load_file(tmp_path / "out" / "winner" / "model.safetensors")
    query = next(value for name, value in tensors.items() if name.endswith("attention.self.query.weight"))
    assert int((query == 0).sum()) == int(0.9 * query.numel())
