"""The first search of a funnel by an index of another library, against the exact search."""

import numpy as np
import pytest
import torch

from lowdim.represent import adaptive_retrieve, funnel_retrieve, index_bytes, nested_index

ROWS, SIZE, DIM = 400, 24, 6


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    database = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    return (database[::40] + 0.3 * torch.randn(10, SIZE, generator=generator, dtype=torch.float64)).to(dtype), database.to(
        dtype
    )


def flat(database, dim=DIM):
    faiss = pytest.importorskip("faiss", reason="an index of faiss")
    index = faiss.IndexFlatL2(dim)
    cut = database[:, :dim].float().numpy()
    index.add(cut / np.linalg.norm(cut, axis=1, keepdims=True))
    return index


def searches(q, d, **more):
    yield adaptive_retrieve(q, d, retrieval_dim=DIM, rerank_dim=SIZE, shortlist=30, k=5, **more)
    yield funnel_retrieve(q, d, retrieval_dim=DIM, rerank_dims=[12, SIZE], shortlists=[30, 5], **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_index_finds_what_the_exact_search_finds(dtype):
    q, d = data(dtype)
    for got, want in zip(searches(q, d, index=flat(d)), searches(q, d)):
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.distances, want.distances)
        assert got.mflops == pytest.approx(want.mflops - ROWS * DIM / 1e6)  # the index does the first search


@pytest.mark.parametrize("library", ["faiss", "usearch"])
def test_graphs_find_nearly_all(library):
    pytest.importorskip(library)
    q, d = data()
    index = nested_index(d, DIM, library=library)
    (got, _), (want, _) = searches(q, d, index=index), searches(q, d)
    hits = (got.indices[:, :, None] == want.indices[:, None]).any(1)
    assert float(hits.double().mean()) >= 0.95
    assert got.indices[:, 0].tolist() == list(range(0, ROWS, 40))
    assert index_bytes(index) >= 4 * ROWS * DIM
    one = adaptive_retrieve(q[:1], d, retrieval_dim=DIM, rerank_dim=SIZE, shortlist=30, k=5, index=index)
    assert torch.equal(one.indices, got.indices[:1])


def test_any_function_that_finds_rows():
    q, d = data()
    asked = []

    def find(queries, k):
        asked.append((queries.dtype, queries.shape, k, np.linalg.norm(queries, axis=1)))
        return np.tile(np.arange(k), (len(queries), 1))

    found = adaptive_retrieve(q, d, retrieval_dim=DIM, rerank_dim=SIZE, shortlist=3, index=find)
    assert np.sort(found.indices.numpy(), axis=1).tolist() == [[0, 1, 2]] * len(q)
    ((dtype, shape, k, lengths),) = asked
    assert (dtype, shape, k) == (np.float32, (len(q), DIM), 3)
    assert lengths == pytest.approx(np.ones(len(q)))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (lambda d: flat(d[:-1]), ValueError, "must hold the 400 rows of database with retrieval_dim = 6 .*; it has 399 with 6"),
        (lambda d: flat(d, 5), ValueError, "it has 400 with 5"),
        (lambda d: lambda q, k: np.full((len(q), k), -1), ValueError, "must find 30 rows of database .*got -1.*efSearch"),
        (lambda d: lambda q, k: np.full((len(q), k), ROWS), ValueError, "got 400"),
        (lambda d: lambda q, k: np.zeros((len(q), k - 1)), ValueError, "got 29 columns"),
        (lambda d: "index.faiss", TypeError, "must be of faiss or usearch, or a function .*; got str"),
    ],
)
def test_wrong_indexes(index, error, message):
    q, d = data()
    with pytest.raises(error, match=message):
        next(searches(q, d, index=index(d)))


def test_other_wrong_uses():
    q, d = data()
    with pytest.raises(ValueError, match="queries has NaN"):
        next(searches(q * np.nan, d, index=lambda q, k: None))
    with pytest.raises(ValueError, match="library must be one of faiss, usearch; got 'annoy'"):
        nested_index(d, DIM, library="annoy")
    with pytest.raises(ValueError, match="dim"):
        nested_index(d, SIZE + 1)
    with pytest.raises(ValueError, match=r"must be \(N, D\)"):
        nested_index(d[0], 1)
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="database has NaN"):
        nested_index(d * np.nan, DIM)
    with pytest.raises(TypeError, match="faiss or usearch; got list"):
        index_bytes([])
