"""Fréchet means over labels, their locus and the next class to label: by loops over classes, and the authors' numbers."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import pdist, squareform

import vectors
from lowdim.represent import (
    active_selection,
    embedding_distances,
    frechet_one_hot,
    frechet_predict,
    frechet_scores,
    label_locus,
    select_next_class,
    squared_distance_risk,
)
from lowdim.testing.agreement import agrees
from lowdim.testing.result_case import ValueCase

TREES = ("tree", "tree_small")


def space(n=7, seed=0):
    """Distances between n points of a plane, and rows of probabilities over three of them."""
    rng = np.random.default_rng(seed)
    P = rng.random((5, 3)) + 0.05
    return squareform(pdist(rng.normal(size=(n, 2)))), [4, 1, 5], P / P.sum(1, keepdims=True)


class TestScores(ValueCase):
    def result(self):
        D, observed, P = space()
        return frechet_scores(P, D, observed)

    def expected(self):
        D, observed, P = space()
        return np.array([[-sum(p[k] * D[observed[k], y] ** 2 for k in range(3)) for y in range(7)] for p in P])

    def refusals(self):
        D, observed, P = space()
        f = frechet_scores
        return [
            (ValueError, "(B, 3), a column for each observed class; got shape (5, 2)", lambda: f(P[:, :2], D, observed)),
            (ValueError, "(B, 7)", lambda: f(P, D)),
            (ValueError, "(B, 3)", lambda: f(P[0], D, observed)),
            (ValueError, "the least is -2", lambda: f(np.where(P.max() == P, -2, P), D, observed)),
            (ValueError, "probabilities has NaN", lambda: f(P * np.nan, D, observed)),
            (ValueError, "at least one class", lambda: f(P, D, [])),
            (ValueError, "class 1 is there more than once", lambda: f(P, D, [1, 4, 1])),
            (ValueError, "in [0, 7); got 7", lambda: f(P, D, [1, 7, 4])),
            (ValueError, "in [0, 7); got -1", lambda: f(P, D, [1, -1, 4])),
            (ValueError, "must be integers", lambda: f(P, D, [1.0, 2.0, 4.0])),
            (ValueError, "must be integers", lambda: f(P, D, np.array([True, False, True]))),
            (ValueError, "must be integers", lambda: f(P, D, ["cat", "dog", "cow"])),
            (ValueError, "square", lambda: f(P, D[:6], observed)),
            (ValueError, "symmetric", lambda: f(P, np.triu(D), observed)),
            (ValueError, "0 on the diagonal", lambda: f(P, D + np.eye(7), observed)),
            (ValueError, "not be negative", lambda: f(P, -D, observed)),
        ]


class TestPredict(ValueCase):
    def result(self):
        D, observed, P = space()
        return frechet_predict(P, D, observed)

    def expected(self):
        D, observed, P = space()
        return np.array([min(range(7), key=lambda y: sum(p[k] * D[observed[k], y] ** 2 for k in range(3))) for p in P])

    def refusals(self):
        D, observed, P = space()
        return [(ValueError, "logits", lambda: frechet_predict(P - 1, D, observed))]


class TestEmbeddingDistances(ValueCase):
    def embeddings(self):
        return np.random.default_rng(0).normal(size=(9, 4)) + 1e4

    def result(self):
        return embedding_distances(self.embeddings())

    def expected(self):
        E = self.embeddings()
        return np.array([[np.sqrt(sum((a - b) ** 2)) for b in E] for a in E])

    def refusals(self):
        E = self.embeddings()
        return [
            (ValueError, "(N, d)", lambda: embedding_distances(E[0])),
            (ValueError, "not empty", lambda: embedding_distances(E[:0])),
            (ValueError, "NaN", lambda: embedding_distances(E * np.inf)),
        ]

    def test_it_is_symmetric_to_the_bit(self):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            D = embedding_distances(torch.randn(40, 70, generator=torch.Generator().manual_seed(0)).to(dtype))
            assert D.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(D, D.T)
            assert not D.diagonal().any()
        assert embedding_distances(np.array([[0, 0], [3, 4]])).tolist() == [[0.0, 5.0], [5.0, 0.0]]


class TestRisk(ValueCase):
    truth, found = (0, 3, 2, 6), (0, 1, 5, 6)

    def result(self):
        return squared_distance_risk(self.truth, torch.tensor(self.found), space()[0])

    def expected(self):
        D = space()[0]
        return float(np.mean([D[a, b] ** 2 for a, b in zip(self.truth, self.found)]))

    def refusals(self):
        D = space()[0]
        return [
            (ValueError, "equal length; got 2 and 1", lambda: squared_distance_risk([0, 1], [0], D)),
            (ValueError, "y_true must be a list of at least one", lambda: squared_distance_risk([], [], D)),
            (ValueError, "y_pred must be rows of distances in [0, 7); got 7", lambda: squared_distance_risk([0], [7], D)),
        ]


class TestSelection(ValueCase):
    """Weights found by minimising the regret of a class decide the locus; gains by brute force over them."""

    def problem(self):
        rng = np.random.default_rng(4)
        return squareform(pdist(rng.normal(size=(9, 2)))), [0, 3]

    def result(self):
        D, observed = self.problem()
        return active_selection(D, observed, strategy="largest_locus", budget=2)

    def expected(self):
        D, observed = self.problem()
        sizes, chosen = [int(in_locus(D, observed).sum())], []
        for _ in range(2):
            gains = {y: int(in_locus(D, [*observed, *chosen, y]).sum()) for y in range(9) if y not in [*observed, *chosen]}
            chosen.append(max(gains, key=lambda y: (gains[y], -y)))
            sizes.append(gains[chosen[-1]])
        return (chosen, sizes)

    def refusals(self):
        D, observed = self.problem()
        return [
            (ValueError, "strategy", lambda: select_next_class(D, observed, strategy="random")),
            (ValueError, "method", lambda: label_locus(D, observed, method="sample")),
            (ValueError, "estimator", lambda: frechet_one_hot(np.ones((1, 9)), D, estimator="softmax")),
            (ValueError, "eta", lambda: frechet_one_hot(np.ones((1, 9)), D, eta=0.0)),
            (ValueError, "budget", lambda: active_selection(D, observed, budget=-1)),
            (ValueError, "tol", lambda: label_locus(D, observed, tol=-1.0)),
            (ValueError, "nothing to select", lambda: select_next_class(D, range(9))),
            (ValueError, "observed", lambda: select_next_class(D, [9])),
        ]


def in_locus(D, observed):
    """Whether each class is the mean for some weights, from a fine grid over pairs and triples of the observed ones."""
    steps = np.linspace(0, 1, 401)
    weights = [np.array([[s, 1 - s] for s in steps])]
    coarse = np.linspace(0, 1, 81)
    weights.append(np.array([[s, t, 1 - s - t] for s in coarse for t in coarse if s + t <= 1]))
    best = np.zeros(len(D), dtype=bool)
    for some in weights:
        for group in itertools.combinations(observed, some.shape[1]):
            best[(some @ D[list(group)] ** 2).argmin(1)] = True
    return best


@pytest.mark.parametrize("name", TREES)
def test_vectors_of_trees(name):
    case = vectors.load("loki", name)
    D, observed = case["distances"], case["observed"]
    graph = np.full((len(D), len(D)), np.inf)
    for a, b in case["edges"].tolist():
        graph[a, b] = graph[b, a] = D[a, b]
    for k in range(len(D)):  # the distances are lengths of paths along the edges
        graph = np.minimum(graph, graph[:, [k]] + graph[[k]])
    assert np.allclose(graph[graph != np.diag(graph)[:, None]], D.numpy()[graph != np.diag(graph)[:, None]], rtol=1e-12)
    case.close(frechet_scores(case["probabilities"], D, observed), "scores")
    assert frechet_predict(case["probabilities"], D, observed).tolist() == case["predicted"].tolist()
    for method in ("tree", "lp"):
        assert torch.equal(label_locus(D, observed, method=method), case["locus"])
    selected, sizes = active_selection(D, observed, method="tree")
    assert len(selected) == len(sizes) - 1
    assert selected == case["selection"].tolist()[: len(selected)]
    assert sizes == case["locus_sizes"].tolist()
    for estimator in ("straight_through", "negative", "polytope"):
        P = case["full_probabilities"].clone().requires_grad_()
        one_hot = frechet_one_hot(P, D, estimator=estimator, eta=case.hyperparameters["polytope_eta"])
        assert torch.equal(one_hot, case["one_hot"])
        case.close(torch.autograd.grad(one_hot, P, case["grad_output"])[0], f"grad_{estimator}")


def test_vectors_of_a_euclidean_space():
    case = vectors.load("loki", "euclidean")
    D, observed = case["distances"], case["observed"]
    case.close(frechet_scores(case["probabilities"], D, observed), "scores")
    assert frechet_predict(case["probabilities"], D, observed).tolist() == case["predicted"].tolist()
    assert torch.equal(label_locus(D, observed), case["locus"])
    assert select_next_class(D, observed) == int(case["farthest"])
    best = select_next_class(D, observed, strategy="largest_locus")
    assert best == int(case["gain"].argmax())
    sizes = active_selection(D, observed, strategy="largest_locus", budget=1)[1]
    assert sizes[1] == int(case["largest_locus_size"]) == int(case["gain"].max())
    for y, gain in enumerate(case["gain"].tolist()):
        if gain < 0:
            assert y in observed.tolist()
        else:
            assert int(label_locus(D, [*observed.tolist(), y]).sum()) == gain


def test_the_projection_is_the_nearest_point_of_the_simplex():
    D, _, _ = space(4)
    P, g = torch.tensor([[0.1, 0.2, 0.3, 0.4]], requires_grad=True), torch.tensor([[1.0, -2.0, 0.5, 0.1]])
    one_hot = frechet_one_hot(P, D, estimator="polytope", eta=0.7)
    got = torch.autograd.grad(one_hot, P, g)[0]
    target = (one_hot.detach() - 0.7 * g)[0].double().numpy()
    rules = {"type": "eq", "fun": lambda v: v.sum() - 1}
    nearest = minimize(lambda v: ((v - target) ** 2).sum(), np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=rules, tol=1e-12)
    agrees(got, one_hot.detach().numpy() - nearest.x, 1e-5)


def test_a_model_learns_through_the_mean():
    """Straight through, the loss of a linear model falls until its predictions are right."""
    place = torch.arange(4.0)
    D, X, y = (place[:, None] - place).abs(), torch.eye(4), torch.tensor([3, 2, 1, 0])
    W = torch.zeros(4, 4, requires_grad=True)
    for _ in range(30):
        one_hot = frechet_one_hot((X @ W).softmax(1), D)
        (grad,) = torch.autograd.grad((one_hot * D[y].square()).sum(), W)
        W = (W - 0.5 * grad).detach().requires_grad_()
    assert frechet_predict((X @ W).softmax(1), D).tolist() == y.tolist()


def test_argmax_is_the_mean_of_a_space_without_geometry():
    P = np.random.default_rng(0).dirichlet(np.ones(6), size=50)
    assert np.array_equal(frechet_predict(P, 1 - np.eye(6)), P.argmax(1))
    assert np.array_equal(frechet_predict(7.5 * P, 1 - np.eye(6)), P.argmax(1))
    assert label_locus(1 - np.eye(6), [2, 4]).tolist() == [False, False, True, False, True, False]
    assert active_selection(1 - np.eye(4), [2]) == ([0, 1, 3], [1, 2, 3, 4])


def test_kinds_dtypes_and_sizes():
    D, observed, P = space()
    want = frechet_scores(P, D, observed)
    assert isinstance(want, np.ndarray)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = torch.from_numpy(P).to(dtype).requires_grad_()
        got = frechet_scores(given, torch.from_numpy(D).to(dtype), torch.tensor(observed))
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        agrees(got.detach(), want, {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.03}[dtype])
        agrees(torch.autograd.grad(got[0, 2], given)[0][0].double(), -(D[observed, 2] ** 2), 0.03)
        one_hot = frechet_one_hot(torch.eye(7, dtype=dtype), D)
        assert one_hot.dtype == dtype
        assert torch.equal(one_hot, torch.eye(7, dtype=dtype))
    assert frechet_predict(torch.from_numpy(P), D, observed).dtype == torch.int64
    assert isinstance(frechet_one_hot(np.eye(7), D), np.ndarray)
    assert frechet_predict(np.empty((0, 3)), D, observed).shape == (0,)
    assert frechet_predict([[0.3]], [[0.0]]).tolist() == [0]
    assert frechet_predict([[1, 3], [2, 2]], [[0, 1], [1, 0]]).tolist() == [1, 0], "whole numbers, and the first on a tie"


def test_the_locus_in_float32_and_with_classes_at_one_place():
    place = np.array([0.0, 0.1, 0.3, 0.3, 0.7, 0.9, 0.9])
    D = abs(place[:, None] - place)
    for dtype in (torch.float32, torch.float64):
        for method in ("tree", "lp"):
            found = label_locus(torch.from_numpy(D).to(dtype), [1, 5], method=method)
            assert found.tolist() == [False] + 6 * [True], (dtype, method)
    assert label_locus(D, [2]).tolist() == [False, False, True, True, False, False, False]
    assert label_locus(np.zeros((3, 3)), [1]).all()
    assert active_selection(np.zeros((3, 3)), [1]) == ([], [3])
    assert active_selection(D, [2], budget=0) == ([], [2])
