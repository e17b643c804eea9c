"""SLTrain's fresh numbers: which positions are drawn, the numbers in them, and what a seed decides."""

import pytest
import torch
from torch import nn

from lowdim.layers import SLTrainLinear, swap_linear
from lowdim.layers.sltrain import _sample
from lowdim.linalg import stream


def test_fresh_numbers():
    layer = SLTrainLinear(400, 300, rank=8)
    for tensor in (layer.A, layer.values, layer.bias):
        assert 0.95 / 20 < float(tensor.detach().abs().max()) <= 1 / 20
        assert abs(float(tensor.detach().mean())) < 0.005
    assert not bool(layer.B.any())
    assert layer.values.shape == layer.indices.shape == (3600,)
    assert layer.scaling == 4.0
    assert layer.indices.dtype == torch.int64


def test_the_weight_has_full_rank():
    assert int(torch.linalg.matrix_rank(SLTrainLinear(40, 40, rank=1, density=0.2).dense_weight().detach())) == 40


@pytest.mark.parametrize(
    ("total", "count"), [(1000, 30), (1000, 249), (1000, 251), (1000, 999), (7, 1), (7, 0), (100_000, 3000)]
)
def test_support_is_ascending_and_distinct(total, count):
    drawn = _sample(total, count, stream(0, "test"))
    assert drawn.shape == (count,)
    assert drawn.dtype == torch.int64
    assert bool((drawn[1:] > drawn[:-1]).all())
    assert count == 0 or 0 <= int(drawn[0]) <= int(drawn[-1]) < total


@pytest.mark.parametrize("count", [2, 5])
def test_every_support_is_as_likely(count):
    """Chi-square over single positions and over neighbouring pairs of 12, by both ways of drawing."""
    generator, single, pairs, draws = stream(1, "test"), torch.zeros(12), torch.zeros(12), 3000
    for _ in range(draws):
        taken = torch.zeros(12)
        taken[_sample(12, count, generator)] = 1
        single += taken
        pairs += taken * taken.roll(1)
    for found, p in ((single, count / 12), (pairs, count * (count - 1) / (12 * 11))):
        deviation = (found - draws * p) / (draws * p * (1 - p)) ** 0.5
        assert float(deviation.abs().max()) < 4


def test_seed_decides_support_and_numbers():
    one, two, three = (SLTrainLinear(30, 20, rank=2, seed=s) for s in (5, 5, 6))
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.values, two.values)
    assert not torch.equal(one.indices, three.indices)
    assert not torch.equal(one.A, three.A)
    half = SLTrainLinear(30, 20, rank=2, seed=5, dtype=torch.bfloat16, index_dtype=torch.int32)
    assert torch.equal(half.indices.long(), one.indices)
    assert torch.equal(half.A, one.A.bfloat16())
    with torch.no_grad():
        two.values.zero_()
    two.reset_parameters()
    assert torch.equal(one.values, two.values)


def test_no_seed_draws_one():
    torch.manual_seed(0)
    layers = [SLTrainLinear(30, 20, rank=2, seed=None) for _ in range(2)]
    assert not torch.equal(layers[0].indices, layers[1].indices)
    torch.manual_seed(0)
    assert torch.equal(SLTrainLinear(30, 20, rank=2, seed=None).indices, layers[0].indices)


def test_layers_of_a_model_differ():
    model = swap_linear(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), SLTrainLinear, fresh=True, rank=2, seed=0)
    assert not torch.equal(model[0].A, model[1].A)


def test_the_given_support_is_not_shared():
    indices = torch.tensor([1, 5])
    layer = SLTrainLinear(6, 4, rank=2, indices=indices)
    indices.zero_()
    assert layer.indices.tolist() == [1, 5]
    assert layer.density == 2 / 24
