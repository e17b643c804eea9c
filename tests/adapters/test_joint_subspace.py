"""`intrinsic_subspace`: one projection of all parameters together."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vectors
from lowdim.adapters import SubspaceModel, intrinsic_subspace, said
from lowdim.adapters.core import projections
from lowdim.errors import CheckpointError, NoMatchingModuleError
from lowdim.linalg import FastfoodDraws
from lowdim.plan.kept import kept_tensors
from lowdim.testing.agreement import refuses
from lowdim.testing.small_model import sample_input, small_model

KINDS = ("fastfood", "dense", "sparse")


def matrix(sub):
    """`P (D, d)`, written out from the draws: Fastfood's by dense Hadamard matrices."""
    (draws,) = sub.draws
    if not isinstance(draws, FastfoodDraws):
        return draws.to_dense().double()
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < len(draws):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    G = draws.gaussian.double()
    P = H @ (G[:, None] * (H * draws.signs)[draws.permutation.long()])
    return P[: sub.total, : len(sub.theta)] / (sub.total * G.square().sum()).sqrt()


def moved(kind, dtype=torch.float64, **how):
    model = small_model(dtype=dtype)
    sub = intrinsic_subspace(model, 12, projection=kind, seed=3, **how)
    with torch.no_grad():
        sub.theta.copy_(torch.linspace(-0.5, 0.7, 12))
    return sub


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_with_the_sum(kind):
    sub, plain = moved(kind), small_model(dtype=torch.float64)
    offsets = (matrix(sub) @ sub.theta.detach()).split([p.numel() for p in plain.parameters()])
    with torch.no_grad():
        for (name, p), offset in zip(plain.named_parameters(), offsets):
            torch.testing.assert_close(sub.offsets()[name], offset.view_as(p), rtol=1e-6, atol=1e-7)
            p.add_(offset.view_as(p))
    x = sample_input(dtype=torch.float64)
    torch.testing.assert_close(sub(x), plain(x), rtol=1e-5, atol=1e-6)
    sub(x).square().sum().backward()
    plain(x).square().sum().backward()
    flat = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(sub.theta.grad, matrix(sub).T @ flat, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in sub.model.parameters() if p is not sub.theta)
    torch.testing.assert_close(sub.merge()(x), plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_unit_length_over_all_parameters(kind):
    net = nn.Sequential(nn.Linear(24, 30), nn.Linear(30, 8))
    P, again = (matrix(intrinsic_subspace(copy.deepcopy(net), 20, projection=kind)) for _ in range(2))
    assert torch.equal(P, again)
    norms = P.norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(20).double(), atol=1e-6 if kind != "fastfood" else 0.1, rtol=0)
    cosines = (P / norms).T @ (P / norms) - torch.eye(20)
    assert float(cosines.abs().max()) < 0.2
    if kind == "sparse":
        filled = (P != 0).sum(0).double()
        assert float(filled.min()) >= 1
        assert float(filled.mean()) == pytest.approx(998**0.5, rel=0.1)
        assert all(len(set(P[:, i][P[:, i] != 0].abs().tolist())) == 1 for i in range(20)), "±1 before they are divided"


@pytest.mark.parametrize("name", ["fastfood", "fastfood_full", "fastfood_tall"])
def test_vectors(name):
    case = vectors.load("intrinsic-dimension", name)
    d, total = case.hyperparameters["in_dim"], case.hyperparameters["out_dim"]
    sub = intrinsic_subspace(nn.Linear(total, 1, bias=False).double(), d)
    sub.draws[0] = FastfoodDraws(case["signs"], case["permutation"], case["gaussian"])
    with torch.no_grad():
        sub.theta.copy_(case["theta"])
    out = sub.offsets()["weight"][0]
    case.close(out, "out")
    out.backward(case["grad_out"])
    case.close(sub.theta.grad, "grad_theta")
    case.close(matrix(sub)[: len(case["matrix"])], "matrix")


class Counter:
    """Counts applications of the projection, and of its transpose."""

    def __init__(self, monkeypatch):
        self.forward = self.backward = 0
        plain = projections.fastfood_op

        def counted(*args):
            self.forward += 1
            out = plain(*args)
            if out.requires_grad:
                out.register_hook(self._back)
            return out

        monkeypatch.setattr(projections, "fastfood_op", counted)

    def _back(self, grad):
        self.backward += 1


