"""Q-GaLore's steps: the authors' numbers, and the formula on floating and on 8-bit weights."""

import formulas
import pytest
import torch
from eight_bit_problem import EIGHT
from torch import nn

import vectors
from lowdim.linalg import stream
from lowdim.optim import Int8Linear, QGaLore
from lowdim.testing.optimizer_case import OptimizerCase


class TestFloatWeights(OptimizerCase):
    """On ordinary parameters, with a 4-bit basis whose groups do not fit the small matrices."""

    bits, group = 4, 256

    def make(self, params, **options):
        return QGaLore(params, **{"lr": 0.1, "rank": 3, "update_interval": self.update_interval, **options})

    def adam(self, g, state, step):
        return formulas.adam_inside(g, state, step)

    def due(self, grad, state, step):
        return step % 3 == 0

    def kept(self, basis, side):
        """What the codes say; a right basis lies transposed, `(rank, n)`, when it is cut into groups."""
        flat = basis.mT if side == "right" else basis
        flat = flat if self.bits is None else formulas.rounded(flat, self.bits, self.group)
        return flat.mT if side == "right" else flat

    def reference_step(self, weight, grad, state, step, projected):
        """GaLore's with P read back from its codes, `η · 0.25 · D Pᵀ` (or `P D`), then the decay."""
        eta, side = formulas.step_size(step, 0.1), formulas.shorter(grad) if projected else None
        if projected and self.due(grad, state, step):
            state["P"] = self.kept(formulas.leading(grad, side, 3), side)
        if side == "right":
            update = 0.25 * self.adam(grad @ state["P"], state, step) @ state["P"].mT
        elif side == "left":
            update = 0.25 * state["P"] @ self.adam(state["P"].mT @ grad, state, step)
        else:
            update = self.adam(grad, state, step)
        return (1 - 0.1 * self.decay) * (weight - eta * update)


class TestFloatBasis(TestFloatWeights):
    bits = None

    def make(self, params, **options):
        return super().make(params, projector_bits=None, **options)


class TestByteMoments(TestFloatWeights):
    bits, group, formula = 6, 4, 1e-5  # moments are float32

    def adam(self, g, state, step):
        """Vectors of fewer than 16 entries keep moments in floating point."""
        return (formulas.adam_in_bytes if g.numel() >= 16 else formulas.adam_inside)(g, state, step)

    def make(self, params, **options):
        return super().make(params, min_8bit_size=16, projector_group_size=4, projector_bits=6, **options)


class TestFloatMoments(TestFloatWeights):
    # a sketch of a square matrix is near its singular vectors and no more; compared with them in the tests of linalg
    test_steps_are_those_of_the_formula = None  # type: ignore[assignment]

    def make(self, params, **options):
        return super().make(params, inner="adamw", svd="randomized", **options)


class TestAlwaysLazy(TestFloatWeights):
    """The interval doubles whenever it may; queue and interval must survive a checkpoint."""

    def due(self, grad, state, step):
        """At multiples of the interval, two steps and one step earlier for the second and third matrix."""
        phase = {(16, 6): 0, (16, 16): 2, (5, 16): 1}[tuple(grad.shape)]
        interval, count = state.get("interval", 3), state.get("count", 0)
        if count and (step + phase) % interval:
            return False
        state["count"], state["interval"] = count + 1, 2 * interval if count else interval
        return True

    def make(self, params, **options):
        return super().make(params, cos_threshold=0.0, queue_size=1, stagger=True, **options)


