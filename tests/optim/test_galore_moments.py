"""The rules inside GaLore, Adam and Adafactor: their formulas without a projection, and how their moments are kept."""

import pytest
import torch
from torch import nn

from lowdim.optim import AdamW16bitRule, GaLore, state_bytes


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


def test_half_precision_moments_are_float32():
    p = nn.Parameter(torch.zeros(8, 6, dtype=torch.float16))
    p.grad = torch.randn(8, 6).half()
    optimizer = GaLore([p], rank=2)
    optimizer.step()
    assert optimizer.state[p]["right_basis"].dtype == torch.float16  # products with it run in that, whatever is kept
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