class Repeated(nn.Module):
    """Computes its hidden layer again in the backward pass."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(8, 12), nn.Linear(12, 3), reentrant

    def forward(self, x):
        body = lambda x: torch.tanh(self.first(x))  # noqa: E731
        hidden = body(x) if self.reentrant is None else checkpoint(body, x, use_reentrant=self.reentrant)
        return self.second(hidden)


@pytest.mark.parametrize("reentrant", [None, False])
def test_one_projection_a_pass(reentrant, monkeypatch):
    torch.manual_seed(0)
    sub = intrinsic_subspace(Repeated(reentrant), 20)
    counter, x = Counter(monkeypatch), torch.randn(5, 8)
    optimizer = torch.optim.Adam([sub.theta], lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        sub(x).square().sum().backward()
        optimizer.step()
        assert (counter.forward, counter.backward) == (step, step)
    torch.manual_seed(0)
    twin = intrinsic_subspace(Repeated(), 20)
    other = torch.optim.Adam([twin.theta], lr=0.1)
    for _ in range(3):
        other.zero_grad()
        twin(x).square().sum().backward()
        other.step()
    assert torch.equal(sub.theta, twin.theta)


def test_parameters_read_outside_a_pass_are_those_of_now():
    sub, x = moved("fastfood"), sample_input(dtype=torch.float64)
    sub(x)
    weight = sub.model.body["first"].weight.detach().clone()
    with torch.no_grad():
        sub.theta.data.mul_(2.0)  # as fused optimizers: the version stays
    want = small_model(dtype=torch.float64).body["first"].weight
    torch.testing.assert_close(sub.model.body["first"].weight - want, 2 * (weight - want))
    with torch.no_grad():
        torch.testing.assert_close(sub.model.body["first"].weight - want, 2 * (weight - want))
    sub(x)
    assert torch.equal(copy.deepcopy(sub)(x), sub(x)), "what is kept of a pass is not copied"
    single = sub.to(torch.float32).model.body["first"].weight  # moved or cast after a pass
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        sub.to(torch.float64).merge().body["first"].weight - want, 2 * (weight - want), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state(kind):
    sub, x = moved(kind, torch.float32), sample_input()
    assert isinstance(sub, SubspaceModel)
    assert (sub.dimension, sub.projection, sub.seed, sub.scales) == (12, kind, 3, None)
    assert [name for name, p in sub.named_parameters() if p.requires_grad] == ["theta"]
    state = sub.state_dict()
    assert set(state) == {"theta", "_extra_state", *(f"model.{name}" for name in small_model().state_dict())}
    fresh = intrinsic_subspace(small_model(), 12, projection=kind, seed=3)
    fresh.load_state_dict(state)
    for twin in (fresh, copy.deepcopy(sub)):
        assert torch.equal(twin(x), sub(x))
    with pytest.raises(CheckpointError, match="the random projection of all parameters is not the one used in training"):
        intrinsic_subspace(small_model(), 12, projection=kind, seed=4).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_projects_in_float32_and_rounds_once(kind):
    sub = moved(kind, torch.bfloat16)
    wide = moved(kind, torch.float32)
    with torch.no_grad():
        wide.theta.copy_(sub.theta)
    base = small_model(dtype=torch.bfloat16).body["first"].weight
    want = (base.float() + wide.offsets()["body.first.weight"]).bfloat16()
    assert torch.equal(sub.to(torch.bfloat16).model.body["first"].weight, want)


def test_autograd_keeps_nothing_for_fastfood():
    sub = intrinsic_subspace(nn.Linear(64, 64), 30)
    assert kept_tensors(sub.offsets, sub.model) == []


def test_tied_weights_move_once_and_buffers_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.norm(self.b(self.a(x)))

    model = Tied()
    sub = intrinsic_subspace(model, 3)
    assert sub.total == 16 + 4 + 4 + 4 + 4
    with torch.no_grad():
        sub.theta.fill_(0.4)
    assert torch.equal(model.a.weight, model.b.weight)
    sub(torch.randn(9, 4))
    assert int(model.norm.num_batches_tracked) == 1


def test_some_parameters_and_one_dimension():
    model = small_model()
    sub = intrinsic_subspace(model, 1, parameters=["first"])
    assert sub.names == ["body.first.weight", "body.first.bias"]
    assert sub.total == 96 + 12
    one = intrinsic_subspace(nn.Linear(1, 1, bias=False), 1, projection="sparse")
    assert one.total == 1
    assert intrinsic_subspace(nn.Linear(3, 2), 8).dimension == 8  # as many as there are


def test_bad_input():
    total = sum(p.numel() for p in small_model().parameters())
    model, sub = small_model(), intrinsic_subspace(small_model(), 12, projection="dense")
    refuses(
        [
            (ValueError, "dimension must be an int >= 1; got 0", lambda: intrinsic_subspace(model, 0)),
            (ValueError, f"dimension must be in [1, {total}]", lambda: intrinsic_subspace(model, total + 1)),
            (
                ValueError,
                "projection must be one of fastfood, dense, sparse",
                lambda: intrinsic_subspace(model, 5, projection="g"),
            ),
            (NoMatchingModuleError, "'frist'", lambda: intrinsic_subspace(model, 5, parameters=["frist"])),
            (ValueError, "no parameter of _Small is selected", lambda: intrinsic_subspace(model, 5, parameters=())),
            (ValueError, "already adapted", lambda: intrinsic_subspace(sub.model, 5)),
            (ValueError, "already adapted", lambda: said(sub.model, 20)),
            (ValueError, "draws for all parameters must have shape", lambda: sub.draws.__setitem__(0, torch.ones(3, 12))),
        ]
    )
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
    sub, x = intrinsic_subspace(model, 30, projection=kind), torch.randn(64, 6)
    y, optimizer = x[:, :1] * 2 + 1, torch.optim.Adam([sub.theta], lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (sub(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
