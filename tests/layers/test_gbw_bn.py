"""GBWBN's layer and optimizer: formula, reference numbers, ill-conditioned input, wrong input."""

import copy

import pytest
import torch
from torch import nn

import vectors
from lowdim.layers import SPDSGD, GBWBatchNorm
from lowdim.linalg import bw_distance2, stream
from lowdim.testing.norm_case import NormCase
from lowdim.testing.processes import in_processes


def function(P, f):
    """A function of the eigenvalues, through autograd's own eigendecomposition."""
    values, U = torch.linalg.eigh((P + P.mT) / 2)
    return U @ torch.diag_embed(f(values)) @ U.mT


def power(P, a):
    return function(P, lambda p: p**a)


def matrices(count, n, seed=0, low=0.2):
    A = torch.randn(count, n, n, generator=stream(seed, "gbw-bn", "test"), dtype=torch.float64)
    return A @ A.mT / n + low * torch.eye(n, dtype=torch.float64)


class TestGBWBatchNorm(NormCase):
    norm_class = GBWBatchNorm
    features = 4
    how = {"theta": 0.5}  # noqa: RUF012 (typed in the base class)
    theta, momentum, eps, steps, about_mean = 0.5, 0.1, 1e-5, 1, False

    def batch(self, seed=0):
        return matrices(6, self.features, seed + 1) * (1 + 0.3 * seed)

    def disturb(self, norm):
        with torch.no_grad():
            bias, metric = matrices(2, self.features, 9, 0.5)
            norm.bias.copy_(bias)
            norm.metric.copy_(metric)
            norm.scale.fill_(0.7)

    def expected(self, norm, x, training):
        """Step by step as in the paper: every exponential and logarithm is built."""
        eye = torch.eye(self.features, dtype=torch.float64)
        root, inverse = power(norm.metric, 0.5), power(norm.metric, -0.5)
        Y = inverse @ power(x, self.theta) @ inverse
        H = inverse @ power(norm.bias, self.theta) @ inverse
        mean, var, buffers = norm.running_mean, norm.running_var, dict(norm.named_buffers())
        if training:
            with torch.no_grad():
                mean = Y.mean(0)
                for _ in range(self.steps):
                    r, i = power(mean, 0.5), power(mean, -0.5)
                    mean = i @ torch.linalg.matrix_power(power(r @ Y @ r, 0.5).mean(0), 2) @ i
                center = mean if self.about_mean else eye
                r = power(center, 0.5)
                traces = torch.stack([torch.trace(y) + torch.trace(center) - 2 * torch.trace(power(r @ y @ r, 0.5)) for y in Y])
                var = traces.mean() / self.theta**2
                A, t = norm.running_mean, self.momentum
                C = power(A, 0.5) @ power(power(A, 0.5) @ mean @ power(A, 0.5), 0.5) @ power(A, -0.5)
                moved = (1 - t) ** 2 * A + t**2 * mean + t * (1 - t) * (C + C.mT)
                buffers = {"running_mean": moved, "running_var": (1 - t) * norm.running_var + t * var}
        r, i = power(mean, 0.5), power(mean, -0.5)
        C = r @ power(r @ Y @ r, 0.5) @ i
        S = self.transport(mean, C + C.mT - 2 * mean, -0.5)
        Z = eye + S + S @ S / 4
        S = norm.scale / (var + self.eps).sqrt() * (2 * power(Z, 0.5) - 2 * eye)
        Z = eye + S + S @ S / 4
        S = self.transport(H, 2 * power(Z, 0.5) - 2 * eye, 0.5)
        kron = torch.kron(H, eye) + torch.kron(eye, H)  # L H + H L = S, as a linear system of n² unknowns
        L = torch.linalg.solve(kron, S.flatten(1).mT).mT.view_as(S)
        Z = H + S + L @ H @ L
        return power(root @ Z @ root, 1 / self.theta), buffers

    def transport(self, P, S, a):
        p, U = torch.linalg.eigh(P)
        return U @ (((p[:, None] + p[None, :]) / 2) ** a * (U.mT @ S @ U)) @ U.mT

    def refusals(self):
        norm, good = self.make(), self.batch()
        asymmetric, negative, nan = good.clone(), good.clone(), good.clone()
        asymmetric[1, 0, 1] += 1e-6
        negative[2] -= 5 * torch.eye(4)
        nan[0, 0, 0] = torch.nan
        return [
            (ValueError, "(..., 4, 4); got (6, 3, 3)", lambda: norm(good[:, :3, :3])),
            (ValueError, "(..., 4, 4); got (4,)", lambda: norm(good[0, 0])),
            (ValueError, "symmetric", lambda: norm(asymmetric)),
            (ValueError, "smallest eigenvalue is -", lambda: norm(negative)),
            (ValueError, "smallest eigenvalue is 0", lambda: norm(torch.zeros(1, 4, 4))),
            (ValueError, "NaN", lambda: norm(nan)),
            (ValueError, "int64", lambda: norm(good.long())),
            (ValueError, "empty", lambda: self.make().train()(good[:0])),
            (ValueError, "theta", lambda: GBWBatchNorm(4, theta=0)),
            (ValueError, "theta", lambda: GBWBatchNorm(4, theta=float("inf"))),
            (ValueError, "variance_about", lambda: GBWBatchNorm(4, variance_about="median")),
            (ValueError, "n_iter", lambda: GBWBatchNorm(4, n_iter=0)),
            (ValueError, "num_features", lambda: GBWBatchNorm(0)),
            (ValueError, "momentum", lambda: GBWBatchNorm(4, momentum=1.5)),
            (ValueError, "eps", lambda: GBWBatchNorm(4, eps=0.0)),
        ]


