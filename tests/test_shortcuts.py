"""Shortcuts past torch's operations (numpy, `out=`, an autograd.Function) step aside for whatever follows these operations."""

import copy
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn.utils import parametrize

from lowdim.compress import WINALinear
from lowdim.linalg import monarch_dense, monarch_multiply
from lowdim.linalg.eager import is_eager
from lowdim.represent import clustered_coding_rate, coding_rate, sinkhorn_projection

DRAW = torch.Generator().manual_seed(0)
ROWS = torch.nn.functional.normalize(torch.randn(6, 3, generator=DRAW, dtype=torch.float64))
GAMMA = torch.rand(6, 6, generator=DRAW, dtype=torch.float64)
W1, W2 = torch.randn(2, 4, 3, generator=DRAW), torch.randn(8, 250, 1, generator=DRAW)
RATES = {
    "clustered_coding_rate": lambda rows: clustered_coding_rate(rows, GAMMA),
    "coding_rate": coding_rate,
    "sinkhorn_projection": lambda rows: sinkhorn_projection(rows @ rows.T, 0.3)[0, 1],
}


@pytest.fixture
def sparse():
    """A layer that reads only the rows that a token uses."""
    torch.manual_seed(0)
    layer = WINALinear.from_linear(nn.Linear(16, 6), 0.5).eval()
    with torch.no_grad():
        layer(torch.ones(1, 16))
    assert layer.copied_bytes()
    return layer


def many(x):
    return monarch_multiply(x, W1, W2)


def traced(function, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, x, check_trace=False)


def test_what_is_eager():
    seen = []

    def look(x):
        seen.append(is_eager())
        return 2 * x

    look(torch.ones(2))
    vmap(look)(torch.ones(2))
    grad(look)(torch.tensor(1.0))
    with forward.dual_level():
        look(torch.ones(2))
    traced(look, torch.ones(2))
    assert seen[:4] == [True, False, False, False]
    assert seen[4:] == [False]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_sparse_rows_step_aside(sparse):
    x, tangent = torch.randn(3, 1, 16), torch.randn(1, 16)
    torch.testing.assert_close(vmap(sparse)(x), torch.stack([sparse(each) for each in x]))
    function = traced(sparse, x[0])
    torch.testing.assert_close(function(x[1]), sparse(x[1]))
    want = torch.nn.functional.linear(tangent * sparse.mask(x[0]), sparse.weight)
    torch.testing.assert_close(jvp(sparse, (x[0],), (tangent,))[1], want)
    with forward.dual_level():
        torch.testing.assert_close(forward.unpack_dual(sparse(forward.make_dual(x[0], tangent))).tangent, want)


@torch.no_grad()
def test_a_weight_that_is_computed_is_used_as_it_is(sparse):
    """Nor has a replica of DataParallel its weight among its parameters."""
    x, other = torch.randn(1, 16), copy.deepcopy(sparse)
    parametrize.register_parametrization(other, "weight", nn.Identity())
    torch.testing.assert_close(other(x), sparse(x))


@torch.no_grad()
def test_copies_are_without_the_transposed_weight(sparse):
    other = copy.deepcopy(sparse)
    assert other.copied_bytes() == 0
    assert torch.equal(other(torch.ones(1, 16)), sparse(torch.ones(1, 16)))
    assert other.copied_bytes() == sparse.copied_bytes() > 0


@pytest.mark.parametrize("name", RATES)
def test_gradients_of_rates_by_function_transforms(name):
    rows = ROWS.clone().requires_grad_()
    (want,) = torch.autograd.grad(RATES[name](rows), rows)
    torch.testing.assert_close(grad(RATES[name])(ROWS), want)
    torch.testing.assert_close(vmap(grad(RATES[name]))(torch.stack([ROWS, ROWS])), torch.stack([want, want]))


@torch.no_grad()
def test_blocks_of_monarch_rows_step_aside():
    x = torch.randn(530, 6)
    assert len(x) * 2000 > 2**20
    with forward.dual_level():
        tangent = forward.unpack_dual(many(forward.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ monarch_dense(W1, W2).mT)
    other = torch.randn(900, 6)  # more blocks than were traced
    torch.testing.assert_close(traced(many, x)(other), many(other))
