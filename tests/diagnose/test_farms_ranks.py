"""Ranks by layer from exponents: equal cost, the order of the exponents, the layers' limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowdim.diagnose import farms, farms_ranks, pruning_ratios
from lowdim.methods.exponents import layer_exponents
from lowdim.testing.agreement import refuses

SIDES = st.integers(1, 300)
LAYERS = st.lists(st.tuples(st.floats(1.01, 9), SIDES, SIDES), min_size=2, max_size=12)


def test_the_formula():
    """Linear in alpha, from half to one and a half times the rank, rounded; here the cost needs no correction."""
    alphas, shapes = [4.0, 2.0, 3.5, 2.5], [(64, 64)] * 4
    q = [0.5 + (a - 2) / (4 - 2) for a in alphas]  # 1 - epsilon + 2 epsilon (a - min) / (max - min)
    want = [round(16 * each / (sum(q) / 4)) for each in q]
    assert sum(want) == 4 * 16
    assert farms_ranks(alphas, shapes, 16) == want


def test_the_mapping_is_that_of_the_pruning_ratios():
    alphas, sizes = [2.0, 2.2, 5.0, 3.1], [(80, 40), (40, 40), (120, 60), (40, 90)]
    shares = pruning_ratios(alphas, [sum(shape) for shape in sizes], 0.1, epsilon=0.3)
    ranks = farms_ranks(alphas, sizes, 40, epsilon=0.3)
    for rank, share, shape in zip(ranks, shares, sizes, strict=True):
        assert abs(rank - min(400 * share, min(shape))) <= 1.5 or rank == min(shape)


@settings(max_examples=150, deadline=None)
@given(LAYERS, st.integers(1, 64), st.sampled_from([0.2, 0.5, 0.9]), st.sampled_from(["factors", "square", "diagonal"]))
def test_equal_cost_in_order_within_bounds(layers, rank, epsilon, kind):
    cost = {"factors": lambda out, into, r: r * (out + into), "square": lambda o, i, r: r * r, "diagonal": lambda o, i, r: r}[
        kind
    ]
    alphas, shapes = [a for a, _, _ in layers], [(o, i) for _, o, i in layers]
    ranks = farms_ranks(alphas, shapes, rank, epsilon=epsilon, cost=cost)
    limits = [min(shape) for shape in shapes]
    assert all(1 <= r <= limit for r, limit in zip(ranks, limits, strict=True))
    uniform = sum(cost(*shape, min(rank, limit)) for shape, limit in zip(shapes, limits, strict=True))
    assert abs(sum(cost(*shape, r) for shape, r in zip(shapes, ranks, strict=True)) - uniform) <= 0.05 * uniform
    for a, r, limit in zip(alphas, ranks, limits, strict=True):
        for other, s in zip(alphas, ranks, strict=True):
            if a > other:
                assert r >= min(s, limit), "more exponent, at least as much rank, or the layer's own limit"


def test_equal_exponents_and_ranks_that_cannot_differ_stay_as_they_are():
    assert farms_ranks([3.0, 3.0], [(20, 30), (30, 20)], 7) == [7, 7]
    assert farms_ranks([2.0, 3.0], [(50, 50)] * 2, 1) == [1, 1], "one of them at rank 2 would cost half as much again"


def test_refusals():
    shapes = [(8, 8)] * 2
    refuses(
        [
            (ValueError, "at least two layers; got 1 alphas", lambda: farms_ranks([2.0], shapes[:1], 4)),
            (ValueError, "got 3 alphas and 2 shapes", lambda: farms_ranks([2.0, 3.0, 4.0], shapes, 4)),
            (ValueError, "rank must be an int >= 1", lambda: farms_ranks([2.0, 3.0], shapes, 0)),
            (ValueError, "epsilon", lambda: farms_ranks([2.0, 3.0], shapes, 4, epsilon=1.0)),
            (ValueError, "finite", lambda: farms_ranks([2.0, math.nan], shapes, 4)),
        ]
    )


def test_exponents_of_a_model_are_those_of_farms_in_windows_of_half_the_smallest_side():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 16, 3), nn.Linear(40, 24), nn.Linear(24, 60), nn.Linear(60, 4), nn.Linear(24, 24))
    model[4].weight.data.zero_()
    found = layer_exponents(model, head=("1",))
    weights = {"0": model[0].weight, "2": model[2].weight}
    assert found.alphas == farms(weights, rows=8).alphas, "16 is the smallest side of the two matrices"
    assert set(found.skipped) == {"3", "4"}
    assert "its smaller side is 4, too small for a window" in found.skipped["3"]
    assert found.skipped["4"] == "every entry is 0"
    assert np.isfinite(list(found.alphas.values())).all()
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 2: the weight has NaN"):
        layer_exponents(model)
    with pytest.raises(
        ValueError, match="need at least two layers: only layer 0 can be measured; layer 1: its smaller side is 3"
    ):
        layer_exponents(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))).refuse_few()
