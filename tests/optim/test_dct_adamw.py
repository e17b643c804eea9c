"""DCT-AdamW's steps: the shared cases by the formula, the authors' numbers, torch's AdamW as a limit, and processes."""

import formulas
import pytest
import torch
from torch import nn
from trajectories import relative_to_update, roundings_apart

import vectors
from lowdim.linalg import dct_matrix, stream
from lowdim.optim import DCTAdamW, Fira, param_groups
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
    assert torch.equal(indices, case["indices"])
    assert roundings_apart(weights, case["weights_after"].double(), dtype) <= 12


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


def test_feedback_in_bytes_follows_the_exact_one():
    case = vectors.load("dct", "dct2_feedback")
    _, _, exact, _ = follow(case)
    optimizer, p, bytes_, _ = follow(case, error_feedback=8)
    assert 0 < relative_to_update(bytes_, exact, case["weight"]) < 0.05
    m, n = case["weight"].shape
    state = optimizer.state[p]
    assert sum(state[k].numel() * state[k].element_size() for k in ("ef", "ef_low", "ef_scale")) == m * n + 2 * m * 8


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
