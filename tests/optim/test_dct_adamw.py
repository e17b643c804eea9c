"""DCT-AdamW: the authors' numbers, what is selected, how moments move, what is carried, every error, and the shared case."""

import formulas
import pytest
import torch
from torch import nn

import vectors
from lowdim.linalg import dct_matrix, stream
from lowdim.optim import (
    AdamWRule,
    DCTAdamW,
    DCTProjector,
    ErrorFeedback,
    Fira,
    Identity,
    NoResidual,
    NormScaledResidual,
    param_groups,
    state_bytes,
)
from lowdim.optim.dct import PickingAdamW
from lowdim.testing.optimizer_case import OptimizerCase
from lowdim.testing.optimizer_problem import OptimizerProblem
from lowdim.testing.sharded_case import Subject, uneven_net

f64 = torch.float64


class TestDCT(OptimizerCase):
    interval, transposed, norm = 3, False, 1

    def make(self, params, **options):
        return DCTAdamW(params, **{"lr": 0.03, "rank": 4, "update_interval": self.update_interval, **options})

    def reference_step(self, weight, grad, state, step, projected):
        """Decay first, then AdamW as torch has it: plain, or in four columns of Q."""
        weight, eta = (1 - 0.03 * self.decay) * weight, formulas.step_size(step, 0.03)
        if not projected:
            return weight - eta * formulas.adam_inside(grad, state, step)
        if grad.shape[0] < grad.shape[1]:  # the left side: of the transposed matrix the right one
            return (weight.mT - eta * self.update(grad.mT, state, step)).mT
        return weight - eta * self.update(grad, state, step)

    def update(self, grad, state, step):
        """`up(D)` of a tall matrix."""
        A = self.accumulated(grad, state)
        i = torch.arange(A.shape[1], dtype=f64)
        Q = (2 / len(i)) ** 0.5 * torch.cos(torch.pi * i[:, None] * (2 * i + 1) / (2 * len(i)))
        Q[0] *= 0.5**0.5
        Q = Q.mT if self.transposed else Q
        if step == 0 or (step + 1) % self.interval == 0:
            new = (A @ Q).norm(p=self.norm, dim=0).topk(4).indices.sort().values
            if step:
                turn = Q[:, state["columns"]].mT @ Q[:, new]  # a one where a column stays
                state["m"], state["v"] = state["m"] @ turn, (state["v"] @ turn).abs()
            state["columns"] = new
        P = Q[:, state["columns"]]
        D = formulas.adam_inside(A @ P, state, step)
        return D @ P.mT + self.rest(A, A @ P, D, P, state)

    def accumulated(self, grad, state):
        """What is projected."""
        return grad

    def rest(self, A, g, D, P, state):
        """What is added to the update."""
        return 0.0


class TestEveryStep(TestDCT):
    interval, transposed, norm = 1, True, 2

    def make(self, params, **options):
        return super().make(params, **{"update_interval": 1, "norm": 2, "basis": "dct2", **options})


class TestErrorFeedback8bit(TestDCT):
    formula = 1e-6  # an entry in the middle between two codes

    def make(self, params, **options):
        return super().make(params, **{"error_feedback": 8, **options})

    def accumulated(self, grad, state):
        return grad + state.get("error", 0)

    def rest(self, A, g, D, P, state):
        """Nothing; what the step does not use waits for the next."""
        error = A - g @ P.mT
        state["error"] = self.kept(error.mT).mT if error.shape == (16, 5) else self.kept(error)  # the wide one: transposed
        return 0.0

    def kept(self, error):
        """Of each row the least value, the step and a byte an entry."""
        least, most = error.min(1, keepdim=True).values, error.max(1, keepdim=True).values
        unit = (most - least) / 255
        return ((error - least) / unit).round() * unit + least


class TestErrorFeedback(TestErrorFeedback8bit):
    test_brings_the_loss_down_in_bfloat16 = None  # type: ignore[assignment]  # the error has the parameter's dtype; see below
    formula = 1e-9

    def make(self, params, **options):
        return super().make(params, error_feedback=True, **options)

    def kept(self, error):
        return error


