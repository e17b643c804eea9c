"""Neighbour graphs, and the update of soft assignments that pulls neighbours together."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowdim.errors import MissingExtraError, check_float, check_int
from lowdim.represent.fewshot.neighbours import nearest_others

__all__ = ["bound_update", "knn_affinity", "softmax", "squared_lengths"]


def knn_affinity(
    X: Any,  # (N, D)
    n_neighbors: int = 3,
) -> Any:
    """The directed graph of nearest neighbours as a scipy CSR matrix: `W_pq = 1` for the `n_neighbors - 1` nearest others of p.

    Args:
        X: points, numpy or torch.
        n_neighbors: the point itself counts, in [2, N]. Two points at the same place are neighbours; a point is never its own.

    Returns:
        `(N, N)` CSR in float64 with `(n_neighbors - 1) N` ones, 12 to 16 bytes each. W is not symmetric.

    Raises:
        ValueError: `n_neighbors` out of range, X not 2-D, NaN or infinite entries. MissingExtraError: no scikit-learn.

    Example:
        >>> from lowdim.represent import knn_affinity
        >>> knn_affinity([[0.0], [1.0], [3.0]], n_neighbors=2).toarray()
        array([[0., 1., 0.],
               [1., 0., 0.],
               [0., 1., 0.]])

    Source: Ziko et al., arXiv 2106.09516.
    """
    try:
        from scipy.sparse import csr_matrix
        from sklearn.utils import check_array
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "knn_affinity") from error
    options: Any = {"dtype": np.float64, "input_name": "X"}
    points = check_array(X, **options)
    check_int("n_neighbors", n_neighbors, 2, len(points))
    near = np.sort(nearest_others(points, n_neighbors - 1), axis=1)
    ends = np.arange(len(near) + 1) * near.shape[1]
    return csr_matrix((np.ones(near.size), near.ravel(), ends), shape=(len(near), len(near)))


def bound_update(
    unary: Any,  # (N, K)
    start: Any,  # (N, K)
    affinity: Any,  # (N, N)
    lam: float,
    *,
    max_iter: int = 600,
    tol: float = 1e-7,
    clamped: Any = None,  # (N,)
) -> np.ndarray:
    """Soft assignments of least energy for given costs: neighbours agree, and each row stays on the simplex.

    Formula: `z_p ← softmax_k(-a_pk + λ Σ_q W_pq z_qk)` for all points at once, until `B = Σ z log z + z a - λ z (W z)` changes
    by at most `tol` of itself (looked at from the third update on) or after `max_iter` updates. Each update minimises an
    upper bound of B that touches it at the last Z.

    Args:
        unary: costs `a` of a point in a class.
        start: the first Z, rows on the simplex.
        affinity: W, an array or a scipy sparse matrix; row p holds the neighbours of p.
        lam: λ ≥ 0.
        clamped: rows that keep `start`, as booleans; None clamps none.

    Returns:
        Z `(N, K)` in float64.

    Raises:
        ValueError: shapes that do not fit, λ, `max_iter` or `tol` out of range.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import bound_update
        >>> costs = np.array([[0.0, 9.0], [1.0, 1.0]])  # the second point has no preference, and the first as its neighbour
        >>> bound_update(costs, np.full((2, 2), 0.5), np.array([[0.0, 0.0], [1.0, 0.0]]), 2.0).round(2)
        array([[1.  , 0.  ],
               [0.88, 0.12]])

    Source: Ziko et al., arXiv 2106.09516.
    """
    check_float("lam", lam, 0.0)
    check_int("max_iter", max_iter, 1)
    check_float("tol", tol, 0.0)
    a, Z = (np.asarray(x, dtype=np.float64) for x in (unary, start))
    if a.ndim != 2 or a.shape != Z.shape:
        raise ValueError(f"unary and start must be (N, K), both alike; got {a.shape} and {Z.shape}")
    W = affinity if hasattr(affinity, "tocsr") else np.asarray(affinity, dtype=np.float64)
    if W.shape != (len(a), len(a)):
        raise ValueError(f"affinity must be ({len(a)}, {len(a)}), a row for each row of unary; got {W.shape}")
    keep = np.zeros(len(a), dtype=bool) if clamped is None else np.asarray(clamped)
    if keep.dtype != bool or keep.shape != (len(a),):
        raise ValueError(
            f"clamped must be {len(a)} booleans, one for each row of unary; got {keep.dtype} of shape {keep.shape}"
        )
    held, old, pull = Z[keep], np.inf, W @ Z
    for i in range(max_iter):
        Z = softmax(lam * pull - a)
        Z[keep] = held
        pull = W @ Z  # of the new Z, for the bound and for the next update
        bound = float(np.sum(Z * (np.log(np.maximum(Z, 1e-20)) + a - lam * pull)))
        if i > 1 and abs(bound - old) <= tol * abs(old):
            break
        old = bound
    return Z


def softmax(scores: np.ndarray) -> np.ndarray:
    """Rows of `exp(scores)` that sum to 1."""
    Z = np.exp(scores - scores.max(axis=1, keepdims=True))
    return Z / Z.sum(axis=1, keepdims=True)


def squared_lengths(X: np.ndarray) -> np.ndarray:
    """`‖x‖²` of each row."""
    return np.einsum("nd,nd->n", X, X)
