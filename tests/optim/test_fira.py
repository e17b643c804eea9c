"""Fira: the authors' numbers, the fused step against the plain one, every error, and the shared case."""

import dataclasses

import formulas
import pytest
import torch
from torch import nn
from trajectories import relative_to_update, roundings_apart
from wrong_options import PROJECTED

import vectors
from lowdim.linalg import stream
from lowdim.optim import AdamWRule, Fira, GaLore, NormScaledResidual, SVDProjector, param_groups, state_bytes
from lowdim.testing.optimizer_case import OptimizerCase
from lowdim.testing.sharded_case import Subject, uneven_net


class TestFira(OptimizerCase):
    test_update_lies_in_the_subspace = None  # type: ignore[assignment]  # leaving it is the point
    scale, limiter = 1.0, 1.01

    def make(self, params, **options):
        return Fira(params, **{"lr": 0.02, "rank": 3, "update_interval": self.update_interval, **options})

    def side(self, grad):
        return formulas.shorter(grad)

    def reference_step(self, weight, grad, state, step, projected):
        """`g = Lᵀ G R`, `W ← W − η (scale · L D Rᵀ + S)` with S of `formulas.norm_scaled`, then the decay."""
        eta = formulas.step_size(step, 0.02)
        if not projected:
            return (1 - 0.02 * self.decay) * (weight - eta * formulas.adam_outside(grad, state))
        if step % 3 == 0:
            state["L"], state["R"] = formulas.sided(grad, self.side(grad), 3)
        L, R = state["L"], state["R"]
        g = L.mT @ grad @ R
        D = formulas.adam_outside(g, state)
        S = formulas.norm_scaled(grad, self.scale * L @ g @ R.mT, g, D, state, self.limiter)
        return (1 - 0.02 * self.decay) * (weight - eta * (self.scale * L @ D @ R.mT + S))


class TestReverse(TestFira):
    scale = 0.25

    def side(self, grad):
        return "left" if formulas.shorter(grad) == "right" else "right"

    def make(self, params, **options):
        return super().make(params, proj_type="reverse_std", scale=0.25, **options)


class TestRight(TestFira):
    def side(self, grad):
        return "right"

    def make(self, params, **options):
        return super().make(params, proj_type="right", **options)


class TestUnlimited(TestFira):
    limiter = None

    def make(self, params, **options):
        return super().make(params, limiter=None, **options)


class Unfused(NormScaledResidual):
    def fused(self, *args, **options):
        return False


class PlainFira(Fira):
    """The two terms one after the other."""

    def parts(self, group, ndim):
        parts = super().parts(group, ndim)
        return dataclasses.replace(parts, residual=Unfused(group["limiter"])) if group["rank"] is not None else parts


class TestPlain(TestFira):
    def make(self, params, **options):
        return PlainFira(params, **{"lr": 0.02, "rank": 3, "update_interval": self.update_interval, **options})


def made(cls=Fira, **options):
    common = {"lr": 0.02, "update_interval": 4, "weight_decay": 0.01}
    return lambda net: cls(param_groups(net, rank=3), **{**common, **options})


SHARDED = {
    "fira": Subject(net=uneven_net, optimizer=made(scale=0.5)),
    "fira-reverse": Subject(net=uneven_net, optimizer=made(proj_type="reverse_std")),
    "fira-replicas": Subject(net=uneven_net, optimizer=made(layerwise=True), how="replicas"),
    "fira-plain": Subject(net=uneven_net, optimizer=made(PlainFira, scale=0.5)),
    "fira-plain-reverse": Subject(net=uneven_net, optimizer=made(PlainFira, proj_type="reverse_std")),
}


def follow(case, cls=Fira, **options):
    """Run a vector's gradients; the weights and the kept norms after each step."""
    hyper = {k: v for k, v in case.hyperparameters.items() if k != "steps"}
    p = nn.Parameter(case["weight"].clone())
    optimizer = cls([p], **{**hyper, **options})
    weights, norms = [], []
    for grad in case["grads"]:
        p.grad = grad.clone()
        optimizer.step()
        weights.append(p.detach().clone())
        norms.append(optimizer.state[p].get("residual_norm"))
    return optimizer, p, torch.stack(weights), norms


