"""SLK: regularised clustering of labelled and unlabelled points, as a scikit-learn classifier."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from lowdim.represent.fewshot.graph import bound_update, knn_affinity, softmax, squared_lengths

__all__ = ["TransductiveClustering"]


class TransductiveClustering(ClassifierMixin, BaseEstimator):
    """Labels for all points of a small problem at once: clusters that hold the labelled points, and agree among neighbours.

    Formula: the energy `E(Z, c) = Σ_pk z_pk a_pk - λ Σ_k z_kᵀ W z_k`, lowered in turn over prototypes c and soft assignments Z
    (`bound_update`); `a_pk = ‖x_p - c_k‖²` (`prototype="mean"`) or `-exp(-‖x_p - c_k‖² / 2σ²)` (`"mode"`). Labelled points
    keep their class.

    Args:
        prototype: `"mode"` (mean-shift, less drawn by outliers) or `"mean"`.
        laplacian: whether neighbours pull at each other; False is K-means, or K-modes, from the class means.
        lam: λ >= 0, how strongly.
        n_neighbors: neighbours of a point in W, the point itself counted, in [2, N].
        sigma: width σ > 0 of the kernel; None: `σ² = Σ_pq W_pq ‖x_p - x_q‖² / 5N`.
        affinity: W itself, `(N, N)`, an array or sparse, entries >= 0; None: the nearest neighbours (`knn_affinity`).
        clamp: whether labelled points keep their class. False is the authors' program, in which they may move.
        max_iter, tol: rounds, and the relative change of the energy that ends them.
        bound_iter, bound_tol: the same for the updates of Z in a round.
        mean_shift_iter, mean_shift_tol: the same for a prototype in a round; the tolerance is relative to its largest entry.

    Attributes:
        classes_ (K,): the labels. transduction_ (N,): the label of each point given to `fit`.
        assignments_ (N, K): Z. prototypes_ (K, D): c. sigma_: σ. n_iter_: rounds. energies_ (n_iter_,): E after each.

    `fit(X, y)` takes all points with `y = -1` for those without label, as `sklearn.semi_supervised` does; in a y of strings all
    are labelled. `predict(X)` gives the class of the nearest prototype. Memory grows as N: `fit` holds a few times the
    `8 N (D + K)` bytes of points and assignments, and nothing of size (N, N) unless it is given.

    Raises:
        ValueError: no labelled point, an option out of range, an affinity of another shape, NaN in X.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import TransductiveClustering
        >>> X = np.array([[0.0, 0.1], [0.2, 0.0], [0.1, 0.3], [3.0, 3.1], [3.2, 3.0], [3.1, 3.3]])
        >>> TransductiveClustering().fit(X, [0, -1, -1, 1, -1, -1]).transduction_
        array([0, 0, 0, 1, 1, 1])

    Not where classes do not form clusters in the features: there it may do worse than the nearest class mean. Not for points
    that come one at a time: it needs them all in `fit`.

    Source: Ziko et al., "Transductive Few-Shot Learning: Clustering is All You Need?", arXiv 2106.09516.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "prototype": [StrOptions({"mode", "mean"})],
        "laplacian": ["boolean"],
        "lam": [Interval(Real, 0, None, closed="left")],
        "n_neighbors": [Interval(Integral, 2, None, closed="left")],
        "sigma": [None, Interval(Real, 0, None, closed="neither")],
        "affinity": [None, "array-like", "sparse matrix"],
        "clamp": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "bound_iter": [Interval(Integral, 1, None, closed="left")],
        "bound_tol": [Interval(Real, 0, None, closed="left")],
        "mean_shift_iter": [Interval(Integral, 1, None, closed="left")],
        "mean_shift_tol": [Interval(Real, 0, None, closed="left")],
    }

    def __init__(
        self,
        *,
        prototype="mode",
        laplacian=True,
        lam=0.7,
        n_neighbors=3,
        sigma=None,
        affinity=None,
        clamp=True,
        max_iter=100,
        tol=1e-4,
        bound_iter=600,
        bound_tol=1e-7,
        mean_shift_iter=1000,
        mean_shift_tol=1e-5,
    ):
        self.prototype = prototype
        self.laplacian = laplacian
        self.lam = lam
        self.n_neighbors = n_neighbors
        self.sigma = sigma
        self.affinity = affinity
        self.clamp = clamp
        self.max_iter = max_iter
        self.tol = tol
        self.bound_iter = bound_iter
        self.bound_tol = bound_tol
        self.mean_shift_iter = mean_shift_iter
        self.mean_shift_tol = mean_shift_tol

    def fit(self, X, y):
        """Cluster all points; `y = -1` marks those without label."""
        self._validate_params()
        data: Any = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        X, y = data
        check_classification_targets(y)
        labelled: Any = y != -1 if y.dtype.kind in "if" else np.ones(len(y), dtype=bool)
        if not labelled.any():
            raise ValueError("y must label at least one point of each class; all are -1, which marks points without label")
        self.classes_, known = np.unique(y[labelled], return_inverse=True)
        W = self._affinity(X)
        self.sigma_ = float(self.sigma) if self.sigma is not None else _width(X, W)
        self._cluster(X, W, labelled, known)
        return self

    def predict(self, X):
        """The class of the nearest prototype."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.classes_[cdist(X, self.prototypes_, "sqeuclidean").argmin(axis=1)]

    def _affinity(self, X: np.ndarray) -> Any:
        if self.affinity is None:
            if self.n_neighbors > len(X):
                raise ValueError(f"n_neighbors must be at most n_samples = {len(X)}; got {self.n_neighbors}")
            return knn_affinity(X, self.n_neighbors)
        given: Any = {"accept_sparse": True, "dtype": np.float64, "input_name": "affinity"}
        W = sparse.csr_array(check_array(self.affinity, **given))
        if W.shape != (len(X), len(X)) or (W.data < 0).any():
            raise ValueError(f"affinity must be ({len(X)}, {len(X)}) with entries >= 0; got {W.shape}, least entry {W.min():g}")
        return W

    def _cluster(self, X: np.ndarray, W: Any, labelled: np.ndarray, known: np.ndarray) -> None:
        K = len(self.classes_)
        c = np.stack([X[labelled][known == k].mean(axis=0) for k in range(K)])
        label = cdist(X, c, "sqeuclidean").argmin(axis=1)
        label[labelled] = known
        held = np.eye(K)[known]
        energies, settled = [], False
        while len(energies) < self.max_iter and not settled:
            before = label, c
            c = np.stack([self._prototype(X[label == k], c[k]) for k in range(K)])
            a = self._costs(X, c)
            if self.laplacian:
                start = softmax(-a)
                start[labelled] = held
                how = {"max_iter": self.bound_iter, "tol": self.bound_tol, "clamped": labelled if self.clamp else None}
                Z = bound_update(a, start, W, self.lam, **how)
                label = Z.argmax(axis=1)
            else:
                label = a.argmin(axis=1)
            if self.clamp:
                label[labelled] = known
            if not self.laplacian:
                Z = np.eye(K)[label]
            pull = self.lam * (W @ Z) if self.laplacian else 0.0
            energies.append(float(np.sum(Z * (a - pull))))
            settled = len(energies) > 2 and abs(energies[-1] - energies[-2]) <= self.tol * abs(energies[-2])
            if np.bincount(label, minlength=K).min() == 0:  # only without clamping
                label, c, settled = *before, True
        if not settled:
            what = f"the energy still changes after max_iter={self.max_iter} rounds; raise max_iter or tol"
            warnings.warn(what, ConvergenceWarning, stacklevel=3)
        self.energies_, self.n_iter_ = np.array(energies), len(energies)
        self.assignments_, self.prototypes_, self.transduction_ = Z, c, self.classes_[label]

    def _prototype(self, points: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Mean of a class's points, or the mode that mean-shift reaches from the old prototype."""
        if self.prototype == "mean":
            return points.mean(axis=0)
        away = points - old  # distances to old + move without a difference of large numbers, and by two products a step
        squares, move = squared_lengths(away), np.zeros_like(old)
        for _ in range(self.mean_shift_iter):
            distance = squares - 2 * (away @ move) + move @ move
            w = np.exp((distance.min() - distance) / (2 * self.sigma_**2))  # the smallest distance's factor cancels
            last, move = move, (w @ away) / w.sum()
            if np.abs(move - last).max() < self.mean_shift_tol * np.abs(old + last).max():
                break
        return old + move

    def _costs(self, X: np.ndarray, c: np.ndarray) -> np.ndarray:
        squared = cdist(X, c, "sqeuclidean")
        return squared if self.prototype == "mean" else -np.exp(squared / (-2 * self.sigma_**2))


def _width(X: np.ndarray, W: Any) -> float:
    """σ from the lengths of the graph's edges; 1 where all of them are 0."""
    p, q = W.nonzero()
    total = 0.0
    for i in range(0, len(p), 4096):  # blocks: all edges at once would hold X several times
        part = slice(i, i + 4096)
        weights = np.asarray(W[p[part], q[part]]).ravel()
        total += float(weights @ squared_lengths(X[p[part]] - X[q[part]]))
    return float(np.sqrt(total / (5 * len(X)))) or 1.0
