"""GaLore: the authors' numbers, every error, and the shared case in each of its forms."""

from itertools import pairwise

import formulas
import pytest
import torch
from torch import nn

import vectors
from lowdim.linalg import dynamic_codebook
from lowdim.optim import AdamW16bitRule, GaLore, state_bytes
from lowdim.testing.optimizer_case import OptimizerCase


class TestAdamW(OptimizerCase):
    def make(self, params, **options):
        return GaLore(params, **{"lr": 0.1, "rank": 3, "update_interval": self.update_interval, **options})

    def bases(self, grad):
        return formulas.sided(grad, formulas.shorter(grad), 3)

    def direction(self, g, state, step):
        """`η D`."""
        return formulas.step_size(step, 0.1) * formulas.adam_outside(g, state)

    def update(self, grad, state, step, projected):
        """`g = Lᵀ G R`, and `0.25 η L D Rᵀ`; unprojected `η D`."""
        if not projected:
            return self.direction(grad, state, step)
        if step % 3 == 0:
            state["L"], state["R"] = self.bases(grad)
        L, R = state["L"], state["R"]
        return 0.25 * L @ self.direction(L.mT @ grad @ R, state, step) @ R.mT

    def reference_step(self, weight, grad, state, step, projected):
        """Decay comes after the update."""
        return (1 - 0.1 * self.decay) * (weight - self.update(grad, state, step, projected))


class TestReverse(TestAdamW):
    def bases(self, grad):
        return formulas.sided(grad, "left" if formulas.shorter(grad) == "right" else "right", 3)

    def make(self, params, **options):
        return super().make(params, proj_type="reverse_std", **options)


class TestRight(TestAdamW):
    def bases(self, grad):
        return formulas.sided(grad, "right", 3)

    def make(self, params, **options):
        return super().make(params, proj_type="right", **options)


class TestLeft(TestAdamW):
    def bases(self, grad):
        return formulas.sided(grad, "left", 3)

    def make(self, params, **options):
        return super().make(params, proj_type="left", **options)


class TestFull(TestAdamW):
    def bases(self, grad):
        return formulas.leading(grad, "left", 4), formulas.leading(grad, "right", 4)

    def direction(self, g, state, step):
        return formulas.step_size(step, 0.2) * formulas.adam_outside(g, state)

    def reference_step(self, weight, grad, state, step, projected):
        return (1 - 0.2 * self.decay) * (weight - self.update(grad, state, step, projected))

    def make(self, params, **options):
        return super().make(params, **{"proj_type": "full", "rank": 4, "lr": 0.2, **options})


class TestUncorrected(TestAdamW):
    """Without bias correction η is the learning rate, here with an eps that matters."""

    def direction(self, g, state, step):
        return 0.1 * formulas.adam_outside(g, state, eps=0.01)

    def make(self, params, **options):
        return super().make(params, correct_bias=False, eps=0.01, **options)


class TestRandomized(TestAdamW):
    """The sketch, forced on small matrices; its old basis and its seed must survive a checkpoint."""

    # a sketch of a square matrix is near its singular vectors and no more; compared with them in the tests of linalg
    test_steps_are_those_of_the_formula = None  # type: ignore[assignment]

    def make(self, params, **options):
        return super().make(params, svd="randomized", **options)


class Test8bit(TestAdamW):
    formula = 1e-5  # moments are float32

    def direction(self, g, state, step):
        """Vectors of fewer than 16 entries keep moments in floating point."""
        adam = formulas.adam_in_bytes if g.numel() >= 16 else formulas.adam_inside
        return formulas.step_size(step, 0.1) * adam(g, state, step)

    def make(self, params, **options):
        return super().make(params, inner="adamw8bit", inner_options={"min_size": 16}, **options)


class Test16bit(TestAdamW):
    formula = 1e-2  # the second moment is rounded at random, within its last bit

    def direction(self, g, state, step):
        D = formulas.adam_outside(g, state)
        state["m"] = state["m"].bfloat16().double()
        return formulas.step_size(step, 0.1) * D

    def test_brings_the_loss_down_in_bfloat16(self):
        """Moments are bfloat16 on purpose; what matters is that they still add up."""
        net = self.model(torch.bfloat16)
        optimizer = self.make(self.groups(net))
        losses = self.run(net, optimizer, range(120), torch.bfloat16)
        assert sum(losses[-10:]) < 0.33 * sum(losses[:10]), losses[::10]
        assert optimizer.state[net[0].weight]["exp_avg_sq"].dtype == torch.bfloat16

    def make(self, params, **options):
        return super().make(params, inner="adamw16bit", **options)


