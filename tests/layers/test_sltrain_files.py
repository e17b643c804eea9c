"""SLTrain in checkpoints: the seed instead of the support, given supports, and what is refused."""

import copy

import pytest
import torch
from sltrain_layers import official

from lowdim.files import read_tensors, write_tensors
from lowdim.layers import SLTrainLinear


def test_checkpoint_holds_the_seed_and_not_the_support():
    layer = SLTrainLinear(30, 20, rank=2, seed=7)
    state = layer.state_dict()
    assert set(state) == {"A", "B", "values", "bias", "_extra_state"}
    assert state["_extra_state"].nbytes == 8
    other = SLTrainLinear(30, 20, rank=2, seed=8)
    other.load_state_dict(state)
    assert torch.equal(other.indices, layer.indices)
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    other.reset_parameters()
    assert torch.equal(other.values, layer.values)


@pytest.mark.parametrize("given", [False, True])
def test_given_support_is_saved(given, tmp_path):
    """Through a file, into a layer of either kind, and back."""
    v, layer = official("basic")
    write_tensors(tmp_path / "layer.safetensors", layer.state_dict())
    assert "indices" in layer.state_dict()
    indices = torch.arange(10) if given else None
    other = SLTrainLinear(10, 7, rank=3, density=0.15, alpha=6, indices=indices, dtype=torch.float64)
    before = copy.deepcopy(other)
    assert ("indices" in other.state_dict()) is given
    other.load_state_dict(read_tensors(tmp_path / "layer.safetensors")[0])
    assert torch.equal(other.indices, v["indices"])
    v.close(other.dense_weight(), "dense_weight")
    assert "indices" in other.state_dict()
    other.load_state_dict(before.state_dict())
    assert torch.equal(other.indices, before.indices)
    assert set(other.state_dict()) == set(before.state_dict())
    other.reset_parameters()
    assert torch.equal(other.indices, before.indices)


def test_numbers_alone_load_where_the_support_was_given():
    v, layer = official("basic")
    numbers = {name: v[name] for name in ("A", "B", "values", "bias")}
    layer.load_state_dict(numbers)
    assert torch.equal(layer.indices, v["indices"])
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        SLTrainLinear(10, 7, rank=3, density=0.15, dtype=torch.float64).load_state_dict(numbers)
    del numbers["values"]
    with pytest.raises(RuntimeError, match=r"Missing key.*values"):
        layer.load_state_dict(numbers)


def test_a_damaged_support_is_refused():
    _, layer = official("basic")
    before, state = copy.deepcopy(layer.state_dict()), layer.state_dict()
    state["indices"] = state["indices"].flip(0)
    with pytest.raises(RuntimeError, match="indices must be strictly increasing"):
        layer.load_state_dict(state)
    assert torch.equal(layer.indices, before["indices"])
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        layer.load_state_dict(SLTrainLinear(10, 7, rank=3, density=0.3).state_dict())


def test_a_model_built_without_memory_is_filled_from_a_checkpoint():
    layer = SLTrainLinear(30, 20, rank=2, seed=3)
    with torch.device("meta"):
        blank = SLTrainLinear(30, 20, rank=2)
    blank.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(4, 30)
    assert torch.equal(blank(x), layer(x))
