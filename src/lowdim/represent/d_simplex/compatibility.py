"""How compatible the vectors of two or more models are: cross-tests, and the inequalities of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import listed
from lowdim.linalg import compute_dtype
from lowdim.represent.core.neighbours import nearest, unit

__all__ = [
    "average_accuracy",
    "average_compatibility",
    "classes_of",
    "compatibility_inequalities",
    "identification_accuracy",
    "identified",
    "read_embeddings",
    "read_labels",
]

_BLOCK = 1 << 22  # numbers of a block of products


def identification_accuracy(
    gallery: Any,  # (N, n)
    gallery_labels: Any,  # (N,)
    query: Any,  # (Q, n)
    query_labels: Any,  # (Q,)
) -> float:
    """1:N accuracy: the share of queries that are nearest to the template of their class.

    Formula: a template is the mean of a class's vectors at length 1, at length 1 again; a query takes the class of the largest
    inner product.

    Args:
        gallery, query: vectors, tensors or arrays.
        gallery_labels, query_labels: integers or texts, not necessarily contiguous.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: shapes that do not fit, nothing to search or to ask, a query of a class that is not in the gallery (named),
            NaN or infinite entries.

    Example:
        >>> import torch
        >>> from lowdim.represent import identification_accuracy
        >>> gallery, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [3, 3, 7]
        >>> identification_accuracy(gallery, labels, torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 0.0]]), [3, 7, 7])
        0.6666666666666666

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581. scikit-learn's NearestCentroid on unit vectors decides the same but for
    ties.
    """
    stored, asked = read_embeddings("gallery", gallery), read_embeddings("query", query)
    if stored.shape[1] != asked.shape[1]:
        raise ValueError(f"gallery and query must have the same size; got {stored.shape[1]} and {asked.shape[1]}")
    of_both = read_labels("gallery_labels", gallery_labels, len(stored)), read_labels("query_labels", query_labels, len(asked))
    names, both = classes_of(np.concatenate(of_both))
    of_gallery, of_query = both[: len(stored)], both[len(stored) :]
    absent = sorted(set(of_query.tolist()) - set(of_gallery.tolist()))
    if absent:
        raise ValueError(f"query has classes without a gallery item: {listed(names[i] for i in absent)}")
    return float(identified(stored, of_gallery, asked, of_query).double().mean())


def average_compatibility(
    matrix: Any,  # (T, T)
) -> float:
    """The share of pairs of models that are compatible: the new one's queries do better in the old gallery than the old one's.

    Formula: `AC = 2 / (T (T - 1)) Σ_{j<i} 1[M_ij > M_jj]`, 1 for one model.

    Args:
        matrix: `M_ij`, accuracy of queries of model i in the gallery of model j; what is above the diagonal is not read.

    Raises:
        ValueError: not square, or not finite on or below the diagonal.

    Example:
        >>> from lowdim.represent import average_compatibility
        >>> average_compatibility([[0.5, 0.0], [0.6, 0.7]])
        1.0

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """
    M = _square(matrix)
    below = np.tril_indices(len(M), -1)
    return float((M[below] > M.diagonal()[below[1]]).mean()) if len(M) > 1 else 1.0


def average_accuracy(
    matrix: Any,  # (T, T)
) -> float:
    """The mean accuracy of all cross-tests and self-tests: `AA = mean of M_ij, j <= i`, a fraction.

    Args:
        matrix: as in `average_compatibility`.

    Raises:
        ValueError: not square, or not finite on or below the diagonal.

    Example:
        >>> from lowdim.represent import average_accuracy
        >>> average_accuracy([[0.5, 0.0], [0.6, 0.7]])
        0.6

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """
    M = _square(matrix)
    return float(M[np.tril_indices(len(M))].mean())


def compatibility_inequalities(
    new: Any,  # (N, n)
    old: Any,  # (N, n)
    labels: Any,  # (N,)
) -> tuple[float, float]:
    """The shares of ordered pairs of items that satisfy the two inequalities of compatible representations.

    Formula: with the cosine distance d, items a ≠ b of one class: `d(new_a, old_b) <= d(old_a, old_b)`; of two classes: `>=`.

    Returns:
        The share among pairs of one class, and of two classes; NaN where there is no such pair.

    Raises:
        ValueError: unlike shapes, labels of another length, NaN or infinite entries.

    Example:
        >>> import torch
        >>> from lowdim.represent import compatibility_inequalities
        >>> x = torch.randn(6, 3)
        >>> compatibility_inequalities(x, x, [0, 0, 1, 1, 2, 2])
        (1.0, 1.0)

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """
    fresh, stored = read_embeddings("new", new), read_embeddings("old", old)
    if fresh.shape != stored.shape:
        raise ValueError(f"new and old must have the same shape; got {tuple(fresh.shape)} and {tuple(stored.shape)}")
    classes = torch.from_numpy(classes_of(read_labels("labels", labels, len(stored)))[1]).to(stored.device)
    dtype = compute_dtype(torch.promote_types(fresh.dtype, stored.dtype))
    stored = unit(stored, stored.shape[1], dtype)
    change = unit(fresh, fresh.shape[1], dtype) - stored  # of each item; its product with b is d(old_a, b) - d(new_a, b)
    nearer = torch.zeros(2, dtype=torch.int64, device=stored.device)
    pairs = torch.zeros_like(nearer)
    step = max(1, _BLOCK // len(stored))
    for start in range(0, len(stored), step):
        rows = slice(start, start + step)
        gain = change[rows] @ stored.T
        same = classes[rows, None] == classes
        other = ~same
        same.diagonal(start).fill_(False)
        nearer += torch.stack([(same & (gain >= 0)).sum(), (other & (gain <= 0)).sum()])
        pairs += torch.stack([same.sum(), other.sum()])
    one, two = (nearer.double() / pairs).tolist()  # NaN for 0 / 0
    return one, two


def read_embeddings(name: str, values: Any) -> Tensor:
    """A matrix of floating-point numbers with rows, all finite."""
    x = torch.as_tensor(values)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be a matrix, one row for each item; got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers; got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        row = int((~torch.isfinite(x).all(1)).nonzero()[0])
        raise ValueError(f"{name} has NaN or infinite entries, first in row {row}")
    return x


def classes_of(labels: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The different labels in order, and the number of each item's."""
    names, numbers = np.unique(labels, return_inverse=True)
    return names.tolist(), numbers.astype(np.int64)


