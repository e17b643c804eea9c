import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vectors
from lowdim.represent import adaptive_retrieve, funnel_retrieve
from lowdim.represent.core import neighbours
from lowdim.represent.matryoshka import retrieval
from lowdim.testing.result_case import ResultCase


def data(q=7, n=60, d=16, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(q, d, generator=g, dtype=torch.float64).to(dtype), torch.randn(
        n, d, generator=g, dtype=torch.float64
    ).to(dtype)


def brute(q, d, size):
    return torch.cdist(F.normalize(q[:, :size], dim=1), F.normalize(d[:, :size], dim=1))


@pytest.mark.parametrize("name", ["funnel", "adaptive"])
def test_vectors(name):
    case = vectors.load("mrl", name)
    h = case.hyperparameters
    result = funnel_retrieve(case["queries"], case["database"], **h)
    assert torch.equal(result.indices, case["indices"])
    assert result.mflops == pytest.approx(float(case["mflops"]), rel=1e-12)
    if name == "adaptive":
        one = {"retrieval_dim": h["retrieval_dim"], "rerank_dim": h["rerank_dims"][0], "shortlist": h["shortlists"][0]}
        assert torch.equal(adaptive_retrieve(case["queries"], case["database"], **one).indices, case["indices"])


def test_shortlist_then_order():
    q, d = data()
    result = adaptive_retrieve(q, d, retrieval_dim=4, rerank_dim=16, shortlist=20, k=5)
    for i in range(len(q)):
        short = brute(q, d, 4)[i].argsort()[:20]
        fine = brute(q, d, 16)[i, short]
        assert result.indices[i].tolist() == short[fine.argsort()[:5]].tolist()
        assert torch.allclose(result.distances[i], fine.sort().values[:5])
    assert result.mflops == (60 * 4 + 20 * 16) / 1e6


@pytest.mark.parametrize("search", [1, 30, 1000])  # database rows at a time: 1, 7, all 60
@pytest.mark.parametrize("rerank", [1, 1000])
def test_blocks_do_not_change_the_result(monkeypatch, search, rerank):
    q, d = data()
    want = adaptive_retrieve(q, d, retrieval_dim=4, rerank_dim=16, shortlist=20)
    for module, name, value in ((neighbours, "_SEARCH", search), (retrieval, "_RERANK", rerank), (neighbours, "_LEAST", 0)):
        monkeypatch.setattr(module, name, value)
    got = adaptive_retrieve(q, d, retrieval_dim=4, rerank_dim=16, shortlist=20)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.distances, want.distances)


