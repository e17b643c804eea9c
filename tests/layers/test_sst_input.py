"""What SST refuses: ranks, indices, seeds, settings and states of the scheduler, weights with NaN."""

import copy

import pytest
import torch
from torch import nn

from lowdim.layers import SSTLinear, SSTScheduler


@pytest.mark.parametrize("rank", [0, -1, 6, 2.0, True, None])
def test_bad_rank(rank):
    for make in (lambda: SSTLinear(6, 5, rank=rank), lambda: SSTLinear.from_linear(nn.Linear(6, 5), rank=rank)):
        with pytest.raises(ValueError, match=r"rank must be an int in \[1, 5\]; got"):
            make()


@pytest.mark.parametrize("indices", [[1], [1, 1], [0, 5], [-1, 0], [0, 1, 2], [0.0, 1.0], [True, 0], torch.tensor([0.5, 1.0])])
def test_bad_indices(indices):
    layer = SSTLinear(6, 5, rank=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"indices must be 2 distinct ints in \[0, 5\); got"):
        layer.resample(indices=indices)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed must be an int >= 0; got"):
        SSTLinear(6, 5, rank=2, seed=seed)


@pytest.mark.parametrize(
    ("name", "value"), [("steps_per_iteration", 0), ("iterations_per_round", 0), ("warmup", -1), ("warmup", 0.5), ("seed", "a")]
)
def test_bad_scheduler_settings(name, value):
    layer = SSTLinear(6, 5, rank=2)
    with pytest.raises(ValueError, match=f"{name} must be an int >= .; got"):
        SSTScheduler(layer, torch.optim.SGD(layer.parameters()), **{name: value})


def test_bad_scheduler_state_and_model():
    layer = SSTLinear(6, 5, rank=2)
    turn = SSTScheduler(layer, torch.optim.SGD(layer.parameters()))
    for state in ({}, {"steps": -1}, {"steps": "3"}):
        with pytest.raises(ValueError, match="steps must be an int >= 0; got"):
            turn.load_state_dict(state)
    plain = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="model must have a layer of type SSTLinear; Linear has none"):
        SSTScheduler(plain, torch.optim.SGD(plain.parameters()))


def test_reinitialize_refuses_nan():
    layer = SSTLinear(6, 5, rank=2)
    with torch.no_grad():
        layer.S[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.reinitialize()
