"""Bounds of probabilities from counts, and certified radii from them."""

from __future__ import annotations

import math
from operator import index
from typing import Any

import torch

from lowdim.errors import MissingExtraError, check_choice, check_float, check_int

__all__ = [
    "ABSTAIN",
    "RULES",
    "clopper_pearson_lower",
    "dual_radius",
    "dual_smoothing_radius",
    "smallest_n",
    "smoothing_radius",
]

#: The prediction where nothing is certified.
ABSTAIN = -1
RULES = ("sound", "official")


def clopper_pearson_lower(successes: int, n: int, alpha: float) -> float:
    """Lower bound of a probability that holds with probability `1 - alpha`: `Beta⁻¹(alpha; s, n - s + 1)`, 0 for `s = 0`.

    Raises:
        ValueError: n < 1, successes outside 0 to n, alpha outside (0, 1). MissingExtraError: scipy is not installed.

    Example:
        >>> from lowdim.represent import clopper_pearson_lower
        >>> round(clopper_pearson_lower(10, 10, 0.001), 4), clopper_pearson_lower(0, 10, 0.001)
        (0.5012, 0.0)

    Source: Clopper, Pearson, Biometrika 26, 1934.
    """
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise MissingExtraError("scipy", "science", "clopper_pearson_lower") from error
    n, successes = _whole(n), _whole(successes)
    check_int("n", n, 1)
    check_int("successes", successes, 0, n)
    check_float("alpha", alpha, 0.0, 1.0, low_open=True, high_open=True)
    return float(betaincinv(successes, n - successes + 1, alpha)) if successes else 0.0


def smoothing_radius(count: int, n: int, alpha: float, sigma: float) -> float:
    """Cohen's radius `σ Φ⁻¹(p)`, `p` the lower bound of `count` of n samples; 0 where `p < 1/2`: abstain.

    Args:
        count: samples in which the class came out.
        alpha: probability that the radius is wrong.
        sigma: standard deviation of the noise.

    Raises:
        ValueError: as clopper_pearson_lower; sigma <= 0.

    Example:
        >>> from lowdim.represent import smoothing_radius
        >>> round(smoothing_radius(990, 1000, 0.001, 0.25), 4), smoothing_radius(400, 1000, 0.001, 0.25)
        (0.4945, 0.0)

    Source: Cohen, Rosenfeld, Kolter, ICML 2019, arXiv 1902.02918.
    """
    check_float("sigma", sigma, 0.0, low_open=True)
    return max(0.0, sigma * _quantile(clopper_pearson_lower(count, n, alpha)))


def dual_radius(p_left: float, p_right: float, sigma: float) -> float:
    """The theorem's radius `(σ/√2)(Φ⁻¹(p_left) + Φ⁻¹(p_right))`, 0 if negative.

    The terms are signed: one branch may be below 1/2 as long as the sum is positive.

    Args:
        p_left, p_right: lower bounds of the class's probability in each branch, in [0, 1].

    Raises:
        ValueError: a probability outside [0, 1], sigma <= 0.

    Example:
        >>> from lowdim.represent import dual_radius
        >>> round(dual_radius(0.9, 0.9, 0.5), 4), round(dual_radius(0.9, 0.4, 0.5), 4), dual_radius(0.9, 0.05, 0.5)
        (0.9062, 0.3635, 0.0)

    Source: Xia, Yu, Jiang, Ding, ICLR 2024, arXiv 2404.09586, theorem 1.
    """
    check_float("p_left", p_left, 0.0, 1.0)
    check_float("p_right", p_right, 0.0, 1.0)
    check_float("sigma", sigma, 0.0, low_open=True)
    if p_left + p_right <= 1.0:
        return 0.0
    return max(0.0, sigma / math.sqrt(2.0) * (_quantile(p_left) + _quantile(p_right)))


def dual_smoothing_radius(
    count_left: int, count_right: int, n: int, alpha: float, sigma: float, *, rule: str = "sound"
) -> float:
    """The dual radius from counts of n samples in each branch; 0: abstain.

    Args:
        count_left, count_right: samples in which the class came out.
        alpha: probability that the radius is wrong.
        rule: `"sound"`: each bound at `alpha / 2`, so that both hold with probability `1 - alpha`, and signed terms.
            `"official"`: each at alpha, and a branch below 1/2 counts 0, as in the authors' programs; that claims too much.

    Raises:
        ValueError: counts outside 0 to n, options out of range, an unknown rule.

    Example:
        >>> from lowdim.represent import dual_smoothing_radius
        >>> round(dual_smoothing_radius(990, 700, 1000, 0.001, 0.25), 4)
        0.4146

    Source: Xia, Yu, Jiang, Ding, ICLR 2024, arXiv 2404.09586.
    """
    check_choice("rule", rule, RULES)
    if rule == "official":
        parts = [smoothing_radius(count, n, alpha, sigma) for count in (count_left, count_right)]
        return sum(parts) / math.sqrt(2.0)
    left, right = (clopper_pearson_lower(count, n, alpha / 2) for count in (count_left, count_right))
    return dual_radius(left, right, sigma)


def smallest_n(alpha: float, *, dual: bool = False) -> int:
    """Samples below which every image is an abstention, whatever the counts: `n > log₂(1/alpha)`, dual `n > log₂(2/alpha)`.

    Raises:
        ValueError: alpha outside (0, 1).

    Example:
        >>> from lowdim.represent import smallest_n
        >>> smallest_n(0.001), smallest_n(0.001, dual=True)
        (10, 11)
    """
    check_float("alpha", alpha, 0.0, 1.0, low_open=True, high_open=True)
    return math.floor(math.log2((2.0 if dual else 1.0) / alpha)) + 1


def _whole(count: Any) -> Any:
    """Counts come out of numpy and torch as numbers of their own kind: as an int; anything else is left to the check."""
    try:
        return count if isinstance(count, bool) else index(count)
    except TypeError:
        return count


def _quantile(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))
