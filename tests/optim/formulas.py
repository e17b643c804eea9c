"""Formulas that the reference steps of several optimizers share, in plain torch: nothing here comes from lowdim."""

import torch


def leading(grad, side, rank):
    """The leading singular vectors of one side; of each the entry of largest magnitude is positive."""
    U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
    vectors = (Vh.mT if side == "right" else U)[:, :rank]
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def sided(grad, side, rank):
    """`(L, R)` with `g = Lᵀ G R`: singular vectors on the side that is projected, the identity on the other."""
    eye = [torch.eye(size, dtype=grad.dtype) for size in grad.shape]
    return (eye[0], leading(grad, "right", rank)) if side == "right" else (leading(grad, "left", rank), eye[1])


def shorter(grad):
    """The side that GaLore projects by default: right where m >= n."""
    return "right" if grad.shape[0] >= grad.shape[1] else "left"


def moments(grad, state):
    """Adam's `m ← 0.9 m + 0.1 g` and `v ← 0.999 v + 0.001 g²`."""
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    return state["m"], state["v"]


def step_size(step, lr):
    """`lr √(1 − 0.999ᵏ) / (1 − 0.9ᵏ)`, k = step + 1."""
    return lr * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))


def adam_outside(grad, state, eps=1e-6):
    """`m / (√v + eps)`, as in the older transformers."""
    m, v = moments(grad, state)
    return m / (v.sqrt() + eps)


def adam_inside(grad, state, step, eps=1e-8):
    """`m / (√v + eps √(1 − 0.999ᵏ))`, as in torch."""
    m, v = moments(grad, state)
    return m / (v.sqrt() + eps * (1 - 0.999 ** (step + 1)) ** 0.5)


def codebook(signed):
    """0, 1, and for i = 0 … 6 the midpoints of 2ⁱ cells (with both signs), or of 2ⁱ⁺¹, of [0.1, 1], times 10ⁱ⁻⁶."""
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        for cell in range(count):
            middle = (0.1 + 0.9 * (cell + 0.5) / count) * 10.0 ** (i - 6)
            values += [middle, -middle] if signed else [middle]
    assert len(values) == 256
    return torch.tensor(values, dtype=torch.float64)


def as_bytes(x, signed):
    """What is left of a tensor of at most 256 entries: its largest magnitude times the nearest code of each entry."""
    book, largest = codebook(signed), x.abs().max()
    return largest * book[(x[..., None] / largest - book).abs().argmin(-1)]


def adam_in_bytes(grad, state, step):
    """`adam_inside`, and between the steps bytes are kept of both moments."""
    D = adam_inside(grad, state, step)
    state["m"], state["v"] = as_bytes(state["m"], True), as_bytes(state["v"], False)
    return D


def rounded(x, bits, group):
    """Group by group of the flattened tensor (the last may be shorter): `(q − zero) scale` with the nearest q of 2ᵇ."""
    top, pieces = 2**bits - 1, []
    for w in x.reshape(-1).split(group):
        low, high = w.min().clamp(max=0), w.max().clamp(min=0)
        scale = (high - low).clamp(min=1e-5) / top
        zero = (-(low / scale).round()).clamp(0, top)
        pieces.append((((w / scale).round() + zero).clamp(0, top) - zero) * scale)
    return torch.cat(pieces).view(x.shape)


def norm_scaled(G, inside, g, D, state, limiter=1.01):
    """Fira's rest of the gradient: `S = φ ⊙ (G − inside)`, φ by row of D or by column where D is wide, limited in growth."""
    dim = 0 if D.shape[0] < D.shape[1] else 1
    S = D.norm(dim=dim, keepdim=True) / (g.norm(dim=dim, keepdim=True) + 1e-8) * (G - inside)
    if limiter is not None:
        if "norm" in state:
            S = S / (max(S.norm() / (state["norm"] + 1e-8), limiter) / limiter)
        state["norm"] = S.norm()
    return S
