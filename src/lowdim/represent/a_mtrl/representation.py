"""A linear representation that several regression tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from lowdim.errors import check_float, check_int
from lowdim.linalg import as_given, as_tensor
from lowdim.represent.a_mtrl.relevance import numbers

__all__ = ["SharedLinearRepresentation"]

_RIDGE = 1e-3  # of the start, for tasks with fewer samples than inputs
_EXACT = 1e-28  # of the squared responses: below it the objective is rounding


class SharedLinearRepresentation:
    """Linear regressions whose weights lie in one subspace: `y = x · (B w_t)` with `B` for all tasks and `w_t` for each.

    Formula: `min_{B, w} Σ_t ‖X_t B w_t - y_t‖²`, every sample with the same weight. The start is the top singular vectors of
    the tasks' own least-squares weights, each times `√n_t`. Then in turn: all w given B, B given all w (a linear system of
    size `d · rank`), and a QR decomposition of B.

    Args:
        rank: k, the columns of B; at most d and the number of tasks.
        max_iter, tol: rounds, and the relative change of the objective that ends them.
        random_state: accepted for symmetry with `ActiveMultiTask`; the start is not random.

    Attributes:
        components_ (d, rank): B, orthonormal. task_coef_ (rank, T): w. n_iter_: rounds. objective_: the sum after each.
        reason_: `"tol"` or `"max_iter"`.

    `fit` takes lists, so this is no scikit-learn estimator. Arrays come back in the kind, numpy or torch, of the first one
    given to a call; all is computed in float64. Memory: `8 (T d² + (d rank)²)` bytes.

    Raises:
        ValueError: lists of unlike length, shapes that do not fit, a rank above d or T, NaN; a use before `fit`.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import SharedLinearRepresentation
        >>> rng = np.random.default_rng(0)
        >>> direction = np.array([3.0, 4.0, 0.0]) / 5
        >>> Xs = [rng.normal(size=(6, 3)) for _ in range(4)]
        >>> ys = [weight * X @ direction for X, weight in zip(Xs, (1.0, -2.0, 0.5, 3.0))]
        >>> shared = SharedLinearRepresentation(1).fit(Xs, ys)
        >>> np.abs(shared.components_[:, 0]).round(3)
        array([0.6, 0.8, 0. ])

    Source: Wang, Chen, Jamieson, Du, "Improved Active Multi-Task Representation Learning via Lasso", ICML 2023,
    arXiv 2306.02556.
    """

    components_: Any
    task_coef_: Any
    n_iter_: int
    objective_: list[float]
    reason_: str

    def __init__(self, rank: int, *, max_iter: int = 200, tol: float = 1e-8, random_state: int = 0):
        check_int("rank", rank, 1)
        check_int("max_iter", max_iter, 1)
        check_float("tol", tol, 0.0)
        self.rank, self.max_iter, self.tol, self.random_state = rank, max_iter, tol, random_state

    def fit(self, Xs: Sequence[Any], ys: Sequence[Any]) -> Self:
        """Fit B and all w to lists of samples `(n_t, d)` and responses `(n_t,)`, one of each for every task."""
        X, y = _read(Xs, ys)
        d = X[0].shape[1]
        if self.rank > min(d, len(X)):
            raise ValueError(f"rank must be at most the inputs, {d}, and the tasks, {len(X)}; got {self.rank}")
        lengths = [len(each) for each in y]
        rows, answers, task = np.concatenate(X), np.concatenate(y), np.repeat(np.arange(len(X)), lengths)
        grams, pulls = np.stack([x.T @ x for x in X]), np.stack([x.T @ b for x, b in zip(X, y)])  # (T, d, d), (T, d)
        B = _start(X, y, self.rank)
        exact, self.objective_, self.reason_ = _EXACT * float(answers @ answers), [], "max_iter"
        for _ in range(self.max_iter):
            B, _ = np.linalg.qr(_best_directions(grams, pulls, _best_weights(grams, pulls, B)))
            w = _best_weights(grams, pulls, B)
            theta = B @ w  # (d, T)
            self.objective_.append(float(np.square(np.einsum("nd,nd->n", rows, theta.T[task]) - answers).sum()))
            last = self.objective_[-2] if len(self.objective_) > 1 else np.inf
            if self.objective_[-1] <= exact or abs(last - self.objective_[-1]) <= self.tol * last < np.inf:
                self.reason_ = "tol"
                break
        self.n_iter_, self._B = len(self.objective_), B
        self.components_, self.task_coef_ = (as_given(as_tensor(each), like=Xs[0]) for each in (B, w))
        return self

    def fit_target(self, X: Any, y: Any) -> Any:
        """The coefficients `(rank,)` of one more task: least squares of y on `X B`."""
        samples, answers = self._checked(X), numbers("y", y, 1)
        if len(samples) != len(answers):
            raise ValueError(f"X and y must have equally many rows; got {len(samples)} and {len(answers)}")
        return as_given(as_tensor(np.linalg.lstsq(samples @ self._B, answers, rcond=None)[0]), like=X)

    def predict(self, X: Any, coef: Any) -> Any:
        """`X B coef`, `(n,)`: the responses of the task with these coefficients."""
        samples, weights = self._checked(X), numbers("coef", coef, 1)
        if len(weights) != self.rank:
            raise ValueError(f"coef must hold rank = {self.rank} numbers; got {len(weights)}")
        return as_given(as_tensor(samples @ (self._B @ weights)), like=X)

    def transform(self, X: Any) -> Any:
        """`X B`, `(n, rank)`."""
        return as_given(as_tensor(self._checked(X) @ self._B), like=X)

    def _checked(self, X: Any) -> np.ndarray:
        if not hasattr(self, "_B"):
            raise ValueError("this SharedLinearRepresentation is not fitted; call fit(Xs, ys) first")
        samples = numbers("X", X, 2)
        if samples.shape[1] != len(self._B):
            raise ValueError(f"X must have the {len(self._B)} columns that were fitted; got the shape {samples.shape}")
        return samples


def _read(Xs: Sequence[Any], ys: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if len(Xs) != len(ys) or not len(Xs):
        raise ValueError(f"Xs and ys must list one array for each task; got {len(Xs)} and {len(ys)}")
    X = [numbers(f"Xs[{t}]", x, 2) for t, x in enumerate(Xs)]
    y = [numbers(f"ys[{t}]", b, 1) for t, b in enumerate(ys)]
    for t, (x, b) in enumerate(zip(X, y)):
        if x.shape != (len(b), X[0].shape[1]):
            raise ValueError(f"Xs[{t}] must be ({len(b)}, {X[0].shape[1]}), as ys[{t}] and Xs[0] say; got {x.shape}")
    return X, y


def _start(X: list[np.ndarray], y: list[np.ndarray], rank: int) -> np.ndarray:
    """Top left singular vectors of the tasks' own weights, each times `√n_t`."""
    theta = np.stack([np.sqrt(len(b)) * _own_weights(x, b) for x, b in zip(X, y)], axis=1)
    return np.linalg.svd(theta, full_matrices=False)[0][:, :rank]