def test_memory_stays_within_blocks(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    monkeypatch.setattr(neighbours, "_SEARCH", 4096)
    monkeypatch.setattr(retrieval, "_RERANK", 4096)
    q, d = data(q=200, n=500, d=16)
    with Largest() as mode:
        adaptive_retrieve(q, d, retrieval_dim=8, rerank_dim=16, shortlist=10)
    assert mode.numel <= 500 * 16  # the database itself; a (Q, N) matrix would have 100,000


def test_exact_search_equals_scikit_learn():
    neighbours = pytest.importorskip("sklearn.neighbors", reason="the peer's exact search needs scikit-learn")
    q, d = data(40, 300)
    result = adaptive_retrieve(q, d, retrieval_dim=8, rerank_dim=8, shortlist=10)
    unit = [F.normalize(x[:, :8], dim=1).numpy() for x in (q, d)]
    distances, indices = neighbours.NearestNeighbors(n_neighbors=10, algorithm="brute").fit(unit[1]).kneighbors(unit[0])
    assert np.array_equal(result.indices.numpy(), indices)
    assert np.allclose(result.distances.numpy(), distances, atol=1e-7)


def test_ties_keep_their_order():
    d = torch.eye(4)[[0, 1, 0, 1, 0]]
    result = adaptive_retrieve(d[:1], d, retrieval_dim=2, rerank_dim=4, shortlist=5)
    assert result.indices.tolist() == [[0, 2, 4, 1, 3]]


def test_reordering_keeps_the_incoming_order_of_ties():
    # At size 1 row 1 is nearer than row 0; at size 2 both are equally far from the query.
    d = torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    q2 = F.normalize(d.sum(0, keepdim=True), dim=1)
    assert adaptive_retrieve(q, d, retrieval_dim=2, rerank_dim=2).indices.tolist() == [[1, 0]]
    ranked = funnel_retrieve(q2, d, retrieval_dim=1, rerank_dims=[1, 1], shortlists=[2, 2])
    assert ranked.indices.tolist() == [[0, 1]]  # size 1: all at distance 0 after normalising


def test_zero_vectors_stay_zero():
    q, d = data()
    d[3] = 0
    d[4, :4] = 0  # zero only when cut
    result = adaptive_retrieve(torch.cat([q, q[:1] * 0]), d, retrieval_dim=4, rerank_dim=16, shortlist=60)
    assert torch.isfinite(result.distances).all()
    assert float(result.distances[0][result.indices[0] == 3]) == pytest.approx(1.0)


def test_a_zero_vector_is_nearer_than_one_at_more_than_60_degrees():
    query, database = torch.eye(2)[:1], torch.tensor([[0.3, (1 - 0.09) ** 0.5], [0.0, 0.0], [0.6, 0.8]])
    ranked = adaptive_retrieve(query, database, retrieval_dim=2, rerank_dim=2, shortlist=2)
    assert ranked.indices.tolist() == [[2, 1]]
    assert ranked.distances[0].tolist() == pytest.approx([0.8**0.5, 1.0])  # √(2 − 2 cos), and the query's own length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_distances_are_float32(dtype):
    q, d = data(dtype=dtype)
    result = adaptive_retrieve(q, d, retrieval_dim=16, rerank_dim=16, shortlist=5)
    assert result.distances.dtype == torch.float32
    assert torch.allclose(result.distances.double(), brute(q.double(), d.double(), 16).sort(1).values[:, :5], atol=1e-5)


def test_distances_have_no_cancellation_in_float32():
    q, _ = data(1, dtype=torch.float32)
    d = q + 1e-4 * torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    got = adaptive_retrieve(q, d, retrieval_dim=16, rerank_dim=16, shortlist=30).distances.double()
    assert torch.allclose(got, brute(q.double(), d.double(), 16).sort(1).values, rtol=5e-3)


def test_lists_longer_than_the_database_are_cut_and_numpy_is_accepted():
    q, d = data(n=6)
    result = adaptive_retrieve(q.numpy(), d.numpy(), retrieval_dim=4, rerank_dim=8)
    assert result.indices.shape == (7, 6)
    assert result.mflops == (6 * 4 + 6 * 8) / 1e6
    assert result.to_dict()["indices"] == result.indices.tolist()
    funnel = funnel_retrieve(q, d, retrieval_dim=2, rerank_dims=[4, 8], shortlists=[50, 3])
    assert funnel.indices.shape == (7, 3)


class TestAdaptive(ResultCase):
    stages = ((16, 20),)  # (size, length of the list that is reordered)

    def result(self):
        return adaptive_retrieve(*data(), retrieval_dim=4, rerank_dim=16, shortlist=20, k=5)

    def expected(self):
        queries, database = (array.numpy() for array in data())
        far = {}  # size -> distances (7, 60)
        for size in (4, 8, 16):
            q, d = (x[:, :size] / np.linalg.norm(x[:, :size], axis=1, keepdims=True) for x in (queries, database))
            far[size] = np.linalg.norm(q[:, None] - d, axis=2)
        found = np.argsort(far[4], axis=1)
        for size, length in self.stages:
            found = found[:, :length]
            found = np.take_along_axis(found, np.argsort(np.take_along_axis(far[size], found, 1), axis=1), 1)
        return {
            "indices": found[:, :5],
            "distances": np.take_along_axis(far[16], found[:, :5], 1),
            "mflops": (60 * 4 + sum(size * length for size, length in self.stages)) / 1e6,
        }

    def refusals(self):
        q, d = data()
        bad = d.clone()
        bad[5, 15] = float("nan")

        def adaptive(queries=q, database=d, **kw):
            return adaptive_retrieve(queries, database, **{"retrieval_dim": 4, "rerank_dim": 16, "shortlist": 60, **kw})

        return [
            (ValueError, "retrieval_dim", lambda: adaptive(retrieval_dim=17)),
            (ValueError, "rerank_dim", lambda: adaptive(rerank_dim=0)),
            (ValueError, "shortlist", lambda: adaptive(shortlist=0)),
            (ValueError, "k must", lambda: adaptive(shortlist=3, k=4)),
            (ValueError, "equally many columns", lambda: adaptive(queries=q[:, :8])),
            (ValueError, "(16,)", lambda: adaptive(queries=q[0])),
            (ValueError, "empty", lambda: adaptive(database=d[:0])),
            (TypeError, "floating point", lambda: adaptive(queries=q.long())),
            (ValueError, "NaN", lambda: adaptive(database=bad)),
            (ValueError, "queries", lambda: adaptive(queries=q * float("inf"))),
            (ValueError, "same length", lambda: funnel_retrieve(q, d, rerank_dims=[8], shortlists=[4, 2])),
            (ValueError, "same length", lambda: funnel_retrieve(q, d, rerank_dims=[], shortlists=[])),
            (ValueError, "grow", lambda: funnel_retrieve(q, d, rerank_dims=[8, 16], shortlists=[4, 5])),
            (ValueError, "rerank_dims", lambda: funnel_retrieve(q, d)),  # the defaults are for 2048 coordinates
        ]


class TestFunnel(TestAdaptive):
    stages = ((8, 20), (16, 5))

    def result(self):
        return funnel_retrieve(*data(), retrieval_dim=4, rerank_dims=[8, 16], shortlists=[20, 5])
