"""LoRA's gradient of one attention head, exactly (quadratic in the length) and from chained low-rank factors (linear)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowdim.diagnose.lora_limits.inputs import Pair, check_head, scale_of
from lowdim.errors import check_choice, check_int
from lowdim.linalg import exp_features
from lowdim.results import Result

__all__ = ["AttentionGradient", "lora_attention_gradient"]


@dataclass(frozen=True)
class AttentionGradient(Result):
    """Output, loss and the adapters' gradients.

    Attributes:
        output: `(L, p)`.
        loss: `½ ‖output - target‖²`, a number.
        grads: adapter (`"q"`, `"k"`, `"v"`) -> `(dA, dB)`.
        feature_rank: rank of the factors of the attention matrix; L for the exact method.
        multiply_adds: multiplications in the matrix products that were done.
    """

    left_out: ClassVar[tuple[str, ...]] = ("output",)

    output: Tensor = field(repr=False)
    loss: Tensor
    grads: dict[str, tuple[Tensor, Tensor]] = field(repr=False)
    feature_rank: int
    multiply_adds: int

    def rows(self) -> list[dict[str, Any]]:
        """A row for each adapter: the norms of its gradients."""
        return [{"adapter": m, "dA_norm": float(a.norm()), "dB_norm": float(b.norm())} for m, (a, b) in self.grads.items()]


class _Products:
    """Matrix products, and how many multiplications they took."""

    count = 0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return a @ b


@torch.no_grad()
def lora_attention_gradient(
    x: Tensor,  # (L, d)
    weights: Mapping[str, Tensor],  # q, k: (h, d); v: (p, d)
    adapters: Mapping[str, Pair],  # A (r, d), B (h or p, r)
    target: Tensor,  # (L, p)
    *,
    alpha: float,
    beta: float | None = None,
    method: Literal["exact", "chained"] = "chained",
    degree: int = 4,
) -> AttentionGradient:
    """The gradient of `½ ‖softmax(β Q Kᵀ) V - Y‖²` in the LoRA factors of one head.

    Formula: `Q = X (W_q + s B_q A_q)ᵀ`, K and V alike, `s = alpha / r`; with `F` the attention matrix and `G = F V - Y`:
    `dS = F ∘ (G Vᵀ) - diag(ρ) F`, `ρ = rowsum(F ∘ G Vᵀ)`, `dQ = β dS K`, `dK = β dSᵀ Q`, `dV = Fᵀ G`, and for each adapter
    `dB = s dMᵀ (X Aᵀ)`, `dA = s (Bᵀ dMᵀ) X`. `chained` takes `F ≈ U Tᵀ` from `exp_features` of degree g and never builds a
    matrix of size L x L.

    Args:
        x: `(L, d)` input of the projections.
        weights: `"q"`, `"k"` `(h, d)` and `"v"` `(p, d)`.
        adapters: any of `"q"`, `"k"`, `"v"` -> `(A, B)`.
        target: `(L, p)`.
        alpha: scale of the adapters, > 0; each has `s = alpha / r`.
        beta: scale of the scores, > 0; None: `h^(-1/2)`.
        method: `"exact"`, in time and memory `L²`; or `"chained"`, in `L · C(h + g, g) · p · h`.
        degree: g, >= 1; even ones keep all rows positive. From 6 on it computes in float64.

    Raises:
        ValueError: a missing weight, shapes that do not fit, an unknown name or method, an option out of range, more than
            200,000 features. ArithmeticError: a row whose polynomial weights have no positive sum (the row is named).

    Example:
        >>> import torch
        >>> from lowdim.diagnose import lora_attention_gradient
        >>> g = torch.Generator().manual_seed(0)
        >>> draw = lambda *shape: 0.3 * torch.randn(*shape, generator=g, dtype=torch.float64)
        >>> head, adapters = {m: draw(3, 6) for m in "qkv"}, {"q": (draw(2, 6), draw(3, 2))}
        >>> given = draw(20, 6), head, adapters, draw(20, 3)
        >>> exact, fast = (lora_attention_gradient(*given, alpha=2, method=m) for m in ("exact", "chained"))
        >>> bool((exact.grads["q"][1] - fast.grads["q"][1]).norm() < 1e-5 * exact.grads["q"][1].norm())
        True

    A measurement, not an optimiser: heads of ordinary width have far too many features (`lora_limits` says whether it pays).

    Source: Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", arXiv 2406.03136.
    """
    check_choice("method", method, ("exact", "chained"))
    check_int("degree", degree, 1)
    x, weights, pairs, beta = check_head(x, weights, adapters, alpha, beta, 1)
    if target.shape != (len(x), len(weights["v"])):
        raise ValueError(f"target must be {(len(x), len(weights['v']))}; got {tuple(target.shape)}")
    dtype = torch.float64 if method == "chained" and degree >= 6 else torch.promote_types(x.dtype, target.dtype)
    x, target = x.to(dtype), target.detach().to(dtype)
    pairs = {name: (a.detach().to(dtype), b.detach().to(dtype)) for name, (a, b) in pairs.items()}
    mul = _Products()
    parts = {}
    for name, weight in weights.items():
        parts[name] = mul(x, weight.to(dtype).T)
        if name in pairs:
            a, b = pairs[name]
            parts[name] = parts[name] + scale_of(pairs[name], alpha) * mul(mul(x, a.T), b.T)
    run = _exact if method == "exact" else _chained
    output, gradients, rank = run(mul, parts["q"], parts["k"], parts["v"], target, beta, degree)
    grads = {}
    for name, (a, b) in pairs.items():
        s, upstream = scale_of((a, b), alpha), gradients[name]
        grads[name] = (s * mul(mul(upstream, b).T, x), s * mul(upstream.T, mul(x, a.T)))
    return AttentionGradient(output, (output - target).square().sum() / 2, grads, rank, mul.count)


def _exact(
    mul: _Products, q: Tensor, k: Tensor, v: Tensor, target: Tensor, beta: float, degree: int
) -> tuple[Tensor, dict[str, Tensor], int]:
    f = torch.softmax(beta * mul(q, k.T), dim=1)
    output = mul(f, v)
    g = output - target
    weighted = f * mul(g, v.T)
    ds = weighted - weighted.sum(1, keepdim=True) * f
    return output, {"q": beta * mul(ds, k), "k": beta * mul(ds.T, q), "v": mul(f.T, g)}, len(q)


def _chained(
    mul: _Products, q: Tensor, k: Tensor, v: Tensor, target: Tensor, beta: float, degree: int
) -> tuple[Tensor, dict[str, Tensor], int]:
    u, t = exp_features(beta**0.5 * q, degree), exp_features(beta**0.5 * k, degree)
    sums = mul(u, t.sum(0, keepdim=True).T)
    if not bool((sums > 0).all()):
        row = int((sums <= 0).nonzero()[0, 0])
        raise ArithmeticError(f"row {row}: the polynomial's weights sum to {float(sums[row]):.3g}; use an even degree")
    u = u / sums
    output = mul(u, mul(t.T, v))
    g = output - target
    rho = (output * g).sum(1, keepdim=True)
    ug, tv = _rowwise(u, g), _rowwise(t, v)
    dq = mul(ug, mul(tv.T, k)) - rho * mul(u, mul(t.T, k))
    dk = mul(tv, mul(ug.T, q)) - mul(t, mul(u.T, rho * q))
    return output, {"q": beta * dq, "k": beta * dk, "v": mul(t, mul(u.T, g))}, u.shape[1]


def _rowwise(a: Tensor, b: Tensor) -> Tensor:
    """The row-wise Kronecker product `(L, m · p)`."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)