@pytest.mark.parametrize("cls", [Fira, PlainFira])
@pytest.mark.parametrize("name", vectors.cases("fira"))
def test_vectors(name, cls):
    case = vectors.load("fira", name)
    optimizer, p, weights, norms = follow(case, cls)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    case.close(torch.stack(norms), "residual_norms")
    case.close(optimizer.state[p]["exp_avg_sq"], "exp_avg_sq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", vectors.cases("fira"))
def test_vectors_in_lower_precision(name, dtype):
    """The same trajectory, as far as the weights' dtype can tell it."""
    case = vectors.load("fira", name)
    case.tensors = {k: t.to(dtype) for k, t in case.tensors.items()}
    _, _, weights, _ = follow(case)
    assert roundings_apart(weights, case["weights_after"].double(), dtype) <= 12


def trajectory(cls, shape, grads, **options):
    p = nn.Parameter(torch.randn(shape, generator=stream(0, "fira", "start"), dtype=torch.float64))
    optimizer = cls([p], **{"lr": 0.02, "rank": 3, "update_interval": 3, "weight_decay": 0.1, **options})
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("scale", [1.0, 0.25, -0.5])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("shape", [(11, 8), (8, 11), (8, 8)])
def test_fused_step_equals_the_plain_one(shape, proj_type, scale):
    grads = torch.randn(7, *shape, generator=stream(0, "fira", "grads"), dtype=torch.float64)
    grads[4] *= 4  # the limiter acts
    for limiter in (1.01, None):
        options = {"proj_type": proj_type, "scale": scale, "limiter": limiter}
        fused, state = trajectory(Fira, shape, grads, **options)
        plain, other = trajectory(PlainFira, shape, grads, **options)
        assert float((fused - plain).abs().max()) <= 1e-12 * float(plain.abs().max())
        if limiter is not None:
            assert float((state["residual_norm"] - other["residual_norm"]).abs()) <= 1e-12 * float(other["residual_norm"])


def test_fused_builds_no_matrix_of_the_weights_size():
    """Peak memory of the step, counted by what torch allocates."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:  # no view, not in place
                sizes.append(out.numel())
            return out

    for shape in ((64, 40), (40, 64)):
        p = nn.Parameter(torch.randn(shape))
        optimizer = Fira([p], rank=4)
        p.grad = torch.randn(shape)
        optimizer.step()  # the first chooses a subspace
        sizes.clear()
        with Watch():
            optimizer.step()
        assert sizes
        assert max(sizes) <= 16 * 64  # a few rows at a time, or m r


def test_the_written_formula():
    """Three steps of the specification's text, term by term, on a wide matrix."""
    m, n, r, lr, alpha, gamma = 6, 9, 2, 0.03, 0.5, 1.01
    grads = (
        torch.randn(3, m, n, generator=stream(1, "fira"), dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    )
    W = torch.zeros(m, n, dtype=torch.float64)
    p = nn.Parameter(W.clone())
    optimizer = Fira([p], lr=lr, rank=r, scale=alpha, limiter=gamma, update_interval=100)
    first = second = torch.zeros(r, n, dtype=torch.float64)
    kept = None
    for k, G in enumerate(grads, 1):
        p.grad = G.clone()
        optimizer.step()
        L = optimizer.state[p]["left_basis"]
        g = L.T @ G
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        D = first / (second.sqrt() + 1e-6)
        phi = D.norm(dim=0) / (g.norm(dim=0) + 1e-8)
        S = (G - alpha * L @ g) * phi
        size = S.norm()
        if kept is not None:
            c = max(float(size / (kept + 1e-8)), gamma) / gamma
            S, size = S / c, size / c
        kept = size
        W = W - lr * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k) * (alpha * L @ D + S)
        assert float((p - W).detach().abs().max()) < 1e-12
        assert abs(float(optimizer.state[p]["residual_norm"] - kept)) < 1e-10
        if k == 2:
            assert c > 1  # the limiter did act


