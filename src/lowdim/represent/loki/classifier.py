"""loki around any scikit-learn classifier."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted, column_or_1d

from lowdim.errors import listed
from lowdim.represent.core.distances import check_distances
from lowdim.represent.loki.prediction import read_probabilities

__all__ = ["LokiClassifier"]


class LokiClassifier(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """A classifier whose prediction is the Fréchet mean of its probabilities, so that it also gives classes that it never saw.

    Formula: `ŷ = argmin_y Σ_k P_k D(λ_k, y)²` over all classes y, with `P = estimator.predict_proba(X)` of the classes λ it
    knows.

    Args:
        estimator: a classifier with `predict_proba`, or a pipeline that ends in one.
        distances: D `(N, N)` between all classes, not squared. None: 1 between any two of the classes seen in y, which gives
            the estimator's own prediction.
        classes: the names of the rows of D; None: 0 to N - 1.
        prefit: the estimator is fitted already and used as it is. `clone`, and so `GridSearchCV`, forgets its fit: there, wrap
            it in `sklearn.frozen.FrozenEstimator` instead.

    Attributes:
        estimator_: the fitted classifier. classes_ (N,): all classes in the order of D's rows. observed_ (K,): the rows of the
        classes that the estimator knows, in the order of its columns.

    `predict(X)` gives members of `classes_`. `decision_function(X)` is `(n, N)`, minus the mean squared distance; for two
    classes `(n,)`, that of the second minus that of the first, as scikit-learn has it.

    Raises:
        ValueError: a y with a class that `classes` lacks, distances that are none, classes that repeat or do not match D.
        TypeError: an estimator without `predict_proba`. NotFittedError: `prefit=True` and it is not.

    Example:
        >>> import numpy as np
        >>> from sklearn.linear_model import LogisticRegression
        >>> from lowdim.represent import LokiClassifier
        >>> X, y = np.array([[-2.0], [-1.5], [1.5], [2.0]]), np.array([1, 1, 3, 3])  # stars; nobody gave two
        >>> stars = np.arange(1, 4)
        >>> loki = LokiClassifier(LogisticRegression(), distances=abs(stars[:, None] - stars), classes=stars)
        >>> loki.fit(X, y).predict([[-3.0], [0.0], [3.0]])
        array([1, 2, 3])

    Not where errors cost the same whichever class is taken for another: there argmax is right.

    Source: Roberts et al., "Geometry-Aware Adaptation for Pretrained Models", arXiv 2307.12226.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "estimator": "no_validation",
        "distances": [None, "array-like"],
        "classes": [None, "array-like"],
        "prefit": ["boolean"],
    }

    def __init__(self, estimator, distances=None, classes=None, *, prefit=False):
        self.estimator = estimator
        self.distances = distances
        self.classes = classes
        self.prefit = prefit

    def fit(self, X, y=None):
        """Fit a clone of the estimator; with `prefit`, only read its classes."""
        self._validate_params()
        if not hasattr(self.estimator, "predict_proba"):
            raise TypeError(f"estimator must have predict_proba; {type(self.estimator).__name__} has none")
        if y is None and not self.prefit:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        seen = None if y is None else column_or_1d(y, warn=True)
        D, names = self._label_space()
        if names is not None and seen is not None:
            _rows_of("y", np.unique(seen), names)
        if self.prefit:
            advice = (
                "prefit=True, but this %(name)s is not fitted. clone and GridSearchCV throw the fit away: wrap it in "
                "sklearn.frozen.FrozenEstimator instead of setting prefit"
            )
            check_is_fitted(self.estimator, msg=advice)
            self.estimator_ = self.estimator
        else:
            fresh: Any = clone(self.estimator)
            self.estimator_ = fresh.fit(X, seen)
        known: Any = self.estimator_.classes_
        if names is None:
            names = np.asarray(known)
            if seen is not None:
                _rows_of("y", np.unique(seen), names)
        self.classes_, self.observed_ = names, _rows_of("the estimator", known, names)
        self._squares = None if D is None else D[self.observed_] ** 2  # (K, N)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimator_, name):
                setattr(self, name, getattr(self.estimator_, name))
        return self

    def predict(self, X):
        """The Fréchet mean of each sample, a member of `classes_`."""
        best = self._scores(X).argmax(axis=1)
        return self.classes_[best]

    def decision_function(self, X):
        """Minus the mean squared distance to each class, `(n, N)`; `(n,)` for two classes."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        inner = get_tags(self.estimator)
        tags.input_tags, tags.classifier_tags = inner.input_tags, inner.classifier_tags
        tags.target_tags.required = True
        return tags

    def _label_space(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if self.distances is None:
            if self.classes is not None:
                raise ValueError("classes names the rows of distances, and distances is None; give both or neither")
            return None, None
        D = check_distances(self.distances).cpu().numpy()
        names = np.arange(len(D)) if self.classes is None else np.asarray(self.classes)
        if names.shape != (len(D),):
            raise ValueError(f"classes must name the {len(D)} rows of distances; got shape {names.shape}")
        if len(set(names.tolist())) < len(names):
            raise ValueError("classes must be distinct")
        return D, names

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        P = read_probabilities(self.estimator_.predict_proba(X), len(self.observed_)).numpy()
        if self._squares is None:  # D² is 1 off the diagonal, and is not made
            return P - P.sum(axis=1, keepdims=True)
        return -(P @ self._squares)


def _rows_of(who: str, found: Any, names: np.ndarray) -> np.ndarray:
    """The position of each class among the names."""
    where = {name: row for row, name in enumerate(names.tolist())}
    rows = [where.get(name, -1) for name in np.asarray(found).tolist()]
    if -1 in rows:
        strange = [name for name, row in zip(np.asarray(found).tolist(), rows) if row < 0]
        raise ValueError(f"{who} must hold no class but {listed(names.tolist(), 120)}; it has {listed(strange, 120)}")
    return np.array(rows)
