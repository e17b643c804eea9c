"""SLK as a classifier: the algorithm written out point by point, the authors' numbers, and scikit-learn's checks."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

import vectors
from lowdim.represent import TransductiveClustering, bound_update, episode_features, knn_affinity
from lowdim.testing.agreement import agrees
from lowdim.testing.estimator_case import EstimatorCase


def points(seed=0, spread=0.7):
    """Forty points around three places, with two, two and three labels; the others are -1."""
    rng = np.random.default_rng(seed)
    where = np.arange(40) % 3
    X = rng.normal(size=(3, 4))[where] + spread * rng.normal(size=(40, 4))
    y = np.full(40, -1)
    y[[0, 3, 1, 4, 2, 5, 8]] = [4, 4, 6, 6, 9, 9, 9]
    return X, y


def by_hand(X, y, prototype="mode", laplacian=True, lam=0.7, clamp=True):
    """The algorithm of the paper, in loops over points and classes."""
    N, classes = len(X), sorted(set(y) - {-1})
    K, known = len(classes), {p: classes.index(y[p]) for p in range(N) if y[p] != -1}
    near = [sorted((q for q in range(N) if q != p), key=lambda q: ((X[p] - X[q]) ** 2).sum())[:2] for p in range(N)]
    sigma = np.sqrt(sum(((X[p] - X[q]) ** 2).sum() for p in range(N) for q in near[p]) / (5 * N))
    one_hot = np.eye(K)
    c = np.array([np.mean([X[p] for p in known if known[p] == k], axis=0) for k in range(K)])
    label = [known.get(p, int(np.argmin([((X[p] - c[k]) ** 2).sum() for k in range(K)]))) for p in range(N)]
    energies = []
    while len(energies) < 100:
        before, old = label, c
        c = np.array([_centre(X[[p for p in range(N) if label[p] == k]], old[k], sigma, prototype) for k in range(K)])
        squares = ((X[:, None] - c) ** 2).sum(2)
        a = squares if prototype == "mean" else -np.exp(-squares / (2 * sigma**2))
        if laplacian:
            Z = np.exp(-a) / np.exp(-a).sum(1, keepdims=True)
            for p, k in known.items():
                Z[p] = one_hot[k]
            last = None
            for step in range(600):
                scores = np.exp([lam * (Z[near[p][0]] + Z[near[p][1]]) - a[p] for p in range(N)])
                Z = scores / scores.sum(1, keepdims=True)
                for p, k in known.items() if clamp else ():
                    Z[p] = one_hot[k]
                pulled = np.array([Z[near[p][0]] + Z[near[p][1]] for p in range(N)])
                bound = (Z * np.log(np.maximum(Z, 1e-20)) + Z * a - lam * Z * pulled).sum()
                if step > 1 and abs(bound - last) <= 1e-7 * abs(last):
                    break
                last = bound
            label = Z.argmax(1)
        else:
            label = a.argmin(1)
        if clamp:
            label = [known.get(p, label[p]) for p in range(N)]
        if not laplacian:
            Z = one_hot[label]
        pulled = np.array([Z[near[p][0]] + Z[near[p][1]] for p in range(N)])
        energies.append((Z * a).sum() - (lam * (Z * pulled).sum() if laplacian else 0))
        if len(set(label)) < K:
            label, c = before, old
            break
        if len(energies) > 2 and abs(energies[-1] - energies[-2]) <= 1e-4 * abs(energies[-2]):
            break
    return {"labels": [classes[k] for k in label], "Z": Z, "c": c, "energies": energies, "sigma": sigma}


def _centre(members, old, sigma, prototype):
    if prototype == "mean":
        return members.mean(0)
    for _ in range(1000):
        w = np.exp(-((members - old) ** 2).sum(1) / (2 * sigma**2))
        new = (w[:, None] * members).sum(0) / w.sum()
        if abs(new - old).max() < 1e-5 * abs(old).max():
            return new
        old = new
    return new


class TestTransductiveClustering(EstimatorCase):
    exceptions = {"check_classifiers_classes": "it has -1 as a class, which here marks points without label"}  # noqa: RUF012

    def estimator(self, **changes):
        return TransductiveClustering(**changes)

    def data(self):
        return points()

    def expected(self, X, y):
        c = by_hand(X, y)["c"]
        return np.array([[4, 6, 9][k] for k in ((X[:, None] - c) ** 2).sum(2).argmin(1)])

    def grid(self):
        return {"lam": [0.1, 0.7], "prototype": ["mean", "mode"]}

    def refusals(self):
        X, y = self.data()
        nan = np.where(np.arange(4) == 2, np.nan, X)
        return [
            (ValueError, "all are -1", lambda: self.estimator().fit(X, np.full(40, -1))),
            (ValueError, "'lam'", lambda: self.estimator(lam=-0.1).fit(X, y)),
            (ValueError, "'n_neighbors'", lambda: self.estimator(n_neighbors=1).fit(X, y)),
            (ValueError, "n_samples = 40", lambda: self.estimator(n_neighbors=41).fit(X, y)),
            (ValueError, "'sigma'", lambda: self.estimator(sigma=0.0).fit(X, y)),
            (ValueError, "'median'", lambda: self.estimator(prototype="median").fit(X, y)),
            (ValueError, "(40, 40)", lambda: self.estimator(affinity=np.eye(39)).fit(X, y)),
            (ValueError, "-1", lambda: self.estimator(affinity=-np.eye(40)).fit(X, y)),
            (ValueError, "NaN", lambda: self.estimator().fit(nan, y)),
        ]


@pytest.mark.parametrize("prototype", ["mean", "mode"])
@pytest.mark.parametrize("laplacian", [True, False])
@pytest.mark.parametrize("clamp", [True, False])
def test_every_step_is_the_papers(prototype, laplacian, clamp):
    how = {"prototype": prototype, "laplacian": laplacian, "clamp": clamp}
    X, y = points()
    fitted, want = TransductiveClustering(**how).fit(X, y), by_hand(X, y, **how)
    assert fitted.transduction_.tolist() == want["labels"]
    assert fitted.n_iter_ == len(fitted.energies_)
    agrees(fitted.energies_, want["energies"], 1e-9)
    agrees(fitted.assignments_, want["Z"], 1e-9)
    agrees(fitted.prototypes_, want["c"], 1e-9)
    agrees(fitted.sigma_, float(want["sigma"]), 1e-12)
    if clamp:
        assert (fitted.transduction_[y != -1] == y[y != -1]).all()


@pytest.mark.parametrize("name", ["means", "modes", "plain"])
def test_vectors(name):
    case = vectors.load("fewshot", name)
    how, known = {**case.hyperparameters}, len(case["support"])
    shift = how.pop("shift")
    support, query = episode_features(case["support"], case["query"], normalize=False, shift=shift)
    X = np.concatenate([support, query])
    agrees(X, case["X"], case.tolerance)
    assert np.array_equal(knn_affinity(X, how["n_neighbors"]).toarray(), case["W"].numpy())
    y = np.concatenate([case["support_labels"], np.full(len(query), -1)])
    fitted = TransductiveClustering(**how).fit(X, y)
    assert fitted.sigma_ == pytest.approx(float(case["sigma"]), rel=1e-6)  # the authors keep it in float32
    agrees(fitted.prototypes_, case["prototypes"], case.tolerance)
    assert fitted.transduction_[known:].tolist() == case["predicted"].tolist()
    accuracy = (case["predicted"] == case["query_labels"]).double().mean()
    assert np.mean(fitted.transduction_[known:] == case["query_labels"].numpy()) == accuracy
    if how["laplacian"]:
        Z = bound_update(case["first_unary"], case["first_start"], sparse.csr_array(case["W"].numpy()), how["lam"])
        agrees(Z, case["first_assignment"], case.tolerance)
        agrees(fitted.assignments_, case["last_assignment"], case.tolerance)


def test_the_first_round_without_laplacian_is_one_of_lloyd():
    X, y = points()
    start = np.stack([X[y == label].mean(0) for label in (4, 6, 9)])
    peer = KMeans(3, init=start, n_init=1, max_iter=1, algorithm="lloyd").fit(X)
    how = {"prototype": "mean", "laplacian": False, "clamp": False, "max_iter": 1}
    with pytest.warns(ConvergenceWarning, match="max_iter=1 rounds"):
        fitted = TransductiveClustering(**how).fit(X, y)
    agrees(fitted.prototypes_, peer.cluster_centers_, 1e-12)


def test_a_class_that_loses_its_points_ends_the_search_as_it_was_before():
    """Two labels at one place, seven points at another: without clamping, the second class has none left."""
    X = np.array([[0.0, 0.0], [0.0, 0.1], *[[0.02 * i, 0.03] for i in range(7)]])
    y = np.array([0, 1, *[-1] * 7])
    how = {"prototype": "mean", "clamp": False, "lam": 5.0}
    fitted, want = TransductiveClustering(**how).fit(X, y), by_hand(X, y, **how)
    assert len(set(fitted.assignments_.argmax(1))) == 1, "the round in which it happened"
    assert fitted.transduction_.tolist() == want["labels"]
    assert set(fitted.transduction_) == {0, 1}
    agrees(fitted.prototypes_, want["c"], 1e-12)


def test_an_affinity_of_ones_own_decides_who_pulls():
    X, y = points()
    W = knn_affinity(X, 3)
    want = TransductiveClustering(prototype="mean").fit(X, y)
    for given in (W, W.toarray()):
        got = TransductiveClustering(prototype="mean", affinity=given).fit(X, y)
        agrees(got.assignments_, want.assignments_, 1e-12)
        assert got.sigma_ == pytest.approx(want.sigma_, rel=1e-12)
    wider = TransductiveClustering(affinity=3 * W).fit(X, y)
    assert wider.sigma_ == pytest.approx(np.sqrt(3) * want.sigma_, rel=1e-12)


def test_labels_of_strings_are_all_known():
    X, _ = points()
    names = np.array(["-1", "b", "c"])[np.arange(40) % 3]
    assert TransductiveClustering().fit(X, names).transduction_.tolist() == names.tolist()


def test_points_at_one_place_have_a_width():
    fitted = TransductiveClustering().fit(np.ones((6, 2)), [0, 1, -1, -1, -1, -1])
    assert fitted.sigma_ == 1.0
    assert fitted.transduction_.tolist() == [0, 1, 0, 0, 0, 0]  # ties go to the first class
    assert TransductiveClustering(sigma=0.3).fit(*points()).sigma_ == 0.3


def test_points_far_from_every_prototype_have_a_mode():
    X = np.array([[0.0], [0.1], [0.2], [1e4], [1e4 + 0.1], [1e4 + 0.2]])
    fitted = TransductiveClustering(sigma=1e-3).fit(X, [0, -1, -1, 1, -1, -1])
    assert np.isfinite(fitted.prototypes_).all()
