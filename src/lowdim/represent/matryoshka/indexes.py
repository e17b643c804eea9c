"""Search indexes of other libraries for the first search of a funnel: faiss, usearch, or any function."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import MissingExtraError, check_choice, check_int, listed
from lowdim.linalg import as_tensor
from lowdim.represent.core.neighbours import unit

__all__ = ["index_bytes", "nested_index", "of_index"]

_LINKS = 32  # of a point in the graph: faiss's default in its examples, and near usearch's 16
_ROWS = 65_536  # added at once


def nested_index(
    database: Any,  # (N, D)
    dim: int,
    *,
    library: str = "faiss",
) -> Any:
    """An approximate index (an HNSW graph) of the first `dim` coordinates, scaled to length 1: what `index=` of a search takes.

    Args:
        database: the vectors, torch or numpy.
        dim: how many of their coordinates, in [1, D].
        library: `"faiss"` (an `IndexHNSWFlat`) or `"usearch"` (an `Index` in float32). Both are the library's own objects:
            save them, and set how far they search, as its pages say (`index.hnsw.efSearch`, `index.expansion_search`).

    Raises:
        ValueError: a database that is not 2-D or not finite, `dim` out of range. MissingExtraError: the library is missing.

    Example:
        >>> import torch
        >>> from lowdim.represent import adaptive_retrieve, nested_index
        >>> database = torch.eye(6)
        >>> index = nested_index(database, 4)
        >>> how = {"retrieval_dim": 4, "rerank_dim": 6, "shortlist": 3, "k": 1}
        >>> adaptive_retrieve(database[:2], database, index=index, **how).indices.tolist()
        [[0], [1]]

    Not for some 10,000 vectors or fewer: the exact search is as quick, and misses nothing.
    """
    check_choice("library", library, ("faiss", "usearch"))
    vectors = as_tensor(database)
    if vectors.ndim != 2:
        raise ValueError(f"database must be (N, D); got {tuple(vectors.shape)}")
    check_int("dim", dim, 1, vectors.shape[1])
    index = _new(library, dim)
    for start in range(0, len(vectors), _ROWS):
        part = unit(vectors[start : start + _ROWS], dim, torch.float32).cpu()
        if not bool(torch.isfinite(part).all()):
            raise ValueError("database has NaN or infinite entries")
        if library == "faiss":
            index.add(part.numpy())
        else:
            index.add(np.arange(start, start + len(part)), part.numpy())
    return index


def index_bytes(index: Any) -> int:
    """Bytes of an index of faiss (as it is written) or usearch (in memory).

    Raises:
        TypeError: another object.
    """
    if hasattr(index, "ntotal"):
        import faiss

        return int(faiss.serialize_index(index).nbytes)
    if hasattr(index, "memory_usage"):
        return int(index.memory_usage)
    raise TypeError(f"index must be one of faiss or usearch; got {type(index).__name__}")


def of_index(index: Any, queries: Tensor, count: int, rows: int) -> Tensor:
    """Rows of the database `(Q, count)` that an index finds for unit vectors `(Q, dim)`.

    Raises:
        TypeError: the index is of no known kind and not a function.
        ValueError: it holds another number of vectors or coordinates, or finds too few of them.
    """
    if not bool(torch.isfinite(queries).all()):
        raise ValueError("queries has NaN or infinite entries")
    given, dim = np.ascontiguousarray(queries.float().cpu().numpy()), queries.shape[1]
    size, width = getattr(index, "ntotal", None), getattr(index, "d", None)
    if size is None and hasattr(index, "ndim") and hasattr(index, "__len__"):
        size, width = len(index), index.ndim
    if size is not None and (size, width) != (rows, dim):
        raise ValueError(
            f"index must hold the {rows} rows of database with retrieval_dim = {dim} coordinates; it has {size} with {width}"
        )
    if hasattr(index, "ntotal"):
        ids = index.search(given, count)[1]
    elif size is not None:
        ids = index.search(given, count).keys
    elif callable(index):
        ids = index(given, count)
    else:
        raise TypeError(f"index must be of faiss or usearch, or a function (queries, k) -> ids; got {type(index).__name__}")
    found = torch.from_numpy(np.asarray(ids).reshape(len(given), -1).astype(np.int64))
    strange = (found < 0) | (found >= rows)
    if found.shape[1] != count or bool(strange.any()):
        lacking = listed(sorted({int(i) for i in found[strange][:5]})) if bool(strange.any()) else f"{found.shape[1]} columns"
        raise ValueError(
            f"index must find {count} rows of database for each query, as the first shortlist says; got {lacking}. Let it "
            "search further (faiss: index.hnsw.efSearch or nprobe, usearch: expansion_search), or shorten the list"
        )
    return found.to(queries.device)


def _new(library: str, dim: int) -> Any:
    try:
        if library == "faiss":
            import faiss

            return faiss.IndexHNSWFlat(dim, _LINKS)
        from usearch.index import Index

        return Index(ndim=dim, metric="l2sq", dtype="f32")
    except ImportError as error:
        raise MissingExtraError("faiss-cpu" if library == "faiss" else library, "index", "nested_index") from error
