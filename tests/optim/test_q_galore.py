"""Q-GaLore: the authors' numbers, the lazy schedule, training of 8-bit weights, and processes that hold the same ones."""

import copy
import dataclasses
import io

import formulas
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vectors
from lowdim.linalg import dequantize_affine, gather, quantize_affine, stream
from lowdim.optim import (
    Int8Linear,
    Int8Parameter,
    QGaLore,
    QuantizedSVDProjector,
    param_groups,
    quantize_linears,
    state_bytes,
)
from lowdim.testing.optimizer_case import OptimizerCase
from lowdim.testing.optimizer_problem import OptimizerProblem
from lowdim.testing.processes import in_processes
from lowdim.testing.sharded_case import Subject


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


# --- vectors ------------------------------------------------------------------------------------------------------------


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


# --- the projector ------------------------------------------------------------------------------------------------------


def test_the_basis_is_packed():
    """Spec's memory formula: s r / 2 bytes and 8 bytes a group, and s numbers for the first vector."""
    for shape, side in (((96, 64), "right"), ((64, 96), "left")):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        optimizer = QGaLore([p], rank=16, min_8bit_size=64)
        optimizer.step()
        state = optimizer.state[p]
        assert state[f"{side}_codes"].shape == (64 * 16 // 2,)
        basis = 64 * 16 // 2 + 8 * 64 * 16 // 256 + 4 * 64
        moments = 2 * (96 * 16 + 4 * 96 * 16 // 256)
        assert state_bytes(optimizer) == basis + moments + 5 * 4 + 2 * 4  # the queue; energy and overlap
        projector = optimizer.parts(optimizer.param_groups[0], 2).projector
        assert projector.nbytes(shape, 16, torch.float32) == basis + 28


@pytest.mark.parametrize(("bits", "worst"), [(2, 0.9), (4, 0.25), (8, 0.02)])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_down_and_up_share_the_rounded_basis(bits, worst, shape):
    """In the layout of the spec: the basis lies (r, n) or (m, r) when it is cut into groups."""
    grad = torch.randn(shape, generator=stream(0, "g"), dtype=torch.float64)
    exact = QuantizedSVDProjector(3, bits=None)
    rough = QuantizedSVDProjector(3, bits=bits, group_size=8)
    one, two = {}, {}
    exact.prepare(grad, one, 0)
    rough.prepare(grad, two, 0)
    (key,) = (k for k in one if k.endswith("_basis"))
    basis = one[key]
    flat = (basis.mT if key.startswith("right") else basis).reshape(-1)
    pieces = [flat[:16], flat[16:]] if len(flat) < 24 else [flat[:24], flat[24:]]
    back = []
    for piece in pieces:
        size = min(8, piece.numel())
        if piece.numel():
            back.append(dequantize_affine(*quantize_affine(piece, group_size=size, bits=bits), group_size=size))
    want = torch.cat(back)
    P = want.view(3, -1).mT if key.startswith("right") else want.view(-1, 3)
    low = rough.down(grad, two)
    assert torch.allclose(low, grad @ P if key.startswith("right") else P.mT @ grad, atol=1e-12)
    up = rough.up(low, two)
    assert torch.allclose(up, low @ P.mT if key.startswith("right") else P @ low, atol=1e-12)
    weight = torch.ones(shape, dtype=torch.float64)
    rough.add_up(weight, low, two, alpha=0.5, beta=2.0)
    assert torch.allclose(weight, 2 + 0.5 * up, atol=1e-12)
    assert 0 < float((P - basis).abs().max()) < worst


def lazy_run(grads, **options):
    p = nn.Parameter(torch.zeros(grads[0].shape, dtype=grads[0].dtype))
    optimizer = QGaLore([p], rank=2, **options)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return optimizer.state[p]


def test_interval_grows_only_while_the_first_vector_is_stable():
    steady = torch.randn(8, 6, generator=stream(0, "steady"))
    noise = [torch.randn(8, 6, generator=stream(k, "noise")) for k in range(40)]
    still = lazy_run([steady + 0.01 * n for n in noise], update_interval=2, queue_size=3)
    wild = lazy_run(noise, update_interval=2, queue_size=3, cos_threshold=0.99)
    assert still["interval"] > 2
    assert still["svd_count"] < 20
    assert (wild["interval"], wild["svd_count"]) == (2, 20)
    assert lazy_run([steady] * 40, update_interval=2, queue_size=3, cos_threshold=1.5)["svd_count"] == 20
    assert lazy_run([steady] * 40, update_interval=2, queue_size=3, gamma=1)["interval"] == 2
    assert lazy_run([steady] * 8, update_interval=2, queue_size=2, gamma=1.6)["interval"] == 4  # int(3 * 1.6) at step 6


def test_the_sign_of_a_vector_does_not_matter():
    """The trap: LAPACK's signs are arbitrary, so a cosine of -1 says that nothing has turned."""
    projector = QuantizedSVDProjector(2, update_interval=1, queue_size=1, bits=None)
    first = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    state: dict = {}
    projector.prepare(first, state, 0)
    state["right_basis"] = -state["right_basis"]
    projector.prepare(first, state, 1)
    assert float(state["queue"][0]) == pytest.approx(1.0)
    assert state["interval"] == 2


def test_a_doubled_interval_may_wait():
    """The modulo is taken with the interval of the moment: 3, doubled at step 6, lets steps 9, 10 and 11 pass."""
    steady = torch.randn(8, 6, generator=stream(0, "steady"))
    counts = [lazy_run([steady] * (n + 1), update_interval=3, queue_size=2)["svd_count"] for n in range(13)]
    # chosen at 0, 3 and 6 (queue full: 6), then at 12
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4]


def test_bad_gradient_at_a_refresh_keeps_basis_and_count():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = QGaLore([p], rank=2, update_interval=2)
    for _ in range(2):
        p.grad = torch.randn(8, 6)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[p])
    p.grad = torch.full((8, 6), float("inf"))
    optimizer.step()
    after = optimizer.state[p]
    assert torch.equal(after["right_codes"], before["right_codes"])
    assert after["svd_count"] == 1
    q = nn.Parameter(torch.zeros(8, 6))
    q.grad = torch.full((8, 6), float("nan"))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*NaN"):
        QGaLore([q], rank=2).step()