class TestGBWBatchNormByDefault(TestGBWBatchNorm):
    how = {}  # noqa: RUF012
    theta = 1.0


class TestGBWBatchNormOtherwise(TestGBWBatchNorm):
    """Inverse metrics, the paper's variance, three steps of the mean."""

    how = {"theta": -0.5, "momentum": 0.3, "eps": 1e-2, "n_iter": 3, "variance_about": "mean"}  # noqa: RUF012
    theta, momentum, eps, steps, about_mean = -0.5, 0.3, 1e-2, 3, True


class TestGBWBatchNormUnconstrained(TestGBWBatchNorm):
    how = {"theta": 0.5, "unconstrained": True}  # noqa: RUF012

    def disturb(self, norm):
        norm.bias, norm.metric = matrices(2, self.features, 9, 0.5).to(norm.scale.dtype)  # their logarithms are what is stored
        nn.init.constant_(norm.scale, 0.7)


def loaded(v):
    how = v.hyperparameters
    norm = GBWBatchNorm(how["n"], theta=how["power"], momentum=how["momentum"], eps=how["eps"])
    names = {name: f"param.{name}" for name in ("bias", "metric", "scale")}
    names |= {name: f"{name}.before" for name in ("running_mean", "running_var")}
    norm.load_state_dict({name: v[key] for name, key in names.items()})
    return norm


@pytest.mark.parametrize("case", ["theta_half", "theta_half_gradient", "theta_negative", "theta_one"])
def test_reference_numbers(case):
    v = vectors.load("gbw-bn", case)
    norm, x = loaded(v), v["X"].clone().requires_grad_(True)
    if "eval.output" in v:
        v.close(norm.eval()(x), "eval.output")
    y = norm.train()(x)
    v.close(y, "train.output")
    v.close(norm.running_mean, "running_mean.after")
    v.close(norm.running_var, "running_var.after")
    if "cotangent" in v:
        (y * v["cotangent"]).sum().backward()
        v.close(norm.scale.grad, "grad.scale")
        tensors = [("bias", norm.bias), ("metric", norm.metric), *([("X", x)] if "grad.X" in v else [])]
        for name, tensor in tensors:
            v.close((tensor.grad + tensor.grad.mT) / 2, f"grad.{name}")
    if "step.bias" in v:
        SPDSGD([norm.bias, norm.metric], lr=v.hyperparameters["lr"]).step()
        v.close(norm.bias, "step.bias")
        v.close(norm.metric, "step.metric")


