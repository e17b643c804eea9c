"""Features of an episode before clustering: centred on the base classes, of unit length, queries moved onto the support."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import as_given, as_tensor

__all__ = ["episode_features"]


def episode_features(
    support: Any,  # (S, D)
    query: Any,  # (Q, D)
    *,
    base_mean: Any = None,  # (D,)
    normalize: bool = True,
    shift: bool = True,
) -> tuple[Any, Any]:
    """CL2N features, and the shift of the queries onto the support.

    Formula: `x ← x - base_mean`, `x ← x / ‖x‖`, then `query ← query + mean(support) - mean(query)`.

    Args:
        support: features of the labelled points.
        query: features of the unlabelled points.
        base_mean: mean feature of the classes that the network was trained on; None subtracts nothing.
        normalize: scale rows to length 1; a row of zeros stays one.
        shift: move the queries. Only right where support and query hold the same classes in similar shares.

    Returns:
        `(support, query)` in float64, in the kind (numpy or torch) of `support`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries.

    Example:
        >>> from lowdim.represent import episode_features
        >>> support, query = episode_features([[3.0, 4.0]], [[0.0, 2.0], [0.0, 5.0]])
        >>> support, query
        (array([[0.6, 0.8]]), array([[0.6, 0.8],
               [0.6, 0.8]]))

    Source: Ziko et al., arXiv 2106.09516; centring and scaling as in Wang et al., "SimpleShot", arXiv 1911.04623.
    """
    rows = {"support": _read("support", support, 2), "query": _read("query", query, 2)}
    features = rows["support"].shape[1]
    if rows["query"].shape[1] != features:
        raise ValueError(f"query must have the {features} features of support; got shape {tuple(rows['query'].shape)}")
    if base_mean is not None:
        mean = _read("base_mean", base_mean, 1)
        if len(mean) != features:
            raise ValueError(f"base_mean must have {features} entries, one for each feature; got {len(mean)}")
        rows = {name: x - mean for name, x in rows.items()}
    if normalize:
        rows = {name: torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny) for name, x in rows.items()}
    s, q = rows["support"], rows["query"]
    if shift:
        q = q + s.mean(0) - q.mean(0)
    return as_given(s, support), as_given(q, support)


def _read(name: str, array: Any, dimensions: int) -> Tensor:
    x = as_tensor(array).to("cpu", torch.float64)
    if x.ndim != dimensions or 0 in x.shape:
        raise ValueError(f"{name} must be {dimensions}-D and not empty; got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} has NaN or infinite entries")
    return x
