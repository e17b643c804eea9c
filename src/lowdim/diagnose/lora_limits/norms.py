"""The norms that decide whether LoRA's gradient of an attention head can be computed in almost linear time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.diagnose.lora_limits.inputs import PARTS, Pair, check_head, scale_of
from lowdim.errors import check_float, check_int
from lowdim.results import Result

__all__ = ["LoRALimits", "check_limits", "limits_of_parts", "lora_limits"]


@dataclass(frozen=True)
class LoRALimits(Result):
    """Norms of one head on one input, and what they say.

    Attributes:
        norms: largest absolute entries: `m_frozen` of `X W_mᵀ`, `m_adapter` of `s X A_mᵀ B_mᵀ`, `m` of their sum.
        bound: the larger of q's and k's.
        threshold: `√ln L`.
        ratio: bound over threshold.
        below: `ratio < 1`. A reading: the theory is asymptotic and has no constants, so look at the next three.
        score_bound: `β · max_j ‖Q_j‖ · max_i ‖K_i‖`, no score is larger.
        degree_needed: the smallest degree whose Taylor polynomial gives every `exp(score)` to relative `epsilon`; None above
            `max_degree`.
        feature_rank: features of that degree, `C(h + g, g)`; None without a degree.
        pays: whether `feature_rank · p < L`, so that the linear algorithm does less than the quadratic one.
        largest_at: norm -> row of the input that has it. Of one outlier token it is no property of the weights.
    """

    norms: dict[str, float]
    bound: float
    threshold: float
    ratio: float
    below: bool
    score_bound: float
    degree_needed: int | None
    feature_rank: int | None
    pays: bool
    largest_at: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each norm."""
        return [{"norm": name, "largest": value, "at_row": self.largest_at[name]} for name, value in self.norms.items()]

    @property
    def summary(self) -> str:
        """One line."""
        degree = "more than allowed" if self.degree_needed is None else str(self.degree_needed)
        return (
            f"norm {self.bound:.3g}, {self.ratio:.3g} x √ln L; scores up to {self.score_bound:.3g} need degree {degree}; "
            f"the linear algorithm {'pays' if self.pays else 'does not pay'}"
        )

    def plot(self, *, ax: Any = None) -> Any:
        """The norms as bars, with the threshold as a line; returns the matplotlib axes."""
        axes = self._axes(ax)
        axes.barh(list(self.norms), list(self.norms.values()))
        axes.axvline(self.threshold, linestyle="--")
        axes.set_xlabel("largest absolute entry")
        return axes


@torch.no_grad()
def lora_limits(
    x: Tensor,  # (L, d)
    weights: Mapping[str, Tensor],  # q, k: (h, d); v: (p, d)
    adapters: Mapping[str, Pair],  # A (r, d), B (h or p, r)
    *,
    alpha: float,
    beta: float | None = None,
    epsilon: float = 1e-3,
    max_degree: int = 64,
) -> LoRALimits:
    """Whether LoRA's gradient of one attention head lies on the fast or on the slow side of the threshold, on one input.

    Formula: `bound = max(‖X Ŵ_qᵀ‖_max, ‖X Ŵ_kᵀ‖_max)`, `Ŵ = W + alpha / r · B A`, `ratio = bound / √ln L`. With
    `b = β max ‖Q_j‖ max ‖K_i‖`, `degree_needed` is the smallest g with `exp(b) - Σ_{k<=g} b^k / k! <= epsilon · exp(-b)`.

    Args:
        x: `(L, d)` input of the projections, L >= 2.
        weights: `"q"`, `"k"` `(h, d)` and `"v"` `(p, d)`.
        adapters: any of `"q"`, `"k"`, `"v"` -> `(A (r, d), B)`.
        alpha: scale of the adapters, > 0.
        beta: scale of the scores, > 0; None: `h^(-1/2)`.
        epsilon: allowed relative error of each exponential, in (0, 1).
        max_degree: largest degree looked for, in [1, 1000].

    Raises:
        ValueError: fewer than 2 rows, a missing weight, shapes that do not fit, an unknown name, an option out of range.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import lora_limits
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> limits = lora_limits(0.5 * eye.repeat(50, 1), {"q": eye, "k": eye, "v": eye}, {}, alpha=1.0)
        >>> limits.bound, limits.degree_needed, limits.pays
        (0.5, 3, True)

    Source: Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", arXiv 2406.03136.
    """
    check_limits(epsilon, max_degree)
    x, weights, pairs, beta = check_head(x, weights, adapters, alpha, beta, 2)
    frozen = {name: x @ weights[name].T for name in PARTS}
    added = {}
    for name in PARTS:
        if name in pairs:
            a, b = (factor.detach() for factor in pairs[name])
            added[name] = scale_of(pairs[name], alpha) * (x @ a.T) @ b.T
    return limits_of_parts(frozen, added, beta, epsilon, max_degree)


def check_limits(epsilon: float, max_degree: int) -> None:
    """Raise ValueError unless the options are in range."""
    check_float("epsilon", epsilon, 0.0, 1.0, low_open=True, high_open=True)
    check_int("max_degree", max_degree, 1, 1000)


def limits_of_parts(
    frozen: Mapping[str, Tensor], added: Mapping[str, Tensor], beta: float, epsilon: float, max_degree: int
) -> LoRALimits:
    """The limits from the projections `X W_mᵀ` `(L, h)` and what adapters add to them."""
    norms, places, whole = dict[str, float](), dict[str, int](), dict[str, Tensor]()
    for name in PARTS:
        whole[name] = frozen[name] + added[name] if name in added else frozen[name]
        values = (("_frozen", frozen[name]), ("_adapter", added.get(name)), ("", whole[name]))
        for suffix, value in values:
            rows = None if value is None else value.abs().amax(1)
            norms[name + suffix] = 0.0 if rows is None else float(rows.max())
            places[name + suffix] = 0 if rows is None else int(rows.argmax())
    bound, length = max(norms["q"], norms["k"]), len(whole["q"])
    threshold = math.sqrt(math.log(length))
    scores = beta * float(whole["q"].norm(dim=1).max()) * float(whole["k"].norm(dim=1).max())
    degree = _degree(scores, epsilon, max_degree)
    rank = None if degree is None else math.comb(whole["q"].shape[1] + degree, degree)
    return LoRALimits(
        norms=norms,
        bound=bound,
        threshold=threshold,
        ratio=bound / threshold,
        below=bound < threshold,
        score_bound=scores,
        degree_needed=degree,
        feature_rank=rank,
        pays=rank is not None and rank * whole["v"].shape[1] < length,
        largest_at=places,
    )


def _degree(b: float, epsilon: float, max_degree: int) -> int | None:
    """The smallest degree with `Σ_{k>g} b^k / k! <= epsilon · exp(-b)`, the sum of what the polynomial leaves out."""
    if b == 0.0:
        return 0
    if b > max_degree:  # at a degree below b the first term left out is itself above the bound
        return None
    k = np.arange(int(max_degree + 8 * b) + 60, dtype=np.float64)  # the terms beyond are below 1e-30 of those that count
    logs = k * math.log(b) - np.array([math.lgamma(i + 1) for i in k])
    tails = np.logaddexp.accumulate(logs[::-1])[::-1]  # tails[g + 1] is what degree g leaves out
    enough = np.flatnonzero(tails[1 : max_degree + 2] <= math.log(epsilon) - b)
    return int(enough[0]) if len(enough) else None