class TestNormScaled(TestDCT):
    test_update_lies_in_the_subspace = None  # type: ignore[assignment]  # leaving it is the point

    def rest(self, A, g, D, P, state):
        return formulas.norm_scaled(A, g @ P.mT, g, D, state)

    def make(self, params, **options):
        return super().make(params, residual="norm_scaled", **options)


class TestNothingProjected(TestDCT):
    """Every matrix has a side that is too long: AdamW, one parameter at a time."""

    test_update_lies_in_the_subspace = None  # type: ignore[assignment]  # there is none
    test_named_parameters = None  # type: ignore[assignment]  # nothing is chosen, so no gradient is refused

    def reference_step(self, weight, grad, state, step, projected):
        """The first layer has 16 outputs, the others have 16 inputs."""
        return super().reference_step(weight, grad, state, step, projected=False)

    def make(self, params, **options):
        return super().make(params, max_dim=16, error_feedback=True, **options)


def test_error_feedback_in_bfloat16():
    case = TestErrorFeedback()
    net = case.model(torch.bfloat16)
    optimizer = case.make(case.groups(net))
    losses = case.run(net, optimizer, range(120), torch.bfloat16)
    assert sum(losses[-10:]) < 0.33 * sum(losses[:10])
    state = optimizer.state[net[0].weight]
    assert state["ef"].dtype == torch.bfloat16
    assert state["exp_avg"].dtype == torch.float32


def made(**options):
    return lambda net: DCTAdamW(
        param_groups(net, rank=3), **{"lr": 0.02, "update_interval": 2, "weight_decay": 0.01, **options}
    )


SHARDED = {
    "dct": Subject(net=uneven_net, optimizer=made()),
    "dct-l2": Subject(net=uneven_net, optimizer=made(norm=2, basis="dct2", rotate=False, update_interval=1)),
    "dct-feedback": Subject(net=uneven_net, optimizer=made(error_feedback=True)),
    "dct-feedback-8bit": Subject(net=uneven_net, optimizer=made(error_feedback=8)),
    "dct-replicas": Subject(net=uneven_net, optimizer=made(layerwise=True, error_feedback=True), how="replicas"),
    "dct-fira": Subject(net=uneven_net, optimizer=made(residual="norm_scaled")),
}


def follow(case, **options):
    """Run a vector's gradients; weights and indices after each step."""
    hyper = {k: v for k, v in case.hyperparameters.items() if k != "steps"}
    p = nn.Parameter(case["weight"].clone())
    optimizer = DCTAdamW([p], **{**hyper, **options})
    weights, indices = [], []
    for grad in case["grads"]:
        p.grad = grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, grad)  # the authors write the update there
        weights.append(p.detach().clone())
        indices.append(optimizer.state[p]["indices"].long())
    return optimizer, p, torch.stack(weights), torch.stack(indices)