def test_what_it_starts_with():
    norm, free = GBWBatchNorm(3), GBWBatchNorm(3, unconstrained=True)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(norm.bias, eye + torch.diag(torch.tensor([1e-7, 2e-7, 3e-7], dtype=torch.float64)))
    assert torch.equal(norm.metric, eye)
    assert torch.equal(norm.running_mean, eye)
    assert (norm.scale.item(), norm.running_var.item()) == (1.0, 1.0)
    assert norm.state_dict().keys() == {"bias", "metric", "scale", "running_mean", "running_var"}
    assert {"parametrizations.bias.original", "parametrizations.metric.original", "scale"} <= free.state_dict().keys()
    x = matrices(4, 3)
    torch.testing.assert_close(free(x), norm(x), rtol=1e-10, atol=1e-12)


def test_leading_dimensions_share_the_statistics():
    x, one, two = matrices(6, 3), GBWBatchNorm(3), GBWBatchNorm(3)
    assert torch.equal(one(x.view(2, 3, 3, 3)).view(6, 3, 3), two(x))
    assert torch.equal(one.running_mean, two.running_mean)
    assert one.eval()(x[0]).shape == (3, 3)
    assert one(x[:0]).shape == (0, 3, 3)


def part_of_a_batch(rank, world):
    norm = GBWBatchNorm(3, theta=0.5, variance_about="mean")
    y = norm(matrices(7, 3)[slice(2) if rank == 0 else slice(2, None)])
    return [t.detach().numpy() for t in (y, norm.running_mean, norm.running_var)]


@pytest.mark.slow
def test_two_processes_share_the_statistics():
    """Two of seven matrices here, five there: the same as all in one."""
    norm = GBWBatchNorm(3, theta=0.5, variance_about="mean")
    want = norm(matrices(7, 3))[:2], norm.running_mean, norm.running_var
    for got, value in zip(in_processes(part_of_a_batch), want, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), value.detach(), rtol=1e-10, atol=1e-12)


def test_repeated_eigenvalues_have_their_gradient():
    """Metric and matrices are multiples of the identity: autograd through `eigh` gives NaN there."""
    norm = GBWBatchNorm(3, theta=0.5)
    with torch.no_grad():
        norm.bias.copy_(2 * torch.eye(3))
    x = torch.stack([scale * torch.eye(3, dtype=torch.float64) for scale in (0.5, 1.0, 3.0)]).requires_grad_(True)
    weights = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm.eval()

    def loss(x, bias, metric):
        held = {"bias": (bias + bias.mT) / 2, "metric": (metric + metric.mT) / 2}
        return (torch.func.functional_call(norm, held, ((x + x.mT) / 2,)) * weights).sum()

    assert torch.autograd.gradcheck(loss, (x, norm.bias, norm.metric))
    gradient = torch.autograd.grad(loss(x, norm.bias, norm.metric), norm.metric)[0]
    assert float((gradient - gradient.diagonal().diag()).abs().max()) > 1e-3, "off the diagonal, too"


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.25, -0.5])
@pytest.mark.parametrize("unconstrained", [False, True])
def test_training_stays_finite_at_condition_1e12(theta, unconstrained):
    """Every step; the output is symmetric, and bias and metric stay positive definite."""
    draw = stream(0, "gbw-bn", "ill")
    U = torch.linalg.qr(torch.randn(12, 6, 6, generator=draw, dtype=torch.float64))[0]
    x = (U * torch.logspace(0, -12, 6, dtype=torch.float64)) @ U.mT
    x = (x + x.mT) / 2 + 1e-13 * torch.eye(6)
    norm = GBWBatchNorm(6, theta=theta, unconstrained=unconstrained)
    if unconstrained:
        optimizers = [torch.optim.AdamW(norm.parameters(), lr=1e-2)]
    else:
        optimizers = [SPDSGD([norm.bias, norm.metric], lr=1e-3), torch.optim.SGD([norm.scale], lr=1e-3)]
    for _ in range(5):
        norm.zero_grad()
        y = norm(x)
        (y / y.detach().abs().max()).square().mean().backward()
        assert bool(y.isfinite().all())
        assert torch.equal(y, y.mT)
        assert all(bool(p.grad.isfinite().all()) for p in norm.parameters())
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.linalg.eigvalsh(matrix)[0].item() > 0 for matrix in (norm.bias, norm.metric, norm.running_mean))


