"""SST's enhanced gradient: against the formula, in what precision, and what the backward pass keeps."""

import pytest
import torch
from stale_buffers import spoil
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowdim.layers import SSTLinear
from lowdim.plan.kept import kept_tensors


def gradients(layer, x, exact=False):
    x = x.clone().requires_grad_(True)
    y = F.linear(x, layer.dense_weight(), layer.bias) if exact else layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    loss = (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()
    return dict(zip(("x", *names), torch.autograd.grad(loss, (x, *parameters)), strict=True))


def test_gradcheck_passes_but_for_the_active_vectors():
    layer = SSTLinear(5, 4, rank=2, dtype=torch.float64)
    layer.resample(indices=[1, 3])
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def check(chosen):
        def run(x, *values):
            return torch.func.functional_call(layer, dict(zip(chosen, values, strict=True)), (x,))

        values = [layer.get_parameter(name).detach().clone().requires_grad_(True) for name in chosen]
        for name in set(names) - set(chosen):
            layer.get_parameter(name).requires_grad_(False)
        return torch.autograd.gradcheck(run, (x, *values), raise_exception=False)

    assert check(["S", "bias"])
    assert not check(["U_active"])
    assert not check(["Vh_active"])


def test_small_singular_values_learn_as_fast_as_large_ones():
    """A direction without any weight gets the same gradient as if it had some."""
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    want = torch.ones(4, 5, dtype=torch.float64)
    layer(x).backward(want)
    first = {name: p.grad for name, p in layer.named_parameters() if name != "S"}
    layer.zero_grad()
    with torch.no_grad():
        layer.S[:2] = 0
    layer(x).backward(want)
    for name, grad in first.items():
        assert torch.equal(layer.get_parameter(name).grad, grad), name
    assert bool(first["U_active"].any())


@pytest.mark.parametrize("frozen", ["S", "U_active", "Vh_active", "bias", "x"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    want = gradients(layer, x)
    if frozen != "x":
        layer.get_parameter(frozen).requires_grad_(False)
    x.requires_grad_(frozen != "x")
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert (tensor.grad is None) if name == frozen else torch.equal(tensor.grad, want[name]), name


def test_keeps_input_and_hidden():
    """Nothing else, and only what the trained parameters need; under autocast the rounded ones."""
    layer, x = SSTLinear(8, 6, rank=2), torch.randn(3, 5, 8)

    def kept():
        return sorted((tuple(t.shape), t.dtype) for t in kept_tensors(lambda: layer(x), layer))

    assert kept() == [((15, 6), torch.float32), ((15, 8), torch.float32)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept_tensors(lambda: layer(x), layer)), "the input is copied"
    with torch.autocast("cpu", torch.bfloat16):
        assert kept() == [((15, 6), torch.bfloat16), ((15, 8), torch.bfloat16)]
    layer.Vh_active.requires_grad_(False)
    assert kept() == [((15, 6), torch.float32)]
    layer.S.requires_grad_(False)
    layer.U_active.requires_grad_(False)
    assert kept() == []


def test_a_step_between_forward_and_backward_is_noticed():
    layer = SSTLinear(6, 5, rank=2)
    for change in (layer.post_step, layer.reinitialize, layer.resample):
        y = layer(torch.ones(2, 6, requires_grad=True))
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_bits(reentrant):
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x.grad = None
        layer.zero_grad()
        run(x.requires_grad_(True)).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast_gradients_are_near_the_exact_ones():
    layer, x = SSTLinear(12, 20, rank=3), torch.randn(6, 12)
    layer.resample(indices=[0, 4, 9])
    want = gradients(layer, x)
    x = x.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()  # as some loops do: inside
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert float((tensor.grad - want[name]).norm() / want[name].norm()) < 0.02, name


def test_parameters_in_lower_precision_than_the_buffers():
    """As FSDP2's mixed precision hands them over."""
    layer, x = SSTLinear(12, 20, rank=3), torch.randn(6, 12)
    want, y = gradients(layer, x), layer(x).detach()
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().bfloat16()))
    low = layer(x.bfloat16()).detach()
    assert low.dtype == torch.bfloat16
    assert float((low - y).norm() / y.norm()) < 0.02
    for name, grad in gradients(layer, x.bfloat16()).items():
        assert grad.dtype == torch.bfloat16
        assert float((grad - want[name]).norm() / want[name].norm()) < 0.02, name


def test_inference_is_the_same_product():
    layer, x = SSTLinear(6, 5, rank=2), torch.randn(4, 6)
    layer.resample(indices=[0, 3])
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone().requires_grad_(True)))
    with torch.inference_mode():
        assert torch.equal(layer(x), layer(x))


def test_compiles_to_the_same_gradients():
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    want = gradients(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_(True)
    y = compiled(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert float((tensor.grad - want[name]).abs().max()) < 1e-12, name


def test_the_parameters_are_the_truth():
    layer, x = SSTLinear(6, 5, rank=2, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    layer.resample(indices=[1, 4])
    y, weight, grads = layer(x), layer.dense_weight(), gradients(layer, x)
    spoil(layer)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.dense_weight(), weight)
    assert all(torch.equal(value, grads[name]) for name, value in gradients(layer, x).items())
    layer.write_back()
    assert torch.equal(layer.U[:, layer.active], layer.U_active)
    assert torch.equal(layer.Vh[layer.active], layer.Vh_active)