class TestAdafactor(TestAdamW):
    def direction(self, g, state, step):
        """`β₂ = 1 − k^-0.8`, `u = g / √(row / mean(row)) / √col`, clipped to a root mean square of 1."""
        kept, q = 1 - (step + 1) ** -0.8, g**2 + 1e-30
        if g.ndim == 1:
            state["v"] = kept * state.get("v", 0) + (1 - kept) * q
            u = g / state["v"].sqrt()
        else:
            state["row"] = kept * state.get("row", 0) + (1 - kept) * q.mean(1)
            state["col"] = kept * state.get("col", 0) + (1 - kept) * q.mean(0)
            u = g / (state["row"] / state["row"].mean()).sqrt()[:, None] / state["col"].sqrt()
        return 0.1 * u / max(1.0, float(u.square().mean().sqrt()))

    def reference_step(self, weight, grad, state, step, projected):
        """Decay comes before the update."""
        return (1 - 0.1 * self.decay) * weight - self.update(grad, state, step, projected)

    def make(self, params, **options):
        return super().make(params, inner="adafactor", **options)


class TestAdafactorWithMomentum(TestAdafactor):
    # its momentum averages updates that already hold their learning rate, so a rate of zero leaves old updates under way
    test_schedulers_work_through_groups = None  # type: ignore[assignment]
    test_layerwise_follows_schedulers_after_loading = None  # type: ignore[assignment]

    def direction(self, g, state, step):
        state["e"] = 0.9 * state.get("e", 0) + 0.1 * super().direction(g, state, step)
        return state["e"]

    def make(self, params, **options):
        return super().make(params, inner_options={"beta1": 0.9}, **options)


class TestAdafactorRelative(TestAdafactor):
    """The step size is `min(0.01, 1 / √k) · max(0.001, rms(W))`, whatever the learning rate."""

    # it ignores the learning rate
    test_zero_rate_changes_nothing = None  # type: ignore[assignment]
    test_schedulers_work_through_groups = None  # type: ignore[assignment]
    test_layerwise_follows_schedulers_after_loading = None  # type: ignore[assignment]
    test_weight_decay_shrinks = None  # type: ignore[assignment]
    # steps of a hundredth of the weights are too small for the few steps of these
    test_brings_the_loss_down = None  # type: ignore[assignment]
    test_brings_the_loss_down_in_bfloat16 = None  # type: ignore[assignment]
    test_closure = None  # type: ignore[assignment]

    def reference_step(self, weight, grad, state, step, projected):
        size = min(0.01, (step + 1) ** -0.5) * max(0.001, float(weight.square().mean().sqrt()))
        update = self.update(grad, state, step, projected) / 0.1 * size
        return (1 - size * self.decay) * weight - update

    def make(self, params, **options):
        how = {"scale_parameter": True, "relative_step": True}
        return super().make(params, inner_options=how, **options)


def follow(case, **options):
    """Run a vector's gradients; the weights (and biases) after each step."""
    hyper = {k: v for k, v in case.hyperparameters.items() if k != "steps"}
    if isinstance(hyper["rank"], list):
        hyper["rank"] = tuple(hyper["rank"])
    p = nn.Parameter(case["weight"].clone())
    groups = [{"params": [p]}]
    q = None
    if "bias" in case:
        q = nn.Parameter(case["bias"].clone())
        groups.append({"params": [q], "rank": None})
    optimizer = GaLore(groups, **{**hyper, **options})
    seen, biases = [], []
    for step, grad in enumerate(case["grads"]):
        p.grad = grad.clone()
        if q is not None:
            q.grad = case["bias_grads"][step].clone()
        optimizer.step()
        seen.append(p.detach().clone())
        if q is not None:
            biases.append(q.detach().clone())
    return optimizer, p, torch.stack(seen), torch.stack(biases) if biases else None


def relative_to_update(got, want, start):
    return max(float((g - w).norm() / (w - start).norm()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["adamw_tall", "adamw_wide", "adamw_reverse_std", "adamw_full"])
def test_vectors_adamw(name, foreach):
    case = vectors.load("galore", name)
    optimizer, p, weights, biases = follow(case, foreach=foreach)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    assert relative_to_update(biases, case["bias_after"], case["bias"]) <= case.tolerance
    state = optimizer.state[p]
    case.close(state["exp_avg_sq"], "exp_avg_sq")
    if "subspace" in case:
        basis = state.get("right_basis", state.get("left_basis"))
        case.close(basis @ basis.mT, "subspace")


def test_vectors_adafactor():
    case = vectors.load("galore", "adafactor")
    optimizer, p, weights, _ = follow(case)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    case.close(optimizer.state[p]["row"], "row")
    case.close(optimizer.state[p]["col"], "col")


def test_vectors_adamw8bit():
    case = vectors.load("galore", "adamw8bit")
    assert torch.equal(dynamic_codebook(True), case["codebook_signed"])
    assert torch.equal(dynamic_codebook(False), case["codebook_unsigned"])
    optimizer, p, weights, _ = follow(case)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= 2e-3
    m, v = optimizer.parts(optimizer.param_groups[0], 2).inner._load(optimizer.state[p])
    # one code of the coarsest cell apart at most, for entries that lie on an edge
    assert float((m - case["exp_avg_dequantized"]).abs().max()) <= 0.02 * float(m.abs().max())
    assert float((v - case["exp_avg_sq_dequantized"]).abs().max()) <= 0.01 * float(v.abs().max())


def test_vectors_tucker_conv():
    case = vectors.load("galore", "tucker_conv")
    optimizer, p, weights, _ = follow(case)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    for mode in range(4):
        factor = optimizer.state[p][f"factor{mode}"]
        case.close(factor @ factor.mT, f"projector_mode{mode}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_tall", "adamw_wide", "adafactor"])
