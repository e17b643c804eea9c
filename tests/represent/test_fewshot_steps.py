"""What SLK is made of: features of an episode, the graph of neighbours, the update of soft assignments."""

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from lowdim.represent import bound_update, episode_features, knn_affinity
from lowdim.represent.fewshot import neighbours
from lowdim.testing.result_case import ValueCase


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class TestEpisodeFeatures(ValueCase):
    def result(self):
        return episode_features(draw(3, 4), draw(5, 4, seed=1) + 2, base_mean=[1.0, 0.0, 2.0, 0.5])

    def expected(self):
        mean = np.array([1.0, 0.0, 2.0, 0.5])
        s, q = draw(3, 4) - mean, draw(5, 4, seed=1) + 2 - mean
        s, q = (x / np.sqrt((x**2).sum(1))[:, None] for x in (s, q))
        return (s, q + s.mean(0) - q.mean(0))

    def refusals(self):
        x = draw(3, 4)
        return [
            (ValueError, "the 4 features", lambda: episode_features(x, x[:, :3])),
            (ValueError, "query", lambda: episode_features(x, x[0])),
            (ValueError, "support", lambda: episode_features(x[:0], x)),
            (ValueError, "base_mean must have 4", lambda: episode_features(x, x, base_mean=[1.0])),
            (ValueError, "query has NaN", lambda: episode_features(x, x * np.nan)),
        ]


class TestBoundUpdate(ValueCase):
    held = np.array([True, False, False, False, False])

    def problem(self):
        start = np.abs(draw(5, 3, seed=1)) + 0.1
        W = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 1], [0, 0, 1, 1, 0.0]])
        return draw(5, 3), start / start.sum(1, keepdims=True), W

    def result(self):
        return bound_update(*self.problem(), 0.4, max_iter=4, tol=0.0, clamped=self.held)

    def expected(self):
        a, Z, W = self.problem()
        first = Z[0]
        for _ in range(4):
            scores = [[np.exp(-a[p, k] + 0.4 * sum(W[p, q] * Z[q, k] for q in range(5))) for k in range(3)] for p in range(5)]
            Z = np.array(scores) / np.sum(scores, axis=1, keepdims=True)
            Z[0] = first
        return Z

    def refusals(self):
        a, Z, W = self.problem()
        return [
            (ValueError, "(5, 2)", lambda: bound_update(a, Z[:, :2], W, 0.4)),
            (ValueError, "(5, 5)", lambda: bound_update(a, Z, W[:4], 0.4)),
            (ValueError, "lam", lambda: bound_update(a, Z, W, -1.0)),
            (ValueError, "max_iter", lambda: bound_update(a, Z, W, 0.4, max_iter=0)),
            (ValueError, "tol", lambda: bound_update(a, Z, W, 0.4, tol=-1.0)),
            (ValueError, "5 booleans", lambda: bound_update(a, Z, W, 0.4, clamped=[0])),
        ]


def test_it_stops_when_the_bound_stands_and_never_before_the_third_update():
    a, Z, W = TestBoundUpdate().problem()
    three = bound_update(a, Z, W, 0.4, tol=1e9)
    assert np.array_equal(three, bound_update(a, Z, W, 0.4, max_iter=3, tol=0.0))
    settled = bound_update(a, Z, W, 0.4, tol=0.0)
    assert np.abs(bound_update(a, settled, sparse.csr_array(W), 0.4, max_iter=1) - settled).max() < 1e-12


def test_features_keep_their_kind():
    s, q = torch.tensor(draw(3, 4)).bfloat16(), torch.tensor(draw(5, 4, seed=1)).float()
    got = episode_features(s, q)
    assert [type(x) for x in got] == [torch.Tensor] * 2
    assert [x.dtype for x in got] == [torch.float64] * 2
    assert np.allclose(episode_features(s.double().numpy(), q.numpy())[1], got[1], atol=1e-15)
    zeros, _ = episode_features(np.zeros((2, 3)), draw(4, 3), shift=False)
    assert not zeros.any()


def test_a_point_is_never_its_own_neighbour():
    X = np.repeat(draw(3, 2), 4, axis=0)  # four points at each of three places
    W = knn_affinity(torch.tensor(X), 4)
    assert W.diagonal().sum() == 0
    assert np.array_equal(W.toarray(), np.kron(np.eye(3), np.ones((4, 4))) - np.eye(12))
    line = knn_affinity([[0.0], [1.0], [3.0], [3.5]], 2).toarray()
    assert np.array_equal(line.argmax(1), [1, 0, 3, 2])
    for wrong in (1, 5, 2.0):
        with pytest.raises(ValueError, match=r"n_neighbors must be an int in \[2, 4\]"):
            knn_affinity(draw(4, 2), wrong)
    with pytest.raises(ValueError, match="NaN"):
        knn_affinity([[0.0], [np.nan], [1.0]], 2)


@pytest.mark.parametrize("count", [1, 3])
def test_the_search_in_float32_is_exact(count):
    """Far from the origin, at two scales, with points at one place: what float32 cannot tell is searched again."""
    X = 1e3 * draw(4200, 16) + 1e5
    X[100:103] = X[50]
    X[200:260] = X[200] + 1e-4 * draw(60, 16, seed=1)
    near = neighbours.nearest_others(X, count)
    want, _ = NearestNeighbors(n_neighbors=count).fit(X).kneighbors()
    got = np.sort(np.linalg.norm(X[:, None] - X[near], axis=2), axis=1)
    assert np.abs(got - np.sort(want)).max() < 1e-6 * 1e3
    assert not (near == np.arange(4200)[:, None]).any()
    assert all(len(set(row)) == count for row in near.tolist())
    _, proved = neighbours._in_float32(torch.from_numpy(X), count)
    assert 0.9 < proved.double().mean() < 1.0
    assert not proved[200:260].any()
