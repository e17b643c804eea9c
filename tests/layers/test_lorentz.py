import copy
import math

import pytest
import torch
from torch import nn

import vectors
from lowdim.layers import LorentzLinear, SSTLinear, SSTScheduler
from lowdim.testing.sharded_case import Subject


def by_the_formula(x, weight, bias, log_scale):
    """`t = exp(s) sigmoid(z₀) + 1.1`; the space part of z, stretched to the length `√(t² − 1)`."""
    z = x @ weight.T + bias
    t = log_scale.exp() / (1 + (-z[:, :1]).exp()) + 1.1
    return torch.cat([t, z[:, 1:] * (t**2 - 1).sqrt() / z[:, 1:].norm(dim=1, keepdim=True)], 1)


@pytest.mark.parametrize("scale", [10.0, 3.0])
def test_forward_and_gradients_are_the_formula(scale):
    layer = LorentzLinear(nn.Linear(4, 5, dtype=torch.float64), scale=scale)
    log_scale = torch.full((1,), math.log(scale), dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y, want = layer(x), by_the_formula(x, layer.linear.weight, layer.linear.bias, log_scale)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    shared = (x, layer.linear.weight, layer.linear.bias)
    got = torch.autograd.grad((y * weights).sum(), (*shared, layer.log_scale))
    for a, b in zip(got, torch.autograd.grad((want * weights).sum(), (*shared, log_scale)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def on_hyperboloid(y):
    return -y[..., 0].square() + y[..., 1:].square().sum(-1)


def test_vectors():
    v = vectors.load("sst", "lorentz")
    linear = nn.Linear(v.hyperparameters["in_features"], v.hyperparameters["out_features"], dtype=torch.float64)
    linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    x = v["x"]
    assert torch.allclose(on_hyperboloid(x), -torch.ones(len(x), dtype=torch.float64))
    v.close(LorentzLinear(linear, scale=v.hyperparameters["scale"])(x), "y")
    v.close(LorentzLinear(SSTLinear.from_linear(linear, rank=2), scale=v.hyperparameters["scale"])(x), "y")


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_outputs_lie_on_the_hyperboloid(lead):
    y = LorentzLinear(nn.Linear(6, 5, dtype=torch.float64))(torch.randn(*lead, 6, dtype=torch.float64))
    assert y.shape == (*lead, 5)
    assert torch.allclose(on_hyperboloid(y), torch.full(lead, -1.0, dtype=torch.float64))
    assert bool((y[..., 0] >= 1.1).all())


def test_time_is_bounded_by_the_scale():
    layer = LorentzLinear(nn.Linear(3, 4), scale=2.0)
    with torch.no_grad():
        layer.linear.weight.mul_(1000)
    y = layer(torch.randn(200, 3))
    assert 3.0 < float(y[:, 0].detach().max()) <= 2.0 + 1.1 + 1e-5


def test_space_without_length_stays_finite():
    layer = LorentzLinear(nn.Linear(3, 4, bias=False, dtype=torch.float64))
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert float(y[0, 0].detach()) == pytest.approx(10 * 0.5 + 1.1)
    assert not bool(y[:, 1:].any())
    assert all(bool(torch.isfinite(t.grad).all()) for t in (x, *layer.parameters()))


def test_gradients():
    layer = LorentzLinear(nn.Linear(4, 3, dtype=torch.float64))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = ["log_scale", "linear.weight", "linear.bias"]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(name).detach().clone().requires_grad_(True) for name in names]
    assert torch.autograd.gradcheck(run, (x, *values))


def test_scale_is_learned_as_a_logarithm_or_fixed():
    layer = LorentzLinear(nn.Linear(4, 3, dtype=torch.float64), scale=7.0)
    assert float(layer.log_scale.detach()) == pytest.approx(math.log(7))
    assert layer.log_scale.dtype == torch.float64
    assert layer.log_scale.requires_grad
    fixed = LorentzLinear(nn.Linear(4, 3), fix_scale=True)
    assert not fixed.log_scale.requires_grad
    assert "fix_scale=True" in repr(fixed)
    assert set(fixed.state_dict()) == {"log_scale", "linear.weight", "linear.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_rounds_once(dtype):
    layer = LorentzLinear(nn.Linear(6, 5, dtype=dtype))
    x = torch.randn(4, 6, dtype=dtype)
    y = layer(x).detach()
    assert y.dtype == dtype
    exact = LorentzLinear(nn.Identity())
    exact.log_scale = nn.Parameter(layer.log_scale.detach().double())
    want = exact(layer.linear(x).double()).detach()
    bound = torch.finfo(dtype).eps * (1.01 if dtype == torch.bfloat16 else 8)
    assert float(((y.double() - want) / want).abs().max()) < bound
    layer(x).float().sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters())


def test_autocast():
    layer = LorentzLinear(SSTLinear(6, 5, rank=2))
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_meta_and_copies():
    layer = LorentzLinear(SSTLinear(6, 5, rank=2, device="meta"))
    assert layer.log_scale.is_meta
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)
    filled = LorentzLinear(SSTLinear(6, 5, rank=2))
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), filled(x))
    other = copy.deepcopy(filled)
    with torch.no_grad():
        other.log_scale.add_(1)
    assert torch.equal(layer(x), filled(x))


def test_trains_with_sst_inside():
    """Points of two classes, two layers deep; the scheduler finds the wrapped layers."""
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(64, 5, generator=generator)
    x = torch.cat([(1 + space.square().sum(1, keepdim=True)).sqrt(), space], 1)
    target = (space[:, 0] > 0).long()
    net = nn.Sequential(
        LorentzLinear(SSTLinear(6, 8, rank=2, seed=0)), LorentzLinear(SSTLinear(8, 8, rank=2, seed=1)), nn.Linear(8, 2)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    turn = SSTScheduler(net, optimizer, steps_per_iteration=10, warmup=2)
    assert len(turn.layers) == 2
    losses = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turn.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert float((on_hyperboloid(net[1](net[0](x))) + 1).detach().abs().max()) < 1e-2


def _net():
    return nn.Sequential(
        LorentzLinear(SSTLinear(7, 5, rank=2, seed=0, dtype=torch.float64)),
        LorentzLinear(SSTLinear(5, 5, rank=2, seed=1, dtype=torch.float64), fix_scale=True),
        LorentzLinear(SSTLinear(5, 3, rank=1, seed=2, dtype=torch.float64)),
    )


def _optimizer(net):
    return torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.01)


def _turn(net, optimizer):
    return SSTScheduler(net, optimizer, steps_per_iteration=4, iterations_per_round=2, warmup=2)


SHARDED = {"lorentz": Subject(net=_net, optimizer=_optimizer, companion=_turn)}


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "10", True])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match=r"scale must be a finite number in \(0, inf\]; got"):
        LorentzLinear(nn.Linear(4, 3), scale=scale)


def test_too_few_outputs():
    with pytest.raises(ValueError, match=r"linear must have at least 2 outputs, time and space; its output has shape \(2, 1\)"):
        LorentzLinear(nn.Linear(4, 1))(torch.randn(2, 4))