def identified(gallery: Tensor, gallery_classes: np.ndarray, query: Tensor, query_classes: np.ndarray) -> Tensor:
    """Whether each query `(Q,)` is nearest to the template of its class; classes are numbers from 0."""
    dtype = compute_dtype(torch.promote_types(gallery.dtype, query.dtype))
    index = torch.from_numpy(gallery_classes).to(gallery.device)
    templates = torch.zeros(int(index.max()) + 1, gallery.shape[1], dtype=dtype, device=gallery.device)
    templates.index_add_(0, index, unit(gallery, gallery.shape[1], dtype))
    held = index.unique()
    found = held[nearest(query, templates[held], gallery.shape[1], 1, dtype)[:, 0]]
    return found == torch.from_numpy(query_classes).to(found.device)


def read_labels(name: str, labels: Any, count: int) -> np.ndarray:
    """Integers or texts, one for each item."""
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (count,):
        raise ValueError(f"{name} must hold one label for each of the {count} rows; got shape {values.shape}")
    if values.dtype.kind not in "iuUSOb":
        raise ValueError(f"{name} must be integers or texts; got {values.dtype}")
    return values


def _square(matrix: Any) -> np.ndarray:
    M = np.asarray(matrix, dtype=np.float64)
    if M.ndim != 2 or M.shape[0] != M.shape[1] or len(M) == 0:
        raise ValueError(f"matrix must be square, a row and a column for each model; got shape {M.shape}")
    if not np.isfinite(M[np.tril_indices(len(M))]).all():
        raise ValueError("matrix must be finite on and below its diagonal")
    return M