def test_vectors_in_lower_precision(name, dtype):
    """The same trajectory, as far as the weights' dtype can tell it."""
    case = vectors.load("galore", name)
    case.tensors = {k: t.to(dtype) for k, t in case.tensors.items()}
    _, _, weights, _ = follow(case)
    want = case["weights_after"].double()
    rounding = torch.finfo(dtype).eps * float(want.abs().max())
    assert float((weights.double() - want).abs().max()) <= 12 * rounding


def test_bases_have_canonical_signs_and_energy_is_true():
    p = nn.Parameter(torch.zeros(9, 6, dtype=torch.float64))
    optimizer = GaLore([p], rank=2)
    p.grad = torch.randn(9, 6, dtype=torch.float64)
    optimizer.step()
    basis = optimizer.state[p]["right_basis"]
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    share = (p.grad @ basis).square().sum() / p.grad.square().sum()
    assert abs(float(optimizer.state[p]["energy"]) - float(share)) < 1e-6


def test_full_rank_identity_is_plain_adam():
    """rank = min(shape), scale 1 and one basis: Adam in a rotated frame; with rank None exactly the unrotated one."""
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = GaLore([p], lr=0.01, rank=None, inner="adamw8bit", eps=1e-8)  # min_size: small tensors keep float64 moments
    torch_adamw = torch.optim.AdamW([q], lr=0.01, weight_decay=0.0)
    for grad in grads:
        p.grad = q.grad = grad
        ours.step()
        torch_adamw.step()
    assert float((p - q).detach().abs().max()) < 1e-12


def test_correct_bias_off_takes_lr_as_it_is():
    p = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = GaLore([p], lr=0.5, rank=None, correct_bias=False, eps=0.0)
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    # m = 0.1 * 2, v = 0.001 * 4, D = m / sqrt(v)
    assert torch.allclose(p, torch.full_like(p, -0.5 * 0.2 / 0.004**0.5), rtol=1e-12)


def test_state_is_a_small_share_of_adamw():
    """Spec's memory formula: s r q + 2 L r q (plus 8 bytes for energy and overlap), and bytes for the moments in 8 bits."""
    m, n, r = 256, 128, 16
    for inner, want in (("adamw", n * r * 4 + 2 * m * r * 4), ("adamw8bit", n * r * 4 + 2 * (m * r + m * r // 256 * 4))):
        p = nn.Parameter(torch.zeros(m, n))
        p.grad = torch.randn(m, n)
        optimizer = GaLore([p], rank=r, inner=inner)
        optimizer.step()
        assert state_bytes(optimizer) == want + 8


def test_a_second_moment_in_bfloat16_keeps_growing():
    """Rounded to the nearest it would stop at a quarter of what it should reach."""
    rule = AdamW16bitRule()
    low, state, exact = torch.ones(40, 50), {}, 0.0
    rule.init(low, state)
    for step in range(2000):
        rule.direction(low, state, step, 0.1, low)
        exact = 0.999 * exact + 0.001
    assert float(state["exp_avg_sq"].float().mean()) == pytest.approx(exact, rel=0.01)
    assert float(state["exp_avg"].float().mean()) == pytest.approx(1.0, rel=0.02)
    stuck = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(2000):
        stuck = (stuck.float() * 0.999 + 0.001).bfloat16()
    assert float(stuck) < 0.5 * exact


def test_small_low_gradients_keep_float_moments():
    p = nn.Parameter(torch.zeros(64, 64))
    p.grad = torch.randn(64, 64)
    optimizer = GaLore([p], rank=4, inner="adamw8bit")  # 256 entries < 4096
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert "absmax1" not in optimizer.state[p]


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


def test_nan_gradient_at_first_is_an_error():
    for shape in ((8, 6), (4, 3, 2, 2)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = GaLore([p], rank=2)
        p.grad = torch.full(shape, float("nan"))
        with pytest.raises(ValueError, match=r"parameter 0 of group 0.*NaN"):
            optimizer.step()
        assert torch.equal(p, torch.zeros(shape))


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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 7}, "rank.*smaller side.*7"),
        ({"rank": 2.5}, "rank"),
        ({"rank": (2, 2)}, "rank"),
        ({"update_interval": 0}, "update_interval"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"betas": 0.9}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"eps": 1e-8, "inner": "adafactor"}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"scale": float("inf")}, "scale"),
        ({"proj_type": "sdt"}, "proj_type.*nearest: std"),
        ({"inner": "adam"}, "inner.*nearest: adamw"),
        ({"svd": "fast"}, "svd"),
        ({"inner_options": {"min_size": 3}}, "inner_options.*min_size"),
        ({"inner": "adamw8bit", "inner_options": {"min_size": -1}}, "min_size"),
        ({"inner": "adafactor", "inner_options": {"beta1": 1.0}}, "beta1"),
        ({"inner": "adafactor", "inner_options": {"decay_rate": 0.5}}, "decay_rate"),
        ({"inner": "adafactor", "inner_options": {"warmup_init": True}}, "relative_step"),
        ({"accumulate": 2}, "layerwise"),
        ({"accumulate": 0, "layerwise": True}, "accumulate"),
    ],
)
def test_wrong_hyperparameters(options, match):
    with pytest.raises(ValueError, match=match):
        GaLore([nn.Parameter(torch.zeros(8, 6))], **{"rank": 2, **options})


