"""The hook points that later systems build on, each with a toy part that really uses it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lowdim.linalg import stream
from lowdim.optim import AdamW8bitRule, AdamWRule, GaLore, Parts, ProjectedOptimizer, ResidualRule, SVDProjector, WeightStore
from lowdim.testing.optimizer_problem import OptimizerProblem


@dataclass(frozen=True)
class CarryError(ResidualRule):
    """Error feedback: what the subspace lost comes back with the next gradient."""

    def before(self, grad, state):
        return grad + state["error"] if "error" in state else grad

    def after(self, a, low, D, projector, state):
        state["error"] = a - projector.up(low, state)
        return None


@dataclass(frozen=True)
class AddRest(ResidualRule):
    """Adds the part of the gradient outside of the subspace, unscaled."""

    def after(self, a, low, D, projector, state):
        return a - projector.up(low, state)


@dataclass(frozen=True)
class Grid(WeightStore):
    """Weights live on a grid of 1/64, rounded stochastically; the gradient lies in another attribute."""

    stochastic = True

    def grad(self, p):
        return getattr(p, "float_grad", None)

    def drop(self, p):
        p.float_grad = None

    def read(self, p):
        return p.detach().double() / 64

    def write(self, p, value, generator):
        noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(torch.floor(value * 64 + noise))

    def watch(self, p, call):
        p.ready = call
        return None


class Toy(ProjectedOptimizer):
    method = "toy"

    def __init__(self, params, residual=None, store=None, rotate=False, decay="after", inner=None, lr=0.05, rank=2, **options):
        self.choice = residual, store, rotate, decay, inner or AdamWRule()
        defaults = {"lr": lr, "rank": rank, "weight_decay": 0.0, "update_interval": 3}
        layer = {k: options.pop(k) for k in ("layerwise", "accumulate") if k in options}
        super().__init__(params, {**defaults, **options}, **layer)

    def parts(self, group, ndim):
        residual, store, rotate, decay, inner = self.choice
        given = {k: v for k, v in (("residual", residual), ("store", store)) if v is not None}
        projector = SVDProjector(group["rank"], group["update_interval"], 0.25, rotates=rotate)
        return Parts(projector, inner, rotate=rotate, decay=decay, **given)


def grads(count=7, shape=(8, 6), seed=0):
    return list(torch.randn(count, *shape, generator=stream(seed, "grads"), dtype=torch.float64))


def test_residual_sees_and_adds():
    """W -= η (scale · up(D) + rest), the rest taken from the very gradient of this step."""
    p, q = (nn.Parameter(torch.zeros(8, 6, dtype=torch.float64)) for _ in range(2))
    with_rest, without = Toy([p], AddRest()), Toy([q])
    eta = 0.0
    for k, grad in enumerate(grads(), 1):
        before = (p - q).detach().clone()
        p.grad, q.grad = grad, grad
        with_rest.step()
        without.step()
        R = without.state[q]["right_basis"]
        eta = 0.05 * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k)
        rest = grad - grad @ R @ R.mT
        assert torch.allclose((p - q).detach() - before, -eta * rest, atol=1e-12)
    assert eta > 0


def test_error_feedback_carries_what_was_lost():
    """The errors and projections of a constant gradient add up: after k steps Σ up(low) + error = k G."""
    p = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    optimizer = Toy([p], CarryError())
    seen = []
    projector = optimizer.parts(optimizer.param_groups[0], 2).projector
    grad = grads(1)[0]
    for k in range(1, 6):
        p.grad = grad.clone()
        before = optimizer.state[p].get("error", torch.zeros_like(grad))
        optimizer.step()
        a = grad + before
        seen.append(projector.up(projector.down(a, optimizer.state[p]), optimizer.state[p]))
        assert torch.allclose(sum(seen) + optimizer.state[p]["error"], k * grad, atol=1e-10)
        assert torch.equal(p.grad, grad)


def test_residual_state_survives_a_checkpoint():
    p, q = (nn.Parameter(torch.zeros(8, 6, dtype=torch.float64)) for _ in range(2))
    one, two = Toy([p], CarryError()), Toy([q], CarryError())
    rows = grads()
    for grad in rows[:4]:
        p.grad = grad
        one.step()
    with torch.no_grad():
        q.copy_(p)
    two.load_state_dict(one.state_dict())
    for grad in rows[4:]:
        p.grad, q.grad = grad, grad
        one.step()
        two.step()
    assert torch.equal(p, q)


def test_rotation_carries_moments_over():
    """After a change of basis m is the old m seen from the new basis, v its absolute value."""
    for shape, side in (((8, 6), "right"), ((6, 8), "left")):
        p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = Toy([p], rotate=True)
        rows = grads(4, shape)
        for grad in rows[:3]:
            p.grad = grad
            optimizer.step()
        state = optimizer.state[p]
        old = {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}
        p.grad = rows[3]
        optimizer.step()  # step 3: a new subspace
        assert "rotation" not in state
        new = state[f"{side}_basis"]
        assert not torch.allclose(new, old[f"{side}_basis"])
        R = old[f"{side}_basis"].mT @ new
        turn = (lambda t, R=R: t @ R) if side == "right" else (lambda t, R=R: R.mT @ t)
        low = rows[3] @ new if side == "right" else new.mT @ rows[3]
        assert torch.allclose(state["exp_avg"], 0.9 * turn(old["exp_avg"]) + 0.1 * low, atol=1e-12)
        assert torch.allclose(state["exp_avg_sq"], 0.999 * turn(old["exp_avg_sq"]).abs() + 0.001 * low**2, atol=1e-12)


def test_rotation_of_bytes_is_that_of_floats_but_for_quantisation():
    p, q = (nn.Parameter(torch.zeros(64, 48)) for _ in range(2))
    floats = Toy([p], rotate=True, rank=8, inner=AdamWRule(eps=1e-8, eps_mode="inside"))
    as_bytes = Toy([q], rotate=True, rank=8, inner=AdamW8bitRule(min_size=1))
    for grad in grads(7, (64, 48)):
        p.grad, q.grad = grad.float(), grad.float()
        floats.step()
        as_bytes.step()
    assert as_bytes.state[q]["exp_avg"].dtype == torch.uint8
    assert float((p - q).detach().norm() / p.detach().norm()) < 0.03


def test_decay_before_and_after():
    """before: (1 - lr wd) W - U; after: (1 - lr wd)(W - U)."""
    start, grad = torch.randn(8, 6, dtype=torch.float64), grads(1)[0]
    ends = {}
    for decay in ("before", "after", "none"):
        p = nn.Parameter(start.clone())
        optimizer = Toy([p], decay="after" if decay == "none" else decay, weight_decay=0.0 if decay == "none" else 0.4)
        p.grad = grad
        optimizer.step()
        ends[decay] = p.detach()
    update = start - ends["none"]
    assert torch.allclose(ends["before"], 0.98 * start - update, atol=1e-12)
    assert torch.allclose(ends["after"], 0.98 * (start - update), atol=1e-12)


def test_store_of_integers():
    """A weight that is no floating tensor: gradient from the store, rounding noise seeded, also called from a backward pass."""
    ends = []
    for layerwise in (False, True, False):
        p = nn.Parameter(torch.zeros(8, 6, dtype=torch.int16), requires_grad=False)
        optimizer = Toy([p], store=Grid(), layerwise=layerwise)
        for grad in grads(5):
            p.float_grad = grad.clone()
            if layerwise:
                p.ready(p)
                assert p.float_grad is None
            optimizer.step()
        ends.append(p.detach().clone())
    assert ends[0].dtype == torch.int16
    assert int(ends[0].abs().max()) > 0
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_accumulation_is_refused_where_the_full_gradient_is_needed():
    with pytest.raises(ValueError, match="full gradient"):
        Toy([nn.Parameter(torch.zeros(8, 6))], AddRest(), layerwise=True, accumulate=2)


def test_resume_in_the_middle_of_an_accumulation():
    """The sum of projected gradients is part of the state."""
    case = OptimizerProblem()
    nets, optimizers = [], []
    for _ in range(2):
        net = case.model(torch.float64)
        nets.append(net)
        optimizers.append(GaLore(case.groups(net), lr=0.1, rank=3, update_interval=3, layerwise=True, accumulate=2))
    for index in range(5):  # two steps and a half; the third one chooses no subspace
        case.loss(nets[0], index, torch.float64).backward()
        if index % 2:
            optimizers[0].step()
    assert "low_sum" in optimizers[0].state[nets[0][0].weight]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()  # biases are not projected: their sum is .grad
    for net in nets:
        case.loss(net, 5, torch.float64).backward()
    case.same(case.weights(nets[0]), case.weights(nets[1]))


def test_layerwise_products_ignore_autocast():
    """A backward pass under autocast must not round the projection to bfloat16; this gradient itself involves no product."""
    ends = []
    for cast in (False, True):
        p = nn.Parameter(torch.zeros(8, 6))
        optimizer = GaLore([p], lr=0.1, rank=3, layerwise=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            for grad in grads(3):
                (p * grad.float()).sum().backward()
                optimizer.step()
        assert optimizer.state[p]["step"] == 3
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_unprojected_parameters_fused_or_not_are_the_same():
    for decay in (0.0, 0.3):
        ends = []
        for foreach in (True, False):
            case = OptimizerProblem()
            net = case.model(torch.float64)
            groups = [{"params": list(net.parameters()), "rank": None}]
            optimizer = GaLore(groups, lr=0.05, foreach=foreach, weight_decay=decay)
            for index in range(4):
                case.loss(net, index, torch.float64).backward()
                if index == 1:
                    net[0].weight.grad = None  # parameters of one group may have done different numbers of steps
                optimizer.step()
                optimizer.zero_grad()
            ends.append(case.weights(net))
            assert optimizer.state[net[0].weight]["step"] == 3
        case.close(ends[0], ends[1], 1e-12)
