"""loki around scikit-learn's classifiers: the plain argmax and scikit-learn's checks, then classes that were never seen."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from lowdim.represent import LokiClassifier
from lowdim.testing.agreement import agrees
from lowdim.testing.estimator_case import EstimatorCase

NAMES = ["none", "few", "some", "many", "all"]
PLACE = np.arange(5.0)
DISTANCES = np.abs(PLACE[:, None] - PLACE)


def points(classes=(0, 2, 4), count=60, seed=0):
    """Points around places of a line, one a class."""
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, count)
    return np.stack([y + 0.7 * rng.normal(size=count), rng.normal(size=count)], axis=1), y


class TestLokiClassifier(EstimatorCase):
    def estimator(self, **changes):
        return LokiClassifier(LogisticRegression()).set_params(**changes)

    def data(self):
        return points()

    def expected(self, X, y):
        return LogisticRegression().fit(X, y).predict(X)

    def grid(self):
        return {"estimator__C": [0.01, 1.0]}

    def refusals(self):
        X, y = self.data()
        names = np.array(NAMES)
        return [
            (TypeError, "LinearSVC has none", lambda: LokiClassifier(LinearSVC()).fit(X, y)),
            (TypeError, "LinearRegression has none", lambda: LokiClassifier(LinearRegression()).fit(X, y)),
            (ValueError, "it has 4", lambda: self.estimator(distances=DISTANCES[:4, :4]).fit(X, y)),
            (
                ValueError,
                "it has few",
                lambda: self.estimator(distances=DISTANCES[:1, :1], classes=["none"]).fit(X, names[y // 2]),
            ),
            (ValueError, "5 rows", lambda: self.estimator(distances=DISTANCES, classes=NAMES[:4]).fit(X, y)),
            (ValueError, "distinct", lambda: self.estimator(distances=DISTANCES, classes=["a", *NAMES[:3], "a"]).fit(X, y)),
            (ValueError, "both or neither", lambda: self.estimator(classes=NAMES).fit(X, y)),
            (ValueError, "symmetric", lambda: self.estimator(distances=np.triu(DISTANCES)).fit(X, y)),
            (NotFittedError, "FrozenEstimator", lambda: self.estimator(prefit=True).fit(X, y)),
            (ValueError, "'prefit'", lambda: self.estimator(prefit="yes").fit(X, y)),
        ]


def means(P, known, names):
    """Fréchet means by loops."""
    risks = [[sum(p[k] * (PLACE[known[k]] - PLACE[c]) ** 2 for k in range(len(known))) for c in range(5)] for p in P]
    return np.array(risks), [names[int(np.argmin(row))] for row in risks]


@pytest.mark.parametrize("inner", [LogisticRegression(), make_pipeline(StandardScaler(), KNeighborsClassifier(7))])
def test_classes_that_were_never_seen(inner):
    """Names in an order that sorting changes, so that the estimator's columns are not D's rows."""
    X, y = points()
    names = np.array(NAMES)
    loki = LokiClassifier(inner, distances=DISTANCES, classes=NAMES).fit(X, names[y])
    known = [NAMES.index(name) for name in sorted(np.array(NAMES)[[0, 2, 4]])]
    assert loki.observed_.tolist() == known
    assert loki.classes_.tolist() == NAMES
    risks, want = means(clone(inner).fit(X, names[y]).predict_proba(X), known, NAMES)
    agrees(loki.decision_function(X), -risks, 1e-12)
    assert loki.predict(X).tolist() == want
    assert {"few", "many"} <= set(want), "classes without a single sample"
    assert loki.score(X, want) == 1.0
    given = LokiClassifier(inner, distances=torch.from_numpy(DISTANCES), classes=NAMES).fit(X, names[y])
    assert given.predict(X).tolist() == want


def test_rows_without_names_are_numbers():
    X, y = points((1, 3))
    loki = LokiClassifier(LogisticRegression(), distances=DISTANCES).fit(X, y)
    assert loki.classes_.tolist() == [0, 1, 2, 3, 4]
    assert set(loki.predict(X)) == {1, 2, 3}
    assert loki.n_features_in_ == 2
    floats = LokiClassifier(LogisticRegression(), distances=DISTANCES).fit(X, y.astype(float))
    assert np.array_equal(floats.predict(X), loki.predict(X))


def test_two_classes_have_one_score():
    X, y = points((0, 1))
    loki = LokiClassifier(LogisticRegression()).fit(X, y)
    P = loki.estimator_.predict_proba(X)
    agrees(loki.decision_function(X), P[:, 1] - P[:, 0], 1e-12)
    assert np.array_equal(loki.predict(X), (loki.decision_function(X) > 0).astype(int))


def test_a_fitted_estimator_is_used_as_it_is():
    X, y = points()
    fitted = LogisticRegression().fit(X, y)
    weights = fitted.coef_.copy()
    other, labels = points((0, 1, 2, 3, 4), seed=1)  # with classes that it never saw
    want = means(fitted.predict_proba(other), [0, 2, 4], range(5))[1]
    prefit = LokiClassifier(fitted, distances=DISTANCES, prefit=True).fit(other, labels)
    frozen = LokiClassifier(FrozenEstimator(fitted), distances=DISTANCES).fit(other, labels)
    assert prefit.estimator_ is fitted
    for loki in (prefit, frozen, LokiClassifier(fitted, distances=DISTANCES, prefit=True).fit(None)):
        assert loki.predict(other).tolist() == want
        assert loki.score(other, labels) > (fitted.predict(other) == labels).mean()
    assert np.array_equal(fitted.coef_, weights)
    with pytest.raises(NotFittedError, match="FrozenEstimator"):
        cross_val_score(prefit, other, labels, cv=2, error_score="raise")
    assert np.isfinite(cross_val_score(frozen, other, labels, cv=2, error_score="raise")).all()
    for plain in (LokiClassifier(fitted, prefit=True), LokiClassifier(FrozenEstimator(fitted))):
        assert np.array_equal(plain.fit(X, y).predict(other), fitted.predict(other))
        with pytest.raises(ValueError, match="y must hold no class but 0, 2, 4; it has 1, 3"):
            plain.fit(other, labels)


def test_a_search_keeps_the_distances():
    X, y = points()
    loki = LokiClassifier(LogisticRegression(), distances=DISTANCES)
    assert clone(loki).get_params()["distances"] is not None
    assert loki.get_params()["distances"] is DISTANCES
    search = GridSearchCV(loki, {"estimator__C": [0.1, 1.0]}, cv=2, error_score="raise").fit(X, y)
    assert search.best_estimator_.classes_.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(DISTANCES, np.abs(PLACE[:, None] - PLACE))


def test_texts_reach_a_pipeline():
    from sklearn.feature_extraction.text import CountVectorizer

    texts = ["cold snow", "snow ice cold", "sun heat", "hot sun"] * 4
    y = [0, 0, 4, 4] * 4
    loki = LokiClassifier(make_pipeline(CountVectorizer(), LogisticRegression()), distances=DISTANCES).fit(texts, y)
    assert loki.predict(["snow ice", "snow sun", "hot sun"]).tolist()[1] == 2