def relative_to_update(got, want, start):
    return max(float((g - w).norm() / (w - start).norm()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("name", vectors.cases("dct"))
def test_vectors(name):
    case = vectors.load("dct", name)
    assert case.tolerance == (1e-6 if "dct2" in name else 1e-9)
    optimizer, p, weights, indices = follow(case)
    assert torch.equal(indices, case["indices"])
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    if "error_feedback" in case:
        case.close(optimizer.state[p]["ef"], "error_feedback")
    basis = optimizer.parts(optimizer.param_groups[0], 2).projector.columns(optimizer.state[p], f64)
    case.close(basis, case["basis"][:, case["indices"][-1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", vectors.cases("dct"))
def test_vectors_in_lower_precision(name, dtype):
    """The same trajectory, as far as the weights' dtype can tell it."""
    case = vectors.load("dct", name)
    case.tensors = {k: t if t.dtype == torch.int64 else t.to(dtype) for k, t in case.tensors.items()}
    _, _, weights, indices = follow(case)
    want = case["weights_after"].double()
    assert torch.equal(indices, case["indices"])
    rounding = torch.finfo(dtype).eps * float(want.abs().max())
    assert float((weights.double() - want).abs().max()) <= 12 * rounding


# What is selected.


def projected(a, **options):
    projector, state = DCTProjector(**options), {}
    projector.prepare(a, state, 0)
    return projector, state


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12), (700, 300), (300, 700)])
def test_the_largest_scores_win(shape, basis, norm):
    """By the definition, for the product and the FFT, and through several chunks."""
    G = torch.randn(shape, generator=stream(0, "dct", *shape), dtype=f64)
    Q = dct_matrix(min(shape), kind=3 if basis == "dct2" else 2)
    tall = shape[0] >= shape[1]
    scores = torch.linalg.vector_norm(G @ Q if tall else Q.T @ G, ord=norm, dim=0 if tall else 1)
    want = torch.topk(scores, 5).indices.sort().values
    projector, state = projected(G, rank=5, basis=basis, norm=norm)
    assert torch.equal(state["indices"].long(), want)
    assert state["indices"].dtype == torch.int32
    low = projector.down(G, state)
    assert low.shape == projector.low_shape(shape)
    assert float((low - (G @ Q[:, want] if tall else Q[:, want].T @ G)).abs().max()) < 1e-12
    up = projector.up(low, state)
    weight = torch.ones(shape, dtype=f64)
    projector.add_up(weight, low, state, alpha=-0.5, beta=0.9)
    assert float((weight - (0.9 - 0.5 * up)).abs().max()) < 1e-12
    if norm == 2:  # the best columns for the squared error: what is lost are the other scores
        assert abs(float((G - up).square().sum()) - float(scores.square().sum() - scores[want].square().sum())) < 1e-9


def test_dct2_is_the_transform_of_rows():
    """Rows that are cosines of frequency 2 and 5 have all their energy in these columns."""
    C = dct_matrix(16)
    G = torch.randn(30, 2, generator=stream(1, "dct"), dtype=f64) @ C[[2, 5]]
    projector, state = projected(G, rank=2, basis="dct2")
    assert state["indices"].tolist() == [2, 5]
    assert float((projector.up(projector.down(G, state), state) - G).abs().max()) < 1e-12


def test_ties_take_the_lower_index():
    """All columns of a zero gradient score the same; and an exact tie on the identity of scores."""
    _, state = projected(torch.zeros(9, 6), rank=3)
    assert state["indices"].tolist() == [0, 1, 2]
    from lowdim.optim.dct import _largest

    assert _largest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_choices_happen_when_the_authors_make_them():
    """At k = 1 and whenever T divides k: the second choice comes after T - 1 more steps."""
    p = nn.Parameter(torch.zeros(20, 12))
    optimizer = DCTAdamW([p], rank=2, update_interval=3)
    chosen = []
    for step in range(8):
        p.grad = torch.randn(20, 12, generator=stream(step, "dct"))
        before = optimizer.state[p].get("indices")
        optimizer.step()
        chosen.append(optimizer.state[p]["indices"] is not before)
    assert chosen == [True, False, True, False, False, True, False, False]


def test_no_svd_is_called(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("an SVD was called")

    for name in ("svd", "svdvals", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    p = nn.Parameter(torch.zeros(20, 12))
    optimizer = DCTAdamW([p], rank=2, error_feedback=True)
    for step in range(3):
        p.grad = torch.randn(20, 12, generator=stream(step, "dct"))
        optimizer.step()


def test_models_with_two_sizes():
    """The authors build one basis, of the first matrix's size."""
    p, q = nn.Parameter(torch.zeros(20, 12)), nn.Parameter(torch.zeros(7, 30))
    optimizer = DCTAdamW([p, q], rank=2)
    p.grad, q.grad = torch.randn(20, 12), torch.randn(7, 30)
    optimizer.step()
    assert optimizer.state[p]["length"] == 12
    assert optimizer.state[q]["length"] == 7


# Moments.


@pytest.mark.parametrize("side", ["right", "left"])
def test_moments_follow_their_columns(side):
    """Q is orthogonal: rotating picks the columns that stay and zeroes the new ones, out of place."""
    projector, state = DCTProjector(rank=4), {}
    s, long = 9, 15
    Q = dct_matrix(s)
    old, new = torch.tensor([0, 3, 5, 8]), torch.tensor([1, 3, 4, 8])
    for index in (old, new):
        low = torch.zeros(long, s, dtype=f64)
        low[:, index] = 1 + torch.arange(4, dtype=f64)
        G = low @ Q.T
        projector.prepare(G if side == "right" else G.T, state, 0 if index is old else 1)
        assert torch.equal(state["indices"].long(), index)
    R, found = projector.rotation(state)
    assert found == side
    assert "rotation" not in state
    assert float((R - Q[:, old].T @ Q[:, new]).abs().max()) < 1e-14
    shape = (long, 4) if side == "right" else (4, long)
    m, v = torch.randn(shape, dtype=f64), torch.rand(shape, dtype=f64)
    ends = []
    for rule in (AdamWRule(), PickingAdamW()):
        moments = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        rule.rotate(moments, R, side)
        ends.append(moments)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ends[0][name], ends[1][name])
    kept = ends[1]["exp_avg"] if side == "right" else ends[1]["exp_avg"].T
    source = m if side == "right" else m.T
    assert torch.equal(kept[:, [1, 3]], source[:, [1, 3]])
    assert not kept[:, [0, 2]].any()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_full_rank_is_torchs_adamw_in_the_cosine_frame(shape):
    """r = s: Adam on the transformed weights; and rank None is torch's AdamW itself."""
    grads = torch.randn(5, *shape, generator=stream(2, "dct"), dtype=f64)
    start = torch.randn(shape, generator=stream(3, "dct"), dtype=f64)
    Q = dct_matrix(6)

    def turn(x, back=False):
        if shape[0] > shape[1]:
            return x @ (Q.T if back else Q)
        return (Q if back else Q.T) @ x

    p, q = nn.Parameter(start.clone()), nn.Parameter(turn(start))
    plain, raw = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = DCTAdamW([{"params": [p]}, {"params": [plain], "rank": None}], rank=6, **options)
    torchs = torch.optim.AdamW([q, raw], **options)
    for G in grads:
        p.grad, q.grad, plain.grad, raw.grad = G, turn(G), G, G
        ours.step(), torchs.step()
    assert float((p - turn(q.detach(), back=True)).detach().abs().max()) < 1e-12
    assert float((plain - raw).detach().abs().max()) < 1e-14


def test_vectors_and_huge_matrices_get_torchs_adamw():
    grads = [torch.randn(n, generator=stream(n, "dct"), dtype=f64) for n in (7, 20 * 4)]
    p, q = nn.Parameter(torch.ones(7, dtype=f64)), nn.Parameter(torch.ones(20, 4, dtype=f64))
    r, s = nn.Parameter(torch.ones(7, dtype=f64)), nn.Parameter(torch.ones(20, 4, dtype=f64))
    for residual in ({}, {"error_feedback": True}, {"residual": "norm_scaled"}):
        ours = DCTAdamW([p, q], lr=0.01, rank=2, max_dim=20, weight_decay=0.1, **residual)
        torchs = torch.optim.AdamW([r, s], lr=0.01, weight_decay=0.1)
        for _ in range(3):
            for x, g in ((p, grads[0]), (r, grads[0]), (q, grads[1]), (s, grads[1])):
                x.grad = g.view_as(x)
            ours.step(), torchs.step()
        assert float((p - r).detach().abs().max()) < 1e-13
        assert float((q - s).detach().abs().max()) < 1e-13
        assert "ef" not in ours.state[q]
        assert "indices" not in ours.state[q]


# What the subspace does not hold.


def test_error_feedback_loses_nothing():
    """What was used and what is carried add up to all gradients so far."""
    for bits, tolerance in ((True, 1e-12), (8, 0.02)):
        p = nn.Parameter(torch.zeros(10, 7, dtype=f64))
        optimizer = DCTAdamW([p], rank=2, error_feedback=bits, update_interval=100)
        projector = optimizer.parts(optimizer.param_groups[0], 2).projector
        used, seen, before = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(10, 2, dtype=f64)
        for step in range(6):
            p.grad = torch.randn(10, 7, generator=stream(step, "ef"), dtype=f64)
            seen += p.grad
            optimizer.step()
            state = optimizer.state[p]
            low, before = (state["exp_avg"] - 0.9 * before) / 0.1, state["exp_avg"].clone()
            used += projector.up(low, state)
            error = state["ef"] if bits is True else state["ef_low"] + state["ef"].double() * state["ef_scale"]
            assert float((used + error - seen).norm() / seen.norm()) < tolerance


def test_bytes_of_the_error_have_255_levels():
    error = torch.randn(12, 300, generator=stream(4, "ef")) * torch.logspace(-3, 3, 12)[:, None]
    error[3] = 0.5
    from lowdim.optim.core.residuals import _to_bytes

    codes, least, step = _to_bytes(error)
    assert codes.dtype == torch.uint8
    assert codes.amin(1)[0] == 0
    assert codes.amax(1)[0] == 255
    back = least + codes * step
    assert bool(((back - error).abs() <= 0.501 * step + 1e-6 * error.abs()).all())
    assert torch.equal(back[3], error[3])
    state = {"ef": codes, "ef_low": least, "ef_scale": step}
    grad = torch.randn(12, 300, generator=stream(5, "ef"))
    kept = grad.clone()
    assert torch.equal(ErrorFeedback(8).before(grad, state), codes.float() * step + least + grad)
    assert torch.equal(grad, kept)


def test_feedback_in_bytes_follows_the_exact_one():
    case = vectors.load("dct", "dct2_feedback")
    _, _, exact, _ = follow(case)
    optimizer, p, bytes_, _ = follow(case, error_feedback=8)
    assert 0 < relative_to_update(bytes_, exact, case["weight"]) < 0.05
    m, n = case["weight"].shape
    state = optimizer.state[p]
    assert sum(state[k].numel() * state[k].element_size() for k in ("ef", "ef_low", "ef_scale")) == m * n + 2 * m * 8


def test_norm_scaled_residual_is_firas():
    """Fira's formula written out, with cosine columns in place of singular vectors and eps inside of the correction."""
    grads = torch.randn(4, 10, 6, generator=stream(6, "dct"), dtype=f64)
    p = nn.Parameter(torch.zeros(10, 6, dtype=f64))
    optimizer = DCTAdamW([p], lr=0.02, rank=2, update_interval=100, residual="norm_scaled", limiter=1.01)
    m = v = torch.zeros(10, 2, dtype=f64)
    W, kept = torch.zeros(10, 6, dtype=f64), None
    for k, G in enumerate(grads, 1):
        p.grad = G
        optimizer.step()
        Q = dct_matrix(6)[:, optimizer.state[p]["indices"].long()]
        g = G @ Q
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        b = (1 - 0.999**k) ** 0.5
        D = m / (v.sqrt() + 1e-8 * b)
        S = (G - g @ Q.T) * (D.norm(dim=1) / (g.norm(dim=1) + 1e-8))[:, None]
        size = S.norm()
        if kept is not None:
            c = max(float(size / (kept + 1e-8)), 1.01) / 1.01
            S, size = S / c, size / c
        kept = size
        W = W - 0.02 * b / (1 - 0.9**k) * (D @ Q.T + S)
        assert float((p - W).detach().abs().max()) < 1e-12
        assert abs(float(optimizer.state[p]["residual_norm"] - kept)) < 1e-10


# State.


def test_state_is_indices_and_moments():
    """Spec's formula: 4 r + 2 L r q; against GaLore s r q less."""
    m, n, r = 64, 32, 8
    p = nn.Parameter(torch.zeros(m, n))
    p.grad = torch.randn(m, n)
    for options, more in (({}, 0), ({"error_feedback": True}, m * n * 4), ({"error_feedback": 8}, m * n + 2 * m * 4)):
        optimizer = DCTAdamW([p], rank=r, **options)
        optimizer.step()
        assert state_bytes(optimizer) == 4 * r + 2 * m * r * 4 + more


def test_layerwise_accumulation_needs_no_residual():
    layered = DCTAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2, layerwise=True, accumulate=2)
    assert layered.accumulate == 2
    for options in ({"error_feedback": True}, {"residual": "norm_scaled"}):
        with pytest.raises(ValueError, match=r"accumulate=2.*full gradient"):
            DCTAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2, layerwise=True, accumulate=2, **options)


def test_parts_are_the_papers():
    optimizer = DCTAdamW([nn.Parameter(torch.zeros(8, 6))], rank=2, basis="dct2", norm=2, update_interval=5)
    group = optimizer.param_groups[0]
    parts = optimizer.parts(group, 2)
    assert parts.projector == DCTProjector(2, 5, "dct2", 2)
    assert parts.projector.scale == 1.0
    assert isinstance(parts.inner, AdamWRule)
    assert (parts.inner.eps_mode, parts.inner.eps, parts.decay, parts.rotate) == ("inside", 1e-8, "before", True)
    assert isinstance(parts.residual, NoResidual)
    assert optimizer.parts({**group, "error_feedback": True}, 2).residual == ErrorFeedback(max_dim=32000)
    assert optimizer.parts({**group, "error_feedback": 8}, 2).residual == ErrorFeedback(8, 32000)
    assert optimizer.parts({**group, "residual": "norm_scaled"}, 2).residual == NormScaledResidual(1.01)
    assert type(optimizer.parts({**group, "rotate": False}, 2).inner) is AdamWRule
    assert isinstance(optimizer.parts(group, 1).projector, Identity)
    assert isinstance(optimizer.parts({**group, "rank": None}, 2).projector, Identity)


def test_a_checkpoint_of_other_feedback_is_refused():
    p = nn.Parameter(torch.zeros(8, 6))
    p.grad = torch.randn(8, 6)
    optimizer = DCTAdamW([p], rank=2, error_feedback=8)
    optimizer.step()
    saved = optimizer.state_dict()
    for options in ({"error_feedback": True}, {"basis": "dct2", "error_feedback": 8}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DCTAdamW([p], rank=2, **options).load_state_dict(saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_keeps_the_columns(bad):
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = DCTAdamW([p], rank=2)
    p.grad = torch.full((8, 6), bad)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*NaN"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(8, 6))
    p.grad = torch.randn(8, 6, generator=stream(7, "dct"))
    optimizer.step()
    before = optimizer.state[p]["indices"].clone()
    p.grad = torch.full((8, 6), bad)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["indices"], before)


def test_learns_as_well_as_fira_with_its_residual():
    """On the shared problem, in the same steps."""
    ends = {}
    for name, cls in (("dct", DCTAdamW), ("fira", Fira)):
        case = OptimizerProblem()
        net = case.model()
        options = {"residual": "norm_scaled"} if cls is DCTAdamW else {}
        optimizer = cls(case.groups(net), lr=0.02, rank=3, update_interval=3, **options)
        ends[name] = sum(case.run(net, optimizer, range(100))[-10:])
    assert ends["dct"] < 3 * ends["fira"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 7}, "rank.*smaller side.*7"),
        ({"rank": (2, 2)}, "rank"),
        ({"update_interval": 0}, "update_interval"),
        ({"basis": "dct4"}, "basis.*nearest: dct"),
        ({"norm": 3}, "norm must be 1 or 2; got 3"),
        ({"norm": True}, "norm"),
        ({"rotate": 1}, "rotate"),
        ({"error_feedback": 4}, r"error_feedback must be False, True or 8 \(bits\); got 4"),
        ({"error_feedback": "on"}, "error_feedback"),
        ({"residual": "fira"}, "residual"),
        ({"residual": "norm_scaled", "error_feedback": True}, "error_feedback.*residual"),
        ({"limiter": 0.5}, "limiter"),
        ({"max_dim": 0}, "max_dim"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"accumulate": 2}, "layerwise"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        DCTAdamW([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_tensors_of_more_dimensions_are_refused():
    with pytest.raises(ValueError, match="more than two dimensions"):
        DCTAdamW([nn.Parameter(torch.zeros(8, 4, 3, 3))], rank=2)
    with pytest.raises(ValueError, match="rank"):
        DCTAdamW([nn.Parameter(torch.zeros(8))], rank=0)