def _own_weights(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares, or ridge regression where there are fewer samples than inputs."""
    if len(X) >= X.shape[1]:
        return np.linalg.lstsq(X, y, rcond=None)[0]
    return X.T @ np.linalg.solve(X @ X.T + _RIDGE * np.eye(len(X)), y)


def _best_weights(grams: np.ndarray, pulls: np.ndarray, B: np.ndarray) -> np.ndarray:
    """All w `(rank, T)` given B; of least length where a task has fewer samples than `rank`."""
    inner = np.linalg.pinv(B.T @ grams @ B, rcond=1e-12, hermitian=True)  # (T, rank, rank)
    return np.einsum("tab,tb->at", inner, pulls @ B)


def _best_directions(grams: np.ndarray, pulls: np.ndarray, w: np.ndarray) -> np.ndarray:
    """B `(d, rank)` given all w, before it is made orthonormal."""
    (d, rank), tasks = (pulls.shape[1], len(w)), len(grams)
    outer = np.einsum("at,bt->tab", w, w).reshape(tasks, -1)
    system = (grams.reshape(tasks, -1).T @ outer).reshape(d, d, rank, rank).swapaxes(1, 2).reshape(d * rank, d * rank)
    return np.linalg.lstsq(system, (w @ pulls).T.reshape(-1), rcond=None)[0].reshape(d, rank)