# --- 8-bit weights ------------------------------------------------------------------------------------------------------


class Eight(OptimizerProblem):
    """The shared problem on 8-bit layers."""

    def model(self, dtype=torch.float32, **options):
        return quantize_linears(super().model(dtype), None, **{"group_size": 16, **options})

    def make(self, net, **options):
        options = {"lr": 0.1, "update_interval": 3, "projector_group_size": 16, **options}
        return QGaLore(param_groups(net, rank=3), **options)

    def dense(self, net):
        layers = [m for m in net if isinstance(m, Int8Linear)]
        return [m.dense_weight() for m in layers] + [m.bias.detach().clone() for m in layers]


EIGHT = Eight()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"layerwise": True, "max_norm": 0.5}, {"stagger": True}])
def test_learns(dtype, options):
    net = EIGHT.model(dtype)
    losses = EIGHT.run(net, EIGHT.make(net, **options), range(120), dtype)
    assert sum(losses[-10:]) < 0.33 * sum(losses[:10]), losses[::10]
    weights = [p for p in net.parameters() if p.ndim == 2]
    assert len(weights) == 3
    assert all(type(p) is Int8Parameter and p.float_grad is None for p in weights)
    assert all(p.scales.dtype == dtype for p in weights)


def test_rounding_noise_is_fresh_in_every_step_and_for_every_weight():
    """Steps of a tenth of a code: fifty of them move nearly every weight, by five codes on average.

    With the same noise each time a tenth of the weights would move in every step and the others never.
    """
    values = torch.rand(40, 16, generator=stream(0, "values")) - 0.5
    values[:, 0], values[:, 1] = -1.0, 1.0  # they hold the range of their group, and get no gradient
    codes, code = quantize_affine(values, group_size=16), 2 / 255
    pair = [Int8Parameter(*(t.clone() for t in codes), group_size=16) for _ in range(2)]
    optimizer = QGaLore([{"params": pair, "rank": None}], lr=code / 10, inner="adamw")
    for _ in range(50):
        for p in pair:
            p.float_grad = torch.ones(40, 16)
            p.float_grad[:, :2] = 0
        optimizer.step()
    for p in pair:
        moved = dequantize_affine(*codes, group_size=16) - dequantize_affine(p.detach(), p.scales, p.zeros, group_size=16)
        moved = moved[:, 2:] / code
        assert float((moved > 0.5).double().mean()) > 0.95
        assert abs(float(moved.mean()) - 5) < 0.3
    assert not torch.equal(*(p.detach() for p in pair))


def test_same_bits_with_the_same_seed_and_other_bits_with_another():
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(ends))
        net = EIGHT.model()
        EIGHT.run(net, EIGHT.make(net, seed=seed), range(7))
        ends.append(EIGHT.dense(net))
    EIGHT.same(ends[0], ends[1])
    assert not torch.equal(ends[0][0], ends[2][0])