def test_rank_on_vectors_is_refused():
    with pytest.raises(ValueError, match="vectors"):
        GaLore([nn.Parameter(torch.zeros(8))], rank=2)
    optimizer = GaLore([nn.Parameter(torch.zeros(8, 6))], rank=2)
    with pytest.raises(ValueError, match="vectors"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(8))]})
    assert len(optimizer.param_groups) == 1


def test_tucker_ranks_are_checked():
    p = nn.Parameter(torch.zeros(4, 3, 2, 2))
    GaLore([p], rank=100)  # one number is cut to each dimension
    for rank in ((4, 3, 2), (5, 3, 2, 2), (0, 1, 1, 1)):
        with pytest.raises(ValueError, match="rank"):
            GaLore([p], rank=rank)


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


@pytest.mark.parametrize(
    "options", [{}, {"scale_parameter": True}, {"relative_step": True, "warmup_init": True}, {"beta1": 0.9}]
)
def test_adafactor_options_against_a_plain_formula(options):
    """One matrix without projection, float64, two steps with decay: the formula written out."""
    torch.manual_seed(0)
    W = torch.randn(5, 4, dtype=torch.float64)
    p = nn.Parameter(W.clone())
    lr, decay = 0.3, 0.1
    optimizer = GaLore([p], lr=lr, rank=None, inner="adafactor", inner_options=options, weight_decay=decay)
    row, col, e = torch.zeros(5, dtype=W.dtype), torch.zeros(4, dtype=W.dtype), torch.zeros_like(W)
    for k in (1, 2):
        g = torch.randn(5, 4, dtype=torch.float64) * 3
        p.grad = g.clone()
        optimizer.step()
        b2 = 1 - k**-0.8
        row = b2 * row + (1 - b2) * (g * g + 1e-30).mean(-1)
        col = b2 * col + (1 - b2) * (g * g + 1e-30).mean(-2)
        u = g * (row / row.mean()).rsqrt()[:, None] * col.rsqrt()[None]
        u = u / max(1.0, float(u.square().mean().sqrt()))
        a = lr
        if options.get("relative_step"):
            a = min(1e-6 * k, k**-0.5)
        if options.get("scale_parameter"):
            a = a * max(1e-3, float(W.square().mean().sqrt()))
        u = u * a
        if "beta1" in options:
            e = 0.9 * e + 0.1 * u
            u = e
        W = W - a * decay * W - u
        assert float((p - W).detach().abs().max()) < 1e-12


def test_accumulated_projected_gradients_equal_accumulated_gradients():
    """Micro-batches under layerwise: the full gradient is kept only where a subspace is chosen; the result is the same."""
    case = TestAdamW()
    for options in ({}, {"inner": "adafactor"}):
        net, other = case.model(torch.float64), case.model(torch.float64)
        plain = case.make(case.groups(net), **options)
        layered = case.make(case.groups(other), layerwise=True, accumulate=3, **options)
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


def test_half_precision_moments_are_float32():
    p = nn.Parameter(torch.zeros(8, 6, dtype=torch.float16))
    p.grad = torch.randn(8, 6).half()
    optimizer = GaLore([p], rank=2)
    optimizer.step()
    assert optimizer.state[p]["right_basis"].dtype == torch.float16  # products with it run in that, whatever is kept
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
