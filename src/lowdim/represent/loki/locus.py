"""Which classes a Fréchet mean can give at all, and which class to observe next so that it can give more."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lowdim.errors import MissingExtraError, check_choice, check_float, check_int
from lowdim.linalg import as_given
from lowdim.represent.core.distances import check_distances
from lowdim.represent.loki.prediction import read_indices

__all__ = ["active_selection", "label_locus", "select_next_class"]

_METHODS = ("lp", "tree")
_STRATEGIES = ("farthest", "largest_locus")


def label_locus(
    distances: Any,  # (N, N)
    observed: Any,  # (K,)
    *,
    method: str = "lp",
    tol: float = 1e-9,
) -> Any:
    """The classes that some distribution over the observed ones has as its Fréchet mean.

    Formula: y is one iff there is `P >= 0, Σ P = 1` with `Σ_k P_k (D(y, Λ_k)² - D(z, Λ_k)²) <= 0` for all z. For a tree, y that
    lie on a path between observed classes, `D(a, y) + D(y, b) = D(a, b)`.

    Args:
        distances: D, not squared.
        observed: Λ, rows of D.
        method: `"lp"`, one linear program for each class that is not observed, right for any D; `"tree"`, at once, for lengths
            of paths in a tree all of whose nodes are classes.
        tol: of the largest (squared) distance; at least 8 roundings of D's dtype.

    Returns:
        bool `(N,)`, in the kind of the distances. Observed classes, and those at distance 0 from one, are always in it.

    Raises:
        ValueError: observed classes that repeat, are out of range or none; distances that are none; an unknown method.
        MissingExtraError: no scipy, for `"lp"`.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import label_locus
        >>> place = np.arange(5.0)  # five classes in a row
        >>> label_locus(abs(place[:, None] - place), observed=[0, 2]).tolist()
        [True, True, True, False, False]

    Not for more than some 2,000 classes with `"lp"`: each program has N constraints.

    Source: Roberts et al., "Geometry-Aware Adaptation for Pretrained Models", arXiv 2307.12226.
    """
    check_float("tol", tol, 0.0)
    space = _Space(distances, method, tol)
    return as_given(torch.from_numpy(space.locus(space.rows(observed))), distances)


def select_next_class(
    distances: Any,  # (N, N)
    observed: Any,  # (K,)
    *,
    strategy: str = "farthest",
    method: str = "lp",
) -> int:
    """The class to label next.

    Args:
        distances, observed, method: as for `label_locus`.
        strategy: `"farthest"`, of the classes outside the locus the one farthest from it, on a tree that with the longest new
            path; or `"largest_locus"`, the class that makes the locus largest, which costs up to N loci. The lowest row on
            ties.

    Raises:
        ValueError: every class is in the locus already; as `label_locus`; an unknown strategy.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import select_next_class
        >>> place = np.arange(5.0)
        >>> select_next_class(abs(place[:, None] - place), observed=[0, 2])
        4

    Source: Roberts et al., arXiv 2307.12226.
    """
    check_choice("strategy", strategy, _STRATEGIES)
    space = _Space(distances, method)
    rows = space.rows(observed)
    inside = space.locus(rows)
    if inside.all():
        raise ValueError("observed leaves nothing to select: every class is in its locus")
    return space.select(rows, inside, strategy)[0]


def active_selection(
    distances: Any,  # (N, N)
    observed: Any,  # (K,)
    *,
    budget: int | None = None,
    strategy: str = "farthest",
    method: str = "lp",
) -> tuple[list[int], list[int]]:
    """Classes to label one after the other, until every class can be predicted or the budget is spent.

    Args:
        distances, observed, strategy, method: as for `select_next_class`.
        budget: how many at most, >= 0; None: no limit.

    Returns:
        The classes in order, and the sizes of the locus before the first and after each.

    Raises:
        ValueError: as `select_next_class`, but a locus that is complete gives an empty list; a budget below 0.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import active_selection
        >>> place = np.arange(5.0)
        >>> active_selection(abs(place[:, None] - place), observed=[1, 2])
        ([4, 0], [2, 4, 5])

    Source: Roberts et al., arXiv 2307.12226.
    """
    check_choice("strategy", strategy, _STRATEGIES)
    if budget is not None:
        check_int("budget", budget, 0)
    space = _Space(distances, method)
    rows = space.rows(observed)
    inside = space.locus(rows)
    selected, sizes = [], [int(inside.sum())]
    while not inside.all() and (budget is None or len(selected) < budget):
        chosen, inside = space.select(rows, inside, strategy)
        rows = np.append(rows, chosen)
        selected.append(chosen)
        sizes.append(int(inside.sum()))
    return selected, sizes


class _Space:
    """A label space, read and checked once, and how its loci are found."""

    def __init__(self, distances: Any, method: str, tol: float = 1e-9):
        check_choice("method", method, _METHODS)
        D = check_distances(distances)
        self.D, self.method = D.cpu().double().numpy(), method
        self.slack = max(tol, 8 * torch.finfo(D.dtype).eps)

    def rows(self, observed: Any) -> np.ndarray:
        return read_indices("observed", observed, len(self.D)).cpu().numpy()

    def locus(self, rows: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
        """Bool (N,); `known` classes are in it for certain, such as those in the locus of fewer observed classes."""
        if self.method == "tree":  # all paths from one observed class to the others: together the smallest subtree
            first = self.D[rows[0]]
            detour = (first + self.D[rows] - first[rows, None]).min(0)
            return detour <= self.slack * self.D.max()
        inside = np.zeros(len(self.D), dtype=bool) if known is None else known.copy()
        squares = self.D[:, rows] ** 2  # (N, K)
        scale = squares.max()
        if scale == 0:
            return np.ones_like(inside)
        squares /= scale
        inside |= squares.min(1) <= self.slack**2
        for y in np.flatnonzero(~inside):
            inside[y] = self._reaches(squares[y] - squares, f"class {y}")
        return inside

    def _reaches(self, excess: np.ndarray, who: str) -> bool:
        """Whether weights over the columns exist for which no row is above 0: the least maximum over the rows."""
        if (excess.min(1) > self.slack).any():  # another class is nearer to every observed one
            return False
        try:
            from scipy.optimize import linprog
        except ImportError as error:
            raise MissingExtraError("scipy", "science", 'method="lp"') from error
        n, k = excess.shape
        exact = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        answer: Any = linprog(
            np.append(np.zeros(k), 1.0),  # the weights, and the maximum
            A_ub=np.hstack([excess, -np.ones((n, 1))]),
            b_ub=np.zeros(n),
            A_eq=np.append(np.ones(k), 0.0)[None],
            b_eq=[1.0],
            method="highs",
            options=exact,
        )
        if answer.status != 0:
            raise RuntimeError(f"the linear program of {who} was not solved: {answer.message}")
        return bool(answer.fun <= self.slack)

    def select(self, rows: np.ndarray, inside: np.ndarray, strategy: str) -> tuple[int, np.ndarray]:
        """The next class, and the locus with it."""
        if strategy == "farthest":
            outside = np.flatnonzero(~inside)
            chosen = int(outside[self.D[np.ix_(outside, inside)].min(1).argmax()])
            return chosen, self.locus(np.append(rows, chosen), inside)
        best, found = -1, inside
        for y in np.setdiff1d(np.arange(len(self.D)), rows):
            locus = self.locus(np.append(rows, y), inside)
            if best < 0 or locus.sum() > found.sum():
                best, found = int(y), locus
        return best, found
