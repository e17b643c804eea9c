"""Nearest neighbours with nested embeddings: search at a small size, then reorder a shortlist at larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg import compute_dtype
from lowdim.represent.core.neighbours import nearest, unit
from lowdim.represent.matryoshka.indexes import of_index
from lowdim.results import Result

__all__ = ["RetrievalResult", "adaptive_retrieve", "funnel_retrieve"]

_RERANK = 1 << 20  # numbers in a block of candidates; several passes go over it, so it should stay in cache


@dataclass(frozen=True)
class RetrievalResult(Result):
    """Neighbours of each query, nearest first."""

    indices: Tensor  # (Q, k) int64, rows of the database
    distances: Tensor  # (Q, k) L2 between unit vectors at the last size, ascending
    mflops: float  # per query; without the first search where an index does it

    def rows(self) -> list[dict[str, Any]]:
        """A row for each neighbour of each query, nearest first."""
        return [
            {"query": q, "place": place, "index": index, "distance": distance}
            for q, (indices, distances) in enumerate(zip(self.indices.tolist(), self.distances.tolist()))
            for place, (index, distance) in enumerate(zip(indices, distances))
        ]


def adaptive_retrieve(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    *,
    retrieval_dim: int,
    rerank_dim: int,
    shortlist: int = 200,
    k: int | None = None,
    index: Any = None,
) -> RetrievalResult:
    """Search at `retrieval_dim`, reorder the shortlist at `rerank_dim`.

    Formula: exact L2 search between `normalize(q[:m])` and `normalize(d[:m])`, then the shortlist is sorted by the same
    distance at the larger size (stable: ties keep their order).
    `MFLOPs/query = (N · retrieval_dim + shortlist · rerank_dim) / 1e6`.

    Args:
        queries: `(Q, D)`. numpy arrays are accepted too.
        database: `(N, D)`.
        retrieval_dim: size of the first search, in [1, D].
        rerank_dim: size of the reordering, in [1, D].
        shortlist: candidates kept by the first search, at most N.
        k: number of results, at most `shortlist`; None returns the whole list.
        index: does the first search in place of an exact one: an index of faiss or usearch over
            `normalize(database[:, :retrieval_dim])` in row order (`nested_index` makes one), or a function
            `(queries (Q, retrieval_dim) in float32, shortlist) -> rows (Q, shortlist)`. What it misses is lost.

    Returns:
        RetrievalResult with `indices (Q, k)`, `distances (Q, k)` in float32 or better, `mflops`. Memory stays at
        blocks of queries times blocks of database rows.

    Raises:
        ValueError: shapes that do not fit, sizes beyond D, `k` beyond the shortlist, NaN or infinite entries.

    Example:
        >>> import torch
        >>> from lowdim.represent import adaptive_retrieve
        >>> database = torch.eye(6)
        >>> adaptive_retrieve(database[:2], database, retrieval_dim=4, rerank_dim=6, shortlist=3, k=1).indices.tolist()
        [[0], [1]]

    Not for embeddings that were not trained to be truncated: project those with PCA first. For millions of rows give an
    `index`.

    Source: Kusupati et al., NeurIPS 2022, arXiv 2205.13147, section 4.3.
    """
    check_int("shortlist", shortlist, 1)
    if k is not None:
        check_int("k", k, 1, shortlist)
    return _retrieve(queries, database, retrieval_dim, [rerank_dim], [shortlist], k, "rerank_dim", index)


def funnel_retrieve(
    queries: Tensor,  # (Q, D)
    database: Tensor,  # (N, D)
    *,
    retrieval_dim: int = 8,
    rerank_dims: Sequence[int] = (16, 32, 64, 128, 2048),
    shortlists: Sequence[int] = (200, 100, 50, 25, 10),
    index: Any = None,
) -> RetrievalResult:
    """Search at `retrieval_dim`, then shrink the list while the size grows.

    Formula: for i = 1, 2, …: keep the first `shortlists[i]`, reorder them at `rerank_dims[i]`.
    `MFLOPs/query = (N · retrieval_dim + Σ_i shortlists[i] · rerank_dims[i]) / 1e6`.

    Args:
        queries, database, retrieval_dim, index: as in adaptive_retrieve.
        rerank_dims: one size per stage.
        shortlists: one length per stage, never growing; at most N rows are kept.

    Returns:
        RetrievalResult with `k = shortlists[-1]` columns.

    Raises:
        ValueError: `rerank_dims` and `shortlists` empty, of unlike length, or shortlists that grow; sizes beyond D.

    Example:
        >>> import torch
        >>> from lowdim.represent import funnel_retrieve
        >>> x = torch.eye(8)
        >>> funnel_retrieve(x[:1], x, retrieval_dim=4, rerank_dims=[6, 8], shortlists=[4, 1]).indices.tolist()
        [[0]]

    Use adaptive_retrieve if there are only two sizes.

    Source: Kusupati et al., NeurIPS 2022, arXiv 2205.13147, section 4.3.1.
    """
    sizes, lengths = list(rerank_dims), list(shortlists)
    if not sizes or len(sizes) != len(lengths):
        raise ValueError(
            f"rerank_dims and shortlists must have the same length, at least 1; got {len(sizes)} and {len(lengths)}: "
            f"{sizes} and {lengths}"
        )
    for length in lengths:
        check_int("shortlists", length, 1)
    if any(a < b for a, b in pairwise(lengths)):
        raise ValueError(f"shortlists must not grow; got {lengths}")
    return _retrieve(queries, database, retrieval_dim, sizes, lengths, None, "rerank_dims", index)


@torch.no_grad()
def _retrieve(
    queries: Tensor,
    database: Tensor,
    retrieval_dim: int,
    sizes: list[int],
    lengths: list[int],
    k: int | None,
    sizes_name: str,
    index: Any,
) -> RetrievalResult:
    q, d = torch.as_tensor(queries), torch.as_tensor(database)
    if q.ndim != 2 or d.ndim != 2 or q.shape[1] != d.shape[1]:
        raise ValueError(
            f"queries (Q, D) and database (N, D) must have equally many columns; got {tuple(q.shape)} and {tuple(d.shape)}"
        )
    rows, width = d.shape
    if rows == 0 or len(q) == 0:
        raise ValueError(f"queries and database must not be empty; got {len(q)} and {rows} rows")
    check_int("retrieval_dim", retrieval_dim, 1, width)
    for size in sizes:
        check_int(sizes_name, size, 1, width)
    if not (q.is_floating_point() and d.is_floating_point()):
        raise TypeError(f"queries and database must be floating point; got {q.dtype} and {d.dtype}")
    dtype = compute_dtype(torch.promote_types(q.dtype, d.dtype))
    lengths = [min(length, rows) for length in lengths]

    if index is None:
        indices = nearest(q, d, retrieval_dim, lengths[0], dtype)
    else:
        indices = of_index(index, unit(q, retrieval_dim, dtype), lengths[0], rows)
    distances = torch.empty(0)
    for size, length in zip(sizes, lengths):
        indices, distances = _rerank(q, d, indices[:, :length], size, dtype)
    mflops = (rows * retrieval_dim * (index is None) + sum(n * m for n, m in zip(lengths, sizes))) / 1e6
    return RetrievalResult(indices[:, :k], distances[:, :k], mflops)


def _rerank(q: Tensor, d: Tensor, indices: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The list `(Q, k)` sorted by distance at `size`; differences, not products: no cancellation between near neighbours."""
    step = max(1, _RERANK // (indices.shape[1] * size))
    parts = []
    for query, index in zip(unit(q, size, dtype).split(step), indices.split(step)):
        parts.append((unit(d[:, :size][index], size, dtype) - query[:, None]).norm(dim=-1))
    distance = torch.cat(parts)
    if not bool(torch.isfinite(distance).all()):
        raise ValueError(f"queries or database have NaN or infinite entries among their first {size} coordinates")
    distance, order = distance.sort(dim=1, stable=True)
    return indices.gather(1, order), distance