def test_layerwise_gives_the_same_bits():
    """And one gradient lives at a time: each is gone before the next layer's is there."""
    nets = EIGHT.model(torch.float64), EIGHT.model(torch.float64)
    plain, layered = EIGHT.make(nets[0], foreach=False), EIGHT.make(nets[1], layerwise=True, foreach=False)
    alive: list = []
    weights = [m.weight for m in nets[1] if isinstance(m, Int8Linear)]
    for weight in weights:
        weight.anchor.register_post_accumulate_grad_hook(lambda _: alive.append(sum(w.float_grad is not None for w in weights)))
    EIGHT.run(nets[0], plain, range(7), torch.float64)
    EIGHT.run(nets[1], layered, range(7), torch.float64)
    EIGHT.same(EIGHT.dense(nets[0]), EIGHT.dense(nets[1]))
    assert set(alive) == {0}
    layered.remove_hooks()
    EIGHT.loss(nets[1], 0, torch.float64).backward()
    assert all(w.float_grad is not None for w in weights)


def test_micro_batches():
    """Two half batches are one batch: in `float_grad`, and projected where layerwise."""
    ends = []
    for options in ({}, {"layerwise": True, "accumulate": 2}):
        net = EIGHT.model(torch.float64, stochastic_round=False)
        optimizer = EIGHT.make(net, **options)
        for step in range(5):
            for micro in range(2):
                (EIGHT.loss(net, 2 * step + micro, torch.float64) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(EIGHT.dense(net))
    EIGHT.close(ends[0], ends[1], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"cos_threshold": 0.0, "queue_size": 2, "min_8bit_size": 16, "stagger": True}])
