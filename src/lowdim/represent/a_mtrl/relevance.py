"""How much each source task matters for the target, and how many samples it gets for that."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lowdim.errors import MissingExtraError, check_float, check_int, warn_caller
from lowdim.linalg import as_given, as_tensor

__all__ = ["DEFAULT_LAM", "allocate_samples", "check_order", "numbers", "relevance", "shares_of", "task_relevance"]

#: The default λ of the Lasso as a share of the smallest λ at which no task is relevant.
DEFAULT_LAM = 0.05
_ROUNDING = 1e-14  # of a scalar product, relative to the lengths of its vectors


def task_relevance(
    W: Any,  # (k, T)
    w_target: Any,  # (k,)
    *,
    order: int = 1,
    lam: float | None = None,
) -> Any:
    """Weights ν with which the target task is a combination of the source tasks: few of them (order 1) or of least length.

    Formula: order 1: `ν = argmin ‖ν‖₁ subject to W ν = w_target`, or with `lam > 0` the Lasso
    `argmin ½ ‖W ν - w_target‖² + lam ‖ν‖₁`. Order 2: `ν = Wᵀ (W Wᵀ)⁺ w_target`.

    Args:
        W: a column of coefficients for each source task; numpy or torch.
        w_target: the coefficients of the target.
        order: 1 or 2.
        lam: λ of order 1; None or 0: the linear program. Where no W ν is `w_target`, that has no solution: the Lasso with
            `lam = 0.05 max |Wᵀ w_target|` answers instead, with a warning.

    Returns:
        ν `(T,)` in float64, of the kind of W. Where columns of W repeat, it is one of several solutions.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries, `lam < 0`, an order that is not 1 or 2.
        MissingExtraError: no scipy, for the linear program.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import task_relevance
        >>> W = np.array([[1.0, 0.0, 0.8], [0.0, 1.0, 0.8]])
        >>> task_relevance(W, [1.0, 1.0]).round(3)
        array([0.  , 0.  , 1.25])
        >>> task_relevance(W, [1.0, 1.0], order=2).round(3)
        array([0.439, 0.439, 0.702])

    Source: Wang, Chen, Jamieson, Du, "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023,
    arXiv 2306.02556.
    """
    check_order(order)
    if lam is not None:
        check_float("lam", lam, 0.0)
    matrix, target = numbers("W", W, 2), numbers("w_target", w_target, 1)
    if len(matrix) != len(target):
        raise ValueError(f"W and w_target must have equally many rows; got {matrix.shape} and {target.shape}")
    return as_given(as_tensor(relevance(matrix, target, order, lam)), like=W)


def allocate_samples(
    nu: Any,  # (T,)
    budget: int,
    *,
    order: int = 1,
    minimum: int = 0,
) -> Any:
    """Samples of each task: a minimum, and the rest in proportion to `|ν|^order`; together exactly the budget.

    Formula: `n_t = minimum + (|ν_t|^order / Σ |ν|^order) (budget - minimum T)`, rounded by largest remainder (of equal ones the
    first). If ν is 0, all shares are equal.

    Args:
        nu: the relevance of each task; numpy or torch.
        budget: samples of all tasks.
        order: 1 or 2.
        minimum: samples that every task gets.

    Returns:
        `(T,)` int64 of the kind of `nu`, with the sum `budget`.

    Raises:
        ValueError: a budget below `minimum T`, NaN or infinite entries, an order that is not 1 or 2.

    Example:
        >>> from lowdim.represent import allocate_samples
        >>> allocate_samples([2.0, -1.0, 0.0], 100, minimum=5)
        array([62, 33,  5])

    Source: Wang et al., ICML 2023, arXiv 2306.02556.
    """
    check_order(order)
    check_int("minimum", minimum, 0)
    shares = shares_of(numbers("nu", nu, 1), order)
    check_int("budget", budget, 0)
    if budget < minimum * len(shares):
        raise ValueError(f"budget must be at least minimum x tasks = {minimum} x {len(shares)}; got {budget}")
    return as_given(as_tensor(minimum + by_largest_remainder(shares, budget - minimum * len(shares))), like=nu)


def relevance(W: np.ndarray, w_target: np.ndarray, order: int, lam: float | None) -> np.ndarray:
    """`task_relevance` of checked arrays."""
    if order == 2:
        return np.linalg.pinv(W) @ w_target
    if lam:
        return _lasso(W, w_target, lam)
    found = _least_norm(W, w_target)
    if found is not None:
        return found
    lam = DEFAULT_LAM * float(np.abs(W.T @ w_target).max(initial=0.0))
    warn_caller(
        f"no combination of the tasks' coefficients gives w_target (W has rank {np.linalg.matrix_rank(W)} of {len(W)}): the "
        f"Lasso with lam {lam:.3g} answers instead; give lam= to choose it"
    )
    return _lasso(W, w_target, lam)


def shares_of(nu: np.ndarray, order: int) -> np.ndarray:
    """`|ν_t|^p / Σ |ν|^p`; equal shares for ν = 0."""
    exponent = np.frexp(np.abs(nu).max(initial=0.0))[1]
    weights = np.ldexp(np.abs(nu), -exponent) ** order  # a power of two: nothing overflows, and equal shares stay equal
    return weights / weights.sum() if weights.any() else np.full(len(nu), 1 / len(nu))


def by_largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near `shares · total` with that sum; of equal remainders the first is rounded up."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    remainders = np.round(exact - counts, 9)  # equal ones are not told apart by rounding errors
    counts[np.argsort(-remainders, kind="stable")[: total - counts.sum()]] += 1
    return counts


def check_order(order: int) -> None:
    """Raise ValueError unless the order is 1 or 2."""
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"order must be 1 (least absolute sum) or 2 (least length); got {order!r}")


def numbers(what: str, given: Any, dimensions: int) -> np.ndarray:
    """A float64 array of so many dimensions, without NaN and infinity.

    Raises:
        ValueError: anything else. TypeError: complex numbers.
    """
    tensor = as_tensor(given)
    if tensor.is_complex():
        raise TypeError(f"{what} must be real; got {tensor.dtype}")
    array = tensor.to("cpu", torch.float64).numpy()
    if array.ndim != dimensions or not array.size:
        raise ValueError(f"{what} must have {dimensions} dimensions, none of size 0; got the shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite; it has NaN or infinite entries")
    return array


def _least_norm(W: np.ndarray, w_target: np.ndarray) -> np.ndarray | None:
    """The least absolute sum with `W ν = w_target`; None where none exists."""
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise MissingExtraError("scipy", "science", "task_relevance of order 1 with lam=None") from error
    tasks, size, length = W.shape[1], np.abs(W).max() or 1.0, np.abs(w_target).max() or 1.0
    both = np.hstack([W, -W]) / size  # numbers near 1: the program's tolerances are absolute
    found: Any = linprog(np.ones(2 * tasks), A_eq=both, b_eq=w_target / length, bounds=(0, None), method="highs")
    return None if found.x is None else (found.x[:tasks] - found.x[tasks:] + 0.0) * (length / size)  # no negative zeros


def _lasso(W: np.ndarray, w_target: np.ndarray, lam: float) -> np.ndarray:
    """One task enters at a time, and leaves where its weight would change sign: exact after finitely many linear systems."""
    lengths = np.linalg.norm(W, axis=0)
    lengths[lengths == 0] = 1.0
    unit, costs = W / lengths, lam / lengths  # columns of length 1, each with a λ of its own
    x, signs = np.zeros(W.shape[1]), np.zeros(W.shape[1])
    for _ in range(100 * (W.shape[1] + 1)):
        pull = unit.T @ (w_target - unit @ x)
        room = 1e-10 * costs + _ROUNDING * (np.linalg.norm(w_target) + np.abs(x).sum())
        here = signs != 0
        if np.all(np.abs(pull - costs * signs)[here] <= room[here]):  # best for these tasks and signs
            beyond = np.where(here, -1.0, np.abs(pull) - costs - room)
            enters = int(beyond.argmax())
            if beyond[enters] <= 0:
                break
            signs[enters], here[enters] = np.sign(pull[enters]), True
        move, furthest = _towards_best(unit[:, here], (pull - costs * signs)[here])
        shrinks = move * signs[here] < 0
        steps = np.full(len(move), np.inf)
        steps[shrinks] = -x[here][shrinks] / move[shrinks]
        first, place = int(steps.argmin()), np.flatnonzero(here)
        x[here] += min(furthest, steps[first]) * move
        if steps[first] <= furthest:
            x[place[first]] = signs[place[first]] = 0.0
    return x / lengths


def _towards_best(columns: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, float]:
    """The way down for columns of length 1, and how far it leads: without end where the columns depend on each other."""
    _, s, rows = np.linalg.svd(columns)
    s = np.pad(s, (0, len(rows) - len(s)))
    if s[-1] <= 1e-10 * s[0]:
        return rows[-1] * (rows[-1] @ slope), np.inf
    return rows.T @ ((rows @ slope) / s**2), 1.0
