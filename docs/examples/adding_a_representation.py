"""Whitened leading directions of the data, as a scikit-learn estimator (Kessy, Lewin, Strimmer, arXiv 1512.00809)."""

from numbers import Integral

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted, validate_data

from lowdim.testing.estimator_case import EstimatorCase


class LeadingDirections(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The `rank` directions of largest variance, each scaled to variance 1.

    Formula: `z = (x - μ) V_r diag(√(n - 1) / s_r)`, with `U diag(s) Vᵀ` the SVD of the centred data.

    Args:
        rank: how many directions to keep; where the data have fewer of them, all are kept.

    Attributes:
        mean_ (features,), components_ (rank, features), scale_ (rank,): after `fit`. The entry of largest magnitude of each
        direction is positive. A direction without variance gives 0.
    """

    _parameter_constraints = {"rank": [Interval(Integral, 1, None, closed="left")]}  # noqa: RUF012 (scikit-learn's form)

    def __init__(self, rank=1):
        self.rank = rank

    def fit(self, X, y=None):
        self._validate_params()
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        self.mean_ = X.mean(axis=0)
        _, s, vt = np.linalg.svd(X - self.mean_, full_matrices=False)
        signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
        self.components_ = (vt * signs[:, None])[: self.rank]
        spread = s[: self.rank] / np.sqrt(len(X) - 1)
        self.scale_ = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-7 * max(spread[0], 1e-30))
        return self

    def transform(self, X):
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return (X - self.mean_) @ self.components_.T * self.scale_

    @property
    def _n_features_out(self):
        return len(self.components_)


class TestLeadingDirections(EstimatorCase):
    output = "transform"

    def estimator(self, **changes):
        return LeadingDirections(**{"rank": 2, **changes})

    def data(self):
        rng = np.random.default_rng(0)
        return rng.normal(size=(40, 5)) * [5, 4, 3, 2, 1], rng.integers(2, size=40)

    def expected(self, X, y):
        values, vectors = np.linalg.eigh(np.cov(X.T))  # another way to the same directions
        top, variance = vectors[:, [-1, -2]], values[[-1, -2]]
        top = top * np.sign(top[np.abs(top).argmax(axis=0), [0, 1]])
        return (X - X.mean(axis=0)) @ top / np.sqrt(variance)

    def grid(self):
        return {"rank": [1, 3]}

    def refusals(self):
        return [(ValueError, "rank", lambda: self.estimator(rank=0).fit(*self.data()))]