def test_exact_resume(dtype, options):
    """Through a file, in the middle of an interval and of the queue, with the rounding noise going on where it was."""
    net = EIGHT.model(dtype)
    optimizer = EIGHT.make(net, **options)
    EIGHT.run(net, optimizer, range(8), dtype)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    EIGHT.run(net, optimizer, range(8, 20), dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = EIGHT.model(dtype)
    other.load_state_dict(saved["net"])
    again = EIGHT.make(other, **options)
    again.load_state_dict(saved["optimizer"])
    EIGHT.run(other, again, range(8, 20), dtype)
    EIGHT.same(list(net.state_dict().values()), list(other.state_dict().values()))
    for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(isinstance(v, (torch.Tensor, int, float)) for v in a.values())
        assert all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_deepcopy():
    net = EIGHT.model()
    optimizer = EIGHT.make(net, layerwise=True)
    EIGHT.run(net, optimizer, range(2))
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    EIGHT.run(net, optimizer, range(2, 6))
    EIGHT.run(net2, optimizer2, range(2, 6))
    EIGHT.same(EIGHT.dense(net), EIGHT.dense(net2))


def test_small_updates_survive_stochastic_rounding_only():
    """Steps of a twentieth of a code: nearest rounding drops all of them, stochastic rounding none on average."""
    moved = {}
    for stochastic in (True, False):
        linear = nn.Linear(256, 64, bias=False)
        linear.weight.data.copy_(torch.randn(64, 256, generator=stream(0, "w")))
        layer = Int8Linear.from_linear(linear, stochastic_round=stochastic)
        start = layer.dense_weight()
        code = float(layer.scales.mean())
        optimizer = QGaLore([{"params": [layer.weight], "rank": None}], lr=code / 20)
        direction = torch.ones(64, 256)
        for _ in range(20):
            layer.weight.float_grad = direction.clone()
            optimizer.step()
        moved[stochastic] = float((start - layer.dense_weight()).mean()) / code
    assert moved[True] == pytest.approx(1.0, abs=0.1)
    assert abs(moved[False]) < 0.3


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


def test_gradients_are_used_once():
    net = EIGHT.model()
    optimizer = EIGHT.make(net)
    EIGHT.loss(net, 0).backward()
    optimizer.zero_grad()
    assert all(p.float_grad is None for p in net.parameters() if isinstance(p, Int8Parameter))
    before = EIGHT.dense(net)
    optimizer.step()
    EIGHT.same(before, EIGHT.dense(net))


def test_clipping_sees_8bit_weights():
    net = EIGHT.model()
    optimizer = EIGHT.make(net, max_norm=1e-3)
    EIGHT.run(net, optimizer, range(1))
    assert optimizer.log()["projected_norm"] > 1e-3
    lows = sum(float(s["exp_avg"].square().sum()) for s in optimizer.state.values()) ** 0.5
    assert lows == pytest.approx(0.1 * 1e-3, rel=0.01)


# --- which layers, which errors ---------------------------------------------------------------------------------------------


def test_param_groups_take_8bit_weights():
    net = EIGHT.model()
    groups = param_groups(net, rank=3)
    assert [len(g["params"]) for g in groups] == [3, 3]
    assert groups[0]["rank"] == 3
    assert [g["rank"] for g in param_groups(net, rank=5)] == [5, None]  # the last matrix has five rows
    net[0].requires_grad_(False)
    assert [len(g["params"]) for g in param_groups(net, rank=3)] == [2, 2]


def test_prepare_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(16, 64)
            self.attention = nn.MultiheadAttention(64, 2)
            self.q, self.odd, self.tiny, self.prime = nn.Linear(64, 64), nn.Linear(60, 33), nn.Linear(64, 4), nn.Linear(257, 35)
            self.lm_head = nn.Linear(64, 16)

    net = QGaLore.prepare_model(Net(), rank=8, scale=0.5)
    assert isinstance(net.q, Int8Linear)
    assert net.q.weight.group_size == 256
    assert net.odd.weight.group_size == 60  # the largest divisor of its inputs
    for name in ("tiny", "prime", "lm_head"):
        assert type(net.get_submodule(name)) is nn.Linear, name
    assert net.attention.out_proj.weight.dtype == torch.float32  # attention reads it and never calls the layer
    rows = {name: group for name, _, group in param_groups(net, rank=8).rows}
    assert rows["q.weight"] == rows["odd.weight"] == rows["prime.weight"] == "rank 8"
    assert rows["tiny.weight"].startswith("smaller side")
    net = QGaLore.prepare_model(Net(), rank=8, target_modules=["q"], stochastic_round=False)
    assert not net.q.weight.stochastic_round
    assert type(net.odd) is nn.Linear


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 7}, "rank.*smaller side.*7"),
        ({"rank": (2, 2)}, "rank"),
        ({"update_interval": 0}, "update_interval"),
        ({"lr": -1.0}, "lr"),
        ({"scale": float("nan")}, "scale"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"eps": None}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"projector_bits": 9}, "projector_bits"),
        ({"projector_bits": 0}, "projector_bits"),
        ({"projector_group_size": 0}, "projector_group_size"),
        ({"cos_threshold": float("nan")}, "cos_threshold"),
        ({"gamma": 0.5}, "gamma.*0.5"),
        ({"queue_size": 0}, "queue_size"),
        ({"inner": "adafactor"}, "inner.*nearest"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
        ({"svd": "fast"}, "svd"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        QGaLore([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_wrong_parameters():
    with pytest.raises(ValueError, match="vectors"):
        QGaLore([nn.Parameter(torch.zeros(8))], rank=2)
    with pytest.raises(ValueError, match=r"matrices; got shape \(4, 3, 2, 2\)"):
        QGaLore([nn.Parameter(torch.zeros(4, 3, 2, 2))], rank=2)
    with pytest.raises(TypeError, match="Int8Parameter"):
        QGaLore([nn.Parameter(torch.zeros(8, 6, dtype=torch.uint8), requires_grad=False)], rank=2)


# --- forecasts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layerwise", [False, True])
def test_runs_on_fake_tensors(layerwise):
    net = EIGHT.model()
    optimizer = EIGHT.make(net)
    EIGHT.run(net, optimizer, range(1))
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))
        forecast = EIGHT.make(quantize_linears(fake, None, group_size=16), layerwise=layerwise)
        for _ in range(4):
            fake(torch.zeros(3, 6)).sum().backward()
            forecast.step()
            forecast.zero_grad()
    assert state_bytes(forecast) == state_bytes(optimizer)
    EIGHT.run(net, optimizer, range(1, 5))


@pytest.mark.slow
def test_seven_billion_weights_in_16_gigabytes():
    """The paper's claim as a forecast: LLaMA-7B in bfloat16, its rank, layerwise, short sequences, checkpointing."""
    transformers = pytest.importorskip("transformers")
    from lowdim.catalogue import variant
    from lowdim.plan import forecast

    chosen = dataclasses.replace(variant("q-galore"), options={"rank": 1024, "update_interval": 200})
    how = {"task": "causal-lm", "dtype": torch.bfloat16, "batch_size": 1, "sequence_length": 256}
    got = forecast(transformers.LlamaConfig(), chosen, layerwise=True, gradient_checkpointing=True, **how)
    assert got.weights < 6.7 * 2**30  # 1.016 byte a weight, and the embeddings in bfloat16
    assert got.gradients < 0.3 * 2**30
    assert got.total < 16e9


# --- several processes --------------------------------------------------------------------------------------------------------

REPLICAS = {
    "nearest": {"stochastic": False},
    "stochastic": {},
    "clipped": {"max_norm": 0.3},
    "staggered": {"stagger": True},
    "layerwise": {"layerwise": True},
    "layerwise, micro-batches": {"layerwise": True, "accumulate": 2},
}


def small_net(stochastic=True):
    """Sides that 16 divides, in float64, down to the scales."""
    net = nn.Sequential(
        nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    draw = stream(0, "replicas", "net")
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return quantize_linears(net, ["0", "2", "4"], group_size=16, stochastic_round=stochastic)


def train(rank, world, *, stochastic=True, wrap=None, **options):
    """Ten steps, each process on its share of every batch; the dense weights as numbers."""
    net = small_net(stochastic)
    layerwise, micro = options.get("layerwise", False), options.get("accumulate", 1)
    if world > 1 and layerwise:
        options["replicas"] = True
    model = net
    if wrap is not None:
        model = wrap(net)
    elif world > 1 and not layerwise:
        model = nn.parallel.DistributedDataParallel(net)
    optimizer = QGaLore(
        param_groups(net, rank=4), lr=0.02, update_interval=4, projector_group_size=16, weight_decay=0.01, **options
    )
    for step in range(10):
        for part in range(micro):
            x = torch.randn(8, 16, generator=stream(0, "replicas", step, part), dtype=torch.float64)
            mine = x.chunk(world)[rank]
            ((model(mine) - mine[:, :3]).square().mean() / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: gather(value).double().numpy() for name, value in net.state_dict().items() if name != "step"}


def replicas(rank, world):
    return {name: train(rank, world, **options) for name, options in REPLICAS.items()}


def agrees(got, want):
    for name, value in want.items():
        if name.endswith(("weight", "zeros")) and f"{name.rsplit('.', 1)[0]}.scales" in want:
            assert (got[name] == value).all(), f"{name}: other codes"
        else:
            assert abs(got[name] - value).max() <= 1e-10 * abs(value).max(), name


@pytest.mark.slow
def test_two_replicas_equal_one_process():
    """DDP for what is floating, our own averages for the rest: the same codes, with nearest and with stochastic rounding."""
    found = in_processes(replicas)
    for name, options in REPLICAS.items():
        agrees(found[name], train(0, 1, **options))


def int8_weights(net):
    return {p for p in net.parameters() if isinstance(p, Int8Parameter)}


def sharded(rank, world):
    """FSDP2 with the 8-bit weights passed over; and what it says where they are not."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (world,))

    def wrap(net):
        for child in net:
            if isinstance(child, nn.Linear):
                fully_shard(child, mesh=mesh)
        return fully_shard(net, mesh=mesh, ignored_params=int8_weights(net))

    numbers = train(rank, world, wrap=wrap)
    said = []
    net = fully_shard(small_net(), mesh=mesh)
    for attempt in (lambda: net(torch.zeros(2, 16, dtype=torch.float64)), lambda: QGaLore(list(net.parameters()), rank=None)):
        try:
            attempt()
        except TypeError as error:
            said.append(str(error))
    return numbers, said


@pytest.mark.slow
def test_fsdp2_with_8bit_weights_passed_over():
    numbers, said = in_processes(sharded)
    agrees(numbers, train(0, 1))
    assert len(said) == 2
    assert all("ignored_params" in text for text in said)


def floating_net():
    net = nn.Sequential(nn.Linear(7, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 9)).double()
    draw = stream(0, "q-galore", "net")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return net


def on_shards(net):
    return QGaLore(param_groups(net, rank=3), lr=0.05, update_interval=2, cos_threshold=0.0, queue_size=2, weight_decay=0.01)


SHARDED = {"q-galore": Subject(floating_net, on_shards)}


def test_defaults_are_those_of_the_papers_code():
    group = QGaLore([torch.nn.Parameter(torch.zeros(8, 6))], rank=2).param_groups[0]
    wanted = {
        "cos_threshold": 0.4,
        "gamma": 2,
        "queue_size": 5,
        "projector_bits": 4,
        "projector_group_size": 256,
        "scale": 0.25,
    }
    assert {name: group[name] for name in wanted} == wanted