def test_vectors_lazy():
    case = vectors.load("q-galore", "lazy")
    options = {k: v for k, v in case.hyperparameters.items() if k != "steps"}
    p = nn.Parameter(torch.zeros(10, 8, dtype=torch.float64))
    optimizer = QGaLore([p], projector_bits=None, **options)
    projector = optimizer.parts(optimizer.param_groups[0], 2).projector
    for step, grad in enumerate(case["grads"]):
        p.grad = grad.clone()
        optimizer.step()
        state = optimizer.state[p]
        assert state["interval"] == int(case["intervals"][step])
        assert state["svd_count"] == int(case["svd_counts"][step])
        case.close(projector.up(projector.down(grad, state), state), case["projected"][step])
    assert state["interval"] > options["update_interval"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_lazy_in_lower_precision(dtype):
    """Gradients in half precision, bases in float32: the same decisions."""
    case = vectors.load("q-galore", "lazy")
    options = {k: v for k, v in case.hyperparameters.items() if k != "steps"}
    p = nn.Parameter(torch.zeros(10, 8, dtype=dtype))
    optimizer = QGaLore([p], **options)
    for step, grad in enumerate(case["grads"]):
        p.grad = grad.to(dtype)
        optimizer.step()
        assert optimizer.state[p]["interval"] == int(case["intervals"][step])
        assert optimizer.state[p]["svd_count"] == int(case["svd_counts"][step])


def test_vectors_step():
    case = vectors.load("q-galore", "step")
    options = dict(case.hyperparameters)
    linear = nn.Linear(16, 24, bias=False)
    linear.weight.data.copy_(case["weight"])
    how = {k: options.pop(k) for k in ("group_size", "stochastic_round")}
    layer = Int8Linear.from_linear(linear, **how)
    del options["steps"]
    optimizer = QGaLore([layer.weight], **options)
    for grad, want in zip(case["grads"], case["weights_after"], strict=True):
        layer.weight.float_grad = grad.clone()
        optimizer.step()
        assert layer.weight.float_grad is None
        error = (layer.dense_weight() - want).abs()
        assert bool((error.view(len(layer.scales), -1) <= 1.001 * layer.scales).all())
        assert float((error <= 1e-5).double().mean()) >= 0.99
    assert float((layer(case["x"]) - case["y"]).detach().abs().max()) <= 1e-5


def test_steps_of_8_bit_weights_are_those_of_the_formula():
    """The step of a floating weight, then the nearest of 256 codes of each group of 16."""
    net, case = EIGHT.model(torch.float64, stochastic_round=False), TestFloatWeights()
    case.group = 16
    optimizer = EIGHT.make(net, weight_decay=case.decay)
    layers = [m for m in net if isinstance(m, Int8Linear)]
    want, states = [layer.dense_weight() for layer in layers], [{} for _ in layers]
    start = [weight.clone() for weight in want]
    for step in range(8):
        EIGHT.loss(net, step, torch.float64).backward()
        for i, layer in enumerate(layers):
            weight = case.reference_step(want[i], layer.weight.float_grad.clone(), states[i], step, projected=True)
            want[i] = formulas.rounded(weight, 8, 16)
        optimizer.step()
        optimizer.zero_grad()
        for layer, right in zip(layers, want, strict=True):
            torch.testing.assert_close(layer.dense_weight(), right, rtol=1e-9, atol=1e-12)
    assert all(float((right - old).norm()) > 0.1 for right, old in zip(want, start, strict=True))


def test_unprojected_and_floating_weights_take_the_same_rule():
    """Against torch's AdamW: eps inside of the correction, here with float32 moments."""
    linear = nn.Linear(64, 8).double()
    layer = Int8Linear.from_linear(linear, group_size=64, stochastic_round=False)
    bare, twin = nn.Parameter(layer.dense_weight()), nn.Parameter(layer.dense_weight())
    ours = QGaLore([layer.weight, bare], lr=0.01, rank=None, eps=1e-3)
    torch_adamw = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0, eps=1e-3)
    for step in range(3):
        grad = torch.randn(8, 64, dtype=torch.float64, generator=stream(step, "g"))
        layer.weight.float_grad, bare.grad, twin.grad = grad.clone(), grad.clone(), grad.clone()
        ours.step()
        torch_adamw.step()
    assert float((bare - twin).detach().abs().max()) < 1e-12
    assert float((layer.dense_weight() - twin).detach().abs().max()) < 2.1 * float(layer.scales.max())


def test_weight_decay_comes_after_the_update():
    layer = Int8Linear.from_linear(nn.Linear(64, 64).double(), group_size=64, stochastic_round=False)
    before = layer.dense_weight()
    optimizer = QGaLore([layer.weight], lr=0.1, rank=4, weight_decay=0.5)
    layer.weight.float_grad = torch.zeros(64, 64, dtype=torch.float64)
    optimizer.step()
    assert float((layer.dense_weight() - 0.95 * before).abs().max()) <= 0.51 * float(layer.scales.max())