def test_the_batch_is_centred_and_scaled():
    """With the neutral start the output's mean is near the identity, and its variance about 1."""
    x, eye = matrices(40, 3, low=0.5), torch.eye(3, dtype=torch.float64)
    norm = GBWBatchNorm(3, n_iter=20, variance_about="mean")
    y = norm(x).detach()
    assert float((power(y, 0.5).mean(0) - eye).abs().max()) < 0.2  # not exact: the transport changes the mean a little
    assert float(bw_distance2(y, eye).mean()) == pytest.approx(1.0, rel=0.05)


def test_a_step_is_the_formula():
    """The solution of `L W + W L = S` by its n² equations; the gradient's antisymmetric part does nothing."""
    W = nn.Parameter(matrices(1, 3)[0])
    g = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    W.grad, before, eye = g.clone(), W.detach().clone(), torch.eye(3, dtype=torch.float64)
    S = -0.05 * before @ ((g + g.mT) / 2) @ before
    L = torch.linalg.solve(torch.kron(before, eye) + torch.kron(eye, before), S.flatten()).view(3, 3)
    SPDSGD([W], lr=0.05).step()
    torch.testing.assert_close(W.detach(), before + S + L @ before @ L, rtol=1e-12, atol=1e-13)


def test_a_step_follows_its_group_and_the_closure():
    one, two = (nn.Parameter(torch.eye(2, dtype=torch.float64)) for _ in range(2))
    optimizer = SPDSGD([{"params": [one], "lr": 0.2}, {"params": [two]}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = torch.trace(one) + torch.trace(two)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    # S = −lr I, L = S / 2: (1 − lr / 2)²
    torch.testing.assert_close(one.detach(), 0.81 * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(two.detach(), 0.9025 * torch.eye(2, dtype=torch.float64))


def test_a_refused_step_changes_nothing():
    good, grad = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    cases = [(-good, grad, "positive definite"), (0 * good, grad, "unconstrained"), (good, grad / 0, "NaN or infinite")]
    for value, gradient, word in [
        *cases,
        (torch.ones(2, 3), torch.ones(2, 3), "(2, 3)"),
        (torch.ones(2), torch.ones(2), "(2,)"),
    ]:
        first, second = nn.Parameter(good.clone()), nn.Parameter(value.clone())
        first.grad, second.grad = grad.clone(), gradient.clone()
        with pytest.raises(ValueError) as refused:
            SPDSGD([first, second], lr=0.1).step()
        assert word in str(refused.value)
        assert torch.equal(first, good)
    with pytest.raises(ValueError, match="lr"):
        SPDSGD([nn.Parameter(good)], lr=0.0)
    free = GBWBatchNorm(3, unconstrained=True)
    free(matrices(4, 3)).sum().backward()
    with pytest.raises(ValueError, match="positive definite"):
        SPDSGD([p for p in free.parameters() if p.ndim == 2], lr=0.1).step()


class _Map(nn.Module):
    """BiMap: `Wᵀ X W`."""

    def __init__(self, big, small):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(matrices(1, big, 5)[0])[0][:, :small].clone())

    def forward(self, X):
        return self.weight.mT @ X @ self.weight


class _Eig(nn.Module):
    """ReEig or LogEig."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, X):
        return function(X, self.f)


def test_it_trains_between_the_layers_of_an_spd_network():
    """Channels, ReEig before it, LogEig after it: the loss falls, and a copy answers the same."""
    x = matrices(24, 5, 3, low=1e-3).view(12, 2, 5, 5)
    labels = (x[:, 0, 0, 0] > x[:, 0, 0, 0].median()).long()
    norm = GBWBatchNorm(4, theta=0.5)
    eigs = _Eig(lambda p: p.clamp_min(1e-5)), _Eig(torch.log)
    model = nn.Sequential(_Map(5, 4), eigs[0], norm, eigs[1], nn.Flatten(), nn.Linear(32, 2, dtype=torch.float64))
    spd = SPDSGD([norm.bias, norm.metric], lr=1e-2)
    rest = torch.optim.SGD([norm.scale, *model[0].parameters(), *model[-1].parameters()], lr=5e-2)
    losses = []
    for _ in range(30):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        spd.step()
        rest.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x))
