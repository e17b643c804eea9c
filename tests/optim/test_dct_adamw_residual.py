"""What the columns of DCT-AdamW do not hold: carried to the next step, in bytes, or scaled as Fira does."""

import torch
from torch import nn

from lowdim.linalg import dct_matrix, stream
from lowdim.optim import DCTAdamW, ErrorFeedback

f64 = torch.float64


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
