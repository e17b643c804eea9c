"""GaLore's subspaces: their bases, when a new one is chosen, from which gradients, and what learns in them."""

from itertools import pairwise

import torch
from torch import nn

from lowdim.optim import GaLore
from lowdim.testing.optimizer_problem import OptimizerProblem


def test_bases_have_canonical_signs_and_energy_is_true():
    p = nn.Parameter(torch.zeros(9, 6, dtype=torch.float64))
    optimizer = GaLore([p], rank=2)
    p.grad = torch.randn(9, 6, dtype=torch.float64)
    optimizer.step()
    basis = optimizer.state[p]["right_basis"]
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    share = (p.grad @ basis).square().sum() / p.grad.square().sum()
    assert abs(float(optimizer.state[p]["energy"]) - float(share)) < 1e-6


def test_refresh_happens_at_multiples_of_the_interval():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = GaLore([p], rank=2, update_interval=3)
    bases = []
    for _ in range(7):
        p.grad = torch.randn(8, 6)
        optimizer.step()
        bases.append(optimizer.state[p]["right_basis"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_nan_gradient_at_a_refresh_keeps_the_basis():
    for shape, rank in (((8, 6), 2), ((4, 3, 2, 2), 2)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = GaLore([p], rank=rank, update_interval=2)
        for _ in range(2):
            p.grad = torch.randn(shape)
            optimizer.step()
        key = "right_basis" if len(shape) == 2 else "factor0"
        before = optimizer.state[p][key].clone()
        p.grad = torch.full(shape, float("inf"))
        optimizer.step()  # step 2: due
        assert torch.equal(optimizer.state[p][key], before)


def test_zero_gradient_does_no_harm():
    """A frozen layer's gradient is zero: no NaN, no change."""
    for svd in ("exact", "randomized"):
        p = nn.Parameter(torch.randn(8, 6))
        before = p.detach().clone()
        optimizer = GaLore([p], rank=2, svd=svd)
        p.grad = torch.zeros(8, 6)
        optimizer.step()
        assert torch.equal(p, before)
        assert float(optimizer.state[p]["energy"]) == 1.0


def test_accumulated_projected_gradients_equal_accumulated_gradients():
    """Micro-batches under layerwise: the full gradient is kept only where a subspace is chosen; the result is the same."""
    case, how = OptimizerProblem(), {"lr": 0.1, "rank": 3, "update_interval": 3}
    for options in ({}, {"inner": "adafactor"}):
        net, other = case.model(torch.float64), case.model(torch.float64)
        plain = GaLore(case.groups(net), **how, **options)
        layered = GaLore(case.groups(other), **how, layerwise=True, accumulate=3, **options)
        freed = 0
        for step in range(7):
            for micro in range(3):
                (case.loss(net, 3 * step + micro, torch.float64) / 3).backward()
                (case.loss(other, 3 * step + micro, torch.float64) / 3).backward()
                freed += other[0].weight.grad is None and micro < 2
            plain.step()
            plain.zero_grad()
            layered.step()
            assert all(p.grad is None for p in other.parameters())
        assert freed == 2 * 4  # steps 1, 2, 4, 5 choose no subspace
        case.close(case.weights(other), case.weights(net), 1e-9)


def test_a_group_can_set_everything_for_itself():
    a, b = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(6, 8))
    optimizer = GaLore([{"params": [a], "rank": 3, "inner": "adafactor"}, {"params": [b], "proj_type": "right"}], rank=2)
    for p in (a, b):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert optimizer.state[a]["right_basis"].shape == (6, 3)
    assert "row" in optimizer.state[a]
    assert optimizer.state[b]["right_basis"].shape == (8, 2)
    assert "exp_avg" in optimizer.state[b]


def test_convolution_learns():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for inner in ("adamw", "adafactor"):
        groups = [
            {"params": [p for p in net.parameters() if p.ndim == 4]},
            {"params": [p for p in net.parameters() if p.ndim == 1], "rank": None},
        ]
        optimizer = GaLore(groups, lr=0.05, rank=4, update_interval=5, inner=inner)
        x = torch.randn(16, 3, 8, 8)
        losses = []
        for _ in range(40):
            loss = (net(x) - teacher(x).detach()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
