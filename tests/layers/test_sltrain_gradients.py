"""SLTrain's passes: which parts move, in what precision, what is kept for the backward pass, and torch's ways to run them."""

import pytest
import torch
from sltrain_layers import ROWS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowdim.layers import SLTrainLinear
from lowdim.plan.kept import kept_bytes


def test_values_alone_move_in_the_first_step():
    """B = 0: A has no gradient at first; then everything moves."""
    layer, x = SLTrainLinear(12, 8, rank=2, density=0.2), torch.randn(30, 12)
    layer(x).square().mean().backward()
    assert not bool(layer.A.grad.any())
    assert bool(layer.values.grad.any())
    assert bool(layer.B.grad.any())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer.zero_grad()
    layer(x).square().mean().backward()
    assert bool(layer.A.grad.any())


def test_the_scale_acts_on_the_product_alone():
    layer = SLTrainLinear(6, 5, rank=2, density=0.3, alpha=2, bias=False)
    other = SLTrainLinear(6, 5, rank=2, density=0.3, alpha=8, bias=False)
    assert torch.equal(layer.dense_weight(), other.dense_weight())  # B is zero
    x = torch.randn(50, 6)
    layer(x).sum().backward()
    other(x).sum().backward()
    torch.testing.assert_close(other.B.grad, 4 * layer.B.grad)
    torch.testing.assert_close(other.values.grad, layer.values.grad)


@pytest.mark.parametrize("rows", [2, ROWS])
@pytest.mark.parametrize("frozen", [(), ("values",), ("A", "B"), ("A",), ("B", "values", "bias"), ("A", "B", "values", "bias")])
def test_frozen_parts(frozen, rows):
    layer = SLTrainLinear(12, 8, rank=2, density=0.2, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(rows, 12, dtype=torch.float64)
    want = torch.autograd.grad(F.linear(x, layer.dense_weight(), layer.bias).square().sum(), list(layer.parameters()))
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    if len(frozen) == 4:
        assert not layer(x).requires_grad
        x.requires_grad_(True)
        assert kept_bytes(layer, x) == 0  # nothing but the layer's own numbers
        assert torch.autograd.grad(layer(x).sum(), x)[0].shape == x.shape
        return
    layer(x).square().sum().backward()
    for (name, parameter), grad in zip(layer.named_parameters(), want, strict=True):
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [2, ROWS])
def test_no_entry_on_the_support(rows):
    layer = SLTrainLinear(5, 4, rank=2, density=0.01)  # int(0.2) = 0 entries
    assert layer.values.shape == (0,)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        layer(torch.randn(rows, 5)).square().sum().backward()
        optimizer.step()
    assert layer.values.grad.shape == (0,)
    assert bool(layer.B.any())


@pytest.mark.parametrize("reentrant", [False, True])
def test_used_twice_and_checkpointed(reentrant):
    layer = SLTrainLinear(10, 10, rank=2, density=0.2, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    x = torch.randn(30, 10, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(layer(x).tanh()).square().sum(), (x, *layer.parameters()))
    layer(checkpoint(lambda t: layer(t).tanh(), x, use_reentrant=reentrant)).square().sum().backward()
    for got, want in zip((x, *layer.parameters()), plain, strict=True):
        torch.testing.assert_close(got.grad, want)


def test_backward_under_autocast_stays_in_the_layers_dtype():
    layer, x = SLTrainLinear(12, 8, rank=2, density=0.2), torch.randn(ROWS, 12)
    want = torch.autograd.grad(layer(x).square().sum(), layer.values)[0]
    y = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        y.backward()
    assert torch.equal(layer.values.grad, want)


def test_autocast_leaves_float64():
    layer, x = SLTrainLinear(12, 8, rank=2, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float64


def test_keeps_the_input_and_its_own_numbers():
    layer, x = SLTrainLinear(64, 64, rank=2, density=0.05), torch.randn(ROWS, 64, requires_grad=True)
    assert kept_bytes(layer, x) == x.nbytes


def test_fake_tensors():
    with FakeTensorMode():
        layer = SLTrainLinear(4096, 11008, rank=8, generator=torch.Generator())
        y = layer(torch.empty(2, 4096, requires_grad=True))
        y.sum().backward()
        assert layer.values.grad.shape == layer.indices.shape == (int(0.03 * 4096 * 11008),)
        assert SLTrainLinear.from_linear(nn.Linear(30, 20), rank=2).values.shape == (18,)


def test_functional_gradients_and_compiling():
    layer, x = SLTrainLinear(12, 8, rank=2, density=0.2), torch.randn(5, 12)
    numbers = dict(layer.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(numbers)
    y = torch.compile(layer, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_a_second_derivative_is_refused():
    layer = SLTrainLinear(6, 5, rank=2, density=0.3)
    grads = torch.autograd.grad(layer(torch.randn(3, 6)).square().sum(), layer.values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()