def test_limiter_none_keeps_no_norm_and_lets_spikes_through():
    grads = torch.randn(2, 8, 6, generator=stream(2, "fira"), dtype=torch.float64)
    grads[1] *= 100
    moved = {}
    for limiter in (1.01, None):
        start, state = trajectory(Fira, (8, 6), grads[:1], limiter=limiter)
        end, state = trajectory(Fira, (8, 6), grads, limiter=limiter)
        assert ("residual_norm" in state) == (limiter is not None)
        moved[limiter] = float((end - start).norm())
    assert moved[None] > 1.2 * moved[1.01]


def test_a_step_without_gradient_leaves_the_norm():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = Fira([p], rank=2)
    p.grad = torch.randn(8, 6, generator=stream(3, "fira"))
    optimizer.step()
    norm = optimizer.state[p]["residual_norm"].clone()
    p.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[p]["residual_norm"], norm)
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("cls", [Fira, PlainFira])
def test_zero_gradients_do_no_harm(cls):
    """φ of 0 / 0 is 0; and a residual of zero must not hold the next ones down."""
    p = nn.Parameter(torch.ones(8, 6, dtype=torch.float64))
    optimizer = cls([p], lr=0.01, rank=2)
    p.grad = torch.zeros(8, 6, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(p, torch.ones(8, 6, dtype=torch.float64))
    assert float(optimizer.state[p]["residual_norm"]) == 0
    p.grad = torch.randn(8, 6, generator=stream(4, "fira"), dtype=torch.float64)
    optimizer.step()
    basis = optimizer.state[p]["right_basis"]
    outside = (p.detach() - 1) - (p.detach() - 1) @ basis @ basis.T
    assert float(outside.norm()) > 0.01  # not 1e-8


@pytest.mark.parametrize("cls", [Fira, PlainFira])
def test_a_gradient_inside_of_the_subspace_leaves_the_kept_norm(cls):
    """Fewer tokens than the rank: at a refresh nothing lies outside but rounding, which is no measure of anything."""
    p = nn.Parameter(torch.zeros(12, 10))
    optimizer = cls([p], lr=0.01, rank=4, update_interval=2)
    draw = stream(5, "fira")
    norms = []
    for step in range(5):
        low = 3 if step % 2 == 0 else 10
        p.grad = torch.randn(12, low, generator=draw) @ torch.randn(low, 10, generator=draw)
        optimizer.step()
        norms.append(float(optimizer.state[p]["residual_norm"]))
    assert norms[0] == 0
    assert norms[1] > 0.1
    assert norms[2] == norms[1]
    assert 0.1 < norms[3] <= 1.0101 * norms[1]


def test_full_rank_of_scale_one_is_adam_in_a_rotated_frame():
    """r = min(m, n): S = (1 − α) φ G, nothing at α = 1; both paths, and a wide matrix whose D is square."""
    for shape, proj in (((8, 5), "std"), ((5, 8), "std"), ((5, 5), "left"), ((8, 5), "left"), ((5, 8), "right")):
        rank = 5
        grads = torch.randn(4, *shape, generator=stream(6, "fira"), dtype=torch.float64)
        fira, state = trajectory(Fira, shape, grads, rank=rank, proj_type=proj)
        p = nn.Parameter(torch.randn(shape, generator=stream(0, "fira", "start"), dtype=torch.float64))
        galore = GaLore([p], lr=0.02, rank=rank, update_interval=3, scale=1.0, weight_decay=0.1, proj_type=proj)
        for grad in grads:
            p.grad = grad
            galore.step()
        whole = rank == min(shape) and fira.shape == state["exp_avg"].shape
        if whole:
            assert float((fira - p.detach()).abs().max()) < 1e-12
            assert float(state["residual_norm"]) == 0
        half, _ = trajectory(Fira, shape, grads, rank=rank, proj_type=proj, scale=0.5)
        plain, _ = trajectory(PlainFira, shape, grads, rank=rank, proj_type=proj, scale=0.5)
        assert float((half - plain).abs().max()) < 1e-12


def test_float16_goes_the_plain_way():
    """A factor ‖D‖ / ‖g‖ of small gradients does not fit float16."""
    p = nn.Parameter(torch.zeros(8, 6, dtype=torch.float16))
    optimizer = Fira([p], rank=2, lr=1e-3)
    for _ in range(3):
        p.grad = (torch.randn(8, 6, generator=stream(7, "fira")) * 1e-6).half()
        optimizer.step()
    assert bool(torch.isfinite(p).all())
    assert float(p.detach().abs().max()) > 0


def test_state_is_galores_and_four_bytes():
    m, n, r = 64, 32, 8
    p, q = nn.Parameter(torch.zeros(m, n)), nn.Parameter(torch.zeros(m, n))
    p.grad = q.grad = torch.randn(m, n)
    fira, galore = Fira([p], rank=r), GaLore([q], rank=r)
    fira.step(), galore.step()
    assert state_bytes(fira) == state_bytes(galore) + 4


def test_parts_are_the_papers():
    optimizer = Fira([nn.Parameter(torch.zeros(8, 6))], rank=2, scale=0.25, limiter=1.5)
    parts = optimizer.parts(optimizer.param_groups[0], 2)
    assert parts.projector == SVDProjector(2, 200, 0.25)
    assert parts.inner == AdamWRule(eps=1e-6, eps_mode="outside")
    assert parts.residual == NormScaledResidual(1.5)
    assert (parts.decay, parts.rotate) == ("after", False)


@pytest.mark.parametrize("foreach", [True, False])
def test_unprojected_group_is_galores(foreach):
    p, q = (nn.Parameter(torch.ones(6, 4, dtype=torch.float64)) for _ in range(2))
    fira = Fira([p], lr=0.01, rank=None, weight_decay=0.1, foreach=foreach)
    galore = GaLore([q], lr=0.01, rank=None, weight_decay=0.1)
    for step in range(3):
        p.grad = q.grad = torch.randn(6, 4, generator=stream(step, "fira"), dtype=torch.float64)
        fira.step(), galore.step()
    assert float((p - q).detach().abs().max()) < 1e-14
    assert "residual_norm" not in fira.state[p]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *PROJECTED,
        ({"scale": float("nan")}, "scale"),
        ({"limiter": 0.99}, r"limiter must be .*\[1, inf.*0.99"),
        ({"limiter": "on"}, "limiter"),
        ({"proj_type": "full"}, "proj_type"),  # D is r x r: no factor a row or column of W
        ({"svd": "fast"}, "svd"),
        ({"accumulate": 2}, "layerwise"),
        ({"accumulate": 2, "layerwise": True}, "accumulate=2.*full gradient"),
        ({"max_norm": 1.0}, "max_norm.*full gradient"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        Fira([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_rank_on_other_than_matrices_is_refused():
    with pytest.raises(ValueError, match="vectors"):
        Fira([nn.Parameter(torch.zeros(8))], rank=2)
    with pytest.raises(ValueError, match="more than two dimensions"):
        Fira([nn.Parameter(torch.zeros(8, 4, 3, 3))], rank=2)


def test_nan_gradient_at_a_refresh_keeps_the_basis_and_the_norm():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = Fira([p], rank=2, update_interval=2)
    for _ in range(2):
        p.grad = torch.randn(8, 6, generator=stream(8, "fira"))
        optimizer.step()
    basis, norm = optimizer.state[p]["right_basis"].clone(), optimizer.state[p]["residual_norm"].clone()
    p.grad = torch.full((8, 6), float("nan"))
    optimizer.step()
    assert torch.equal(optimizer.state[p]["right_basis"], basis)
    assert torch.equal(optimizer.state[p]["residual_norm"], norm)
