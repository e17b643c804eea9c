"""FCCov-Net: a small network trained for the loss, as a scikit-learn transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data
from torch import Tensor, nn

from lowdim.errors import check_int, warn_caller
from lowdim.linalg import canonical_signs
from lowdim.represent.core.distances import check_distances
from lowdim.represent.core.fitting import as_input, batches, build, feed_forward, outputs, seed_from, train
from lowdim.represent.fccov.covariance import Columns, covariance_loss, covariance_matrix

__all__ = ["FCCovNet"]


class FCCovNet(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Nonlinear sufficient dimension reduction for responses in any metric space: points on a sphere, distributions, graphs.

    Formula: f minimises `FCCovLoss` over mini-batches (Adam); then f is centred and whitened on the training data and rotated
    to the eigenvectors of M, so that components have variance 1, are uncorrelated and ordered by how far the responses
    determine them. Only the order of distances counts, so that outliers among the responses change little.

    Args:
        n_components: d >= 1.
        metric: `"euclidean"` for `y (n,)` or `(n, q)`; a function of y that returns `(n, n)` distances; or `"precomputed"`: y
            is the matrix of distances itself, or, where rows are to be selected (cross-validation), integers that name rows
            of `distances`.
        distances: `(N, N)`, for `"precomputed"`.
        hidden: sizes of the hidden layers of f, each followed by ReLU.
        penalty: λ > 0 of the loss.
        epochs, batch_size, lr: of the training. Batches below 64 bias the estimate.
        network: a module from samples (rows, or images) to d numbers in place of f. It is copied, never trained itself.
        random_state: seed of the first weights and of the batches.

    Attributes:
        network_: the trained module. eigenvalues_ (d,): of M of the components on the training data. fccov_: their sum.

    `transform(X)` is `(n, d)` in float64. Scale columns of unlike size first (`StandardScaler`).

    Raises:
        ValueError: fewer than 3 samples, y missing or of another length, distances that are none, options out of range.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import FCCovNet
        >>> X = np.random.default_rng(0).normal(size=(200, 4))
        >>> y = X[:, 0] ** 2  # no linear trend
        >>> z = FCCovNet(1, epochs=60, random_state=0).fit(X, y).transform(X)[:, 0]
        >>> bool(abs(np.corrcoef(z, abs(X[:, 0]))[0, 1]) > 0.9)
        True

    Not where a linear direction suffices: partial least squares or sliced inverse regression need fewer samples. With few
    samples and many columns it finds nothing.

    Source: Yuan, Wang, Yu, "Fréchet Cumulative Covariance Net for Deep Nonlinear Sufficient Dimension Reduction with Random
    Objects", arXiv 2502.15374.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_components": [Interval(Integral, 1, None, closed="left")],
        "metric": [StrOptions({"euclidean", "precomputed"}), callable],
        "distances": [None, "array-like"],
        "hidden": ["array-like"],
        "penalty": [Interval(Real, 0, None, closed="neither")],
        "epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 3, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="neither")],
        "network": [None, nn.Module],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_components=2,
        *,
        metric="euclidean",
        distances=None,
        hidden=(64, 64),
        penalty=0.1,
        epochs=100,
        batch_size=128,
        lr=5e-3,
        network=None,
        random_state=None,
    ):
        self.n_components = n_components
        self.metric = metric
        self.distances = distances
        self.hidden = hidden
        self.penalty = penalty
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.network = network
        self.random_state = random_state

    def fit(self, X, y=None):
        """Train f on samples and their responses."""
        self._validate_params()
        for size in self.hidden:
            check_int("hidden", int(size) if isinstance(size, Integral) else size, 1)
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        X, responses = self._read(X, y)
        if responses.same:
            warn_caller("all responses are the same: their covariance with anything is 0, and the components mean nothing")
        seed, count = seed_from(self.random_state), len(X)
        if self.network is not None:
            network = copy.deepcopy(self.network)
        else:
            network = build(lambda: feed_forward([X.shape[1], *self.hidden, self.n_components]), seed)
        samples = as_input(X, network)
        with torch.no_grad():
            shape = tuple(network.eval()(samples[:2]).shape)
        if shape != (2, self.n_components):
            raise ValueError(f"network must give {self.n_components} numbers (n_components) a sample; two samples gave {shape}")
        rows = batches(count, self.batch_size, self.epochs, seed, least=max(3, self.batch_size // 2))
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)

        def loss(batch: Tensor) -> Tensor:
            return covariance_loss(network(samples[batch]), responses.within(batch), self.penalty)

        train(network, loss, rows, [optimizer], seed)
        self.network_ = network
        self._rotate(outputs(network, X), responses.columns)
        return self

    def transform(self, X):
        """The components of each sample, `(n, d)`."""
        check_is_fitted(self)
        how: Any = {"dtype": np.float64, "reset": False, "allow_nd": self.network is not None}
        samples: Any = validate_data(self, X, **how)
        return (outputs(self.network_, samples) - self._mean) @ self._rotation

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    @property
    def _n_features_out(self) -> int:
        return self._rotation.shape[1]

    def _read(self, X: Any, y: Any) -> tuple[np.ndarray, _Responses]:
        how: Any = {"dtype": np.float64, "ensure_min_samples": 3, "allow_nd": self.network is not None}
        if self.metric == "euclidean":
            given: Any = validate_data(self, X, y, multi_output=True, y_numeric=True, **how)
            points = np.asarray(given[1], dtype=np.float64).reshape(len(given[0]), -1)
            return given[0], _points(points)
        X = validate_data(self, X, **how)
        check_consistent_length(X, y)
        if self.metric == "precomputed":
            return X, _matrix(self._precomputed(y, len(X)))
        metric: Any = self.metric
        D = check_distances(metric(y), "what metric returns")
        if len(D) != len(X):
            raise ValueError(f"what metric returns must be ({len(X)}, {len(X)}), for the samples; got {tuple(D.shape)}")
        return X, _matrix(D)

    def _precomputed(self, y: Any, count: int) -> Tensor:
        if self.distances is None:
            shape = np.shape(y)
            if len(shape) != 2 or shape[0] != shape[1]:
                raise ValueError(
                    f"with metric='precomputed' y must be the square matrix of distances; got shape {shape}. Cross-validation "
                    "selects its rows only: give the whole matrix as distances=, and y as the numbers of its rows"
                )
            return check_distances(y, "y")
        D, rows = check_distances(self.distances), np.asarray(y)
        if rows.shape != (count,) or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(D):
            raise ValueError(f"with distances= y must be integers in [0, {len(D)}), one for each of the {count} samples")
        index = torch.from_numpy(rows.astype(np.int64))
        return D[index][:, index]

    def _rotate(self, U: np.ndarray, columns: Columns) -> None:
        """Centre and whiten the network's outputs, and turn them to the eigenvectors of M, largest first."""
        self._mean = U.mean(axis=0)
        centred = torch.from_numpy(U - self._mean)
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(U))
        flat = variances <= 1e-12 * variances[-1].clamp_min(torch.finfo(variances.dtype).tiny)
        whitening = axes * torch.where(flat, 0.0, variances.clamp_min(1e-300).rsqrt())
        values, vectors = torch.linalg.eigh(whitening.T @ covariance_matrix(centred, columns) @ whitening)
        turn, _ = canonical_signs(vectors.flip(1))
        self._rotation = (whitening @ turn).numpy()
        self.eigenvalues_ = values.flip(0).clamp_min(0).numpy()
        self.fccov_ = float(self.eigenvalues_.sum())


@dataclass(frozen=True)
class _Responses:
    """Distances between responses, a few at a time."""

    within: Callable[[Tensor], Tensor]  # rows of a batch -> (b, b)
    columns: Columns
    same: bool  # all of them are one


def _points(y: np.ndarray) -> _Responses:
    """Responses `(n, q)` whose distances are made when they are needed."""

    def between(rows: np.ndarray, others: np.ndarray) -> Tensor:
        return torch.from_numpy(cdist(rows, others))

    def within(rows: Tensor) -> Tensor:
        return between(y[rows.numpy()], y[rows.numpy()])

    return _Responses(within, lambda start, stop: between(y, y[start:stop]), bool((y == y[0]).all()))


def _matrix(D: Tensor) -> _Responses:
    """Responses whose distances are all there."""
    return _Responses(lambda rows: D[rows][:, rows], lambda start, stop: D[:, start:stop], not bool(D.any()))
