"""Fréchet means over a finite label space: scores, predictions, a one-hot with a gradient, and the risk."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.errors import check_choice, check_float, shown
from lowdim.linalg import as_given, as_tensor, compute_dtype
from lowdim.represent.core.distances import check_distances

__all__ = [
    "embedding_distances",
    "frechet_one_hot",
    "frechet_predict",
    "frechet_scores",
    "read_indices",
    "read_probabilities",
    "squared_distance_risk",
]


def frechet_scores(
    probabilities: Any,  # (B, K)
    distances: Any,  # (N, N)
    observed: Any = None,  # (K,)
) -> Any:
    """How well each of N classes fits a distribution over K of them: minus its mean squared distance.

    Formula: `S = -P (D ∘ D)[observed, :]`.

    Args:
        probabilities: one row a sample, of the classes that the model knows; softmax first if it gives logits. The best class
            does not depend on a positive scale, so rows need not sum to 1. Differentiable if torch.
        distances: D between all classes, not squared. No gradient. May stay on the CPU while the probabilities are elsewhere.
        observed: the class of each column, as rows of D; None: all N in order.

    Returns:
        `(B, N)` in float32 or better, in the kind (numpy or torch) of the probabilities.

    Raises:
        ValueError: entries below 0 (by more than 1e-12) or not finite, another number of columns than observed classes,
            observed classes that repeat or are out of range, distances that are none.

    Example:
        >>> from lowdim.represent import frechet_scores
        >>> line = [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]  # three classes in a row; the outer two are known
        >>> frechet_scores([[0.5, 0.5]], line, observed=[0, 2])
        array([[-2., -1., -2.]])

    Source: Roberts et al., "Geometry-Aware Adaptation for Pretrained Models", arXiv 2307.12226.
    """
    D = check_distances(distances)
    rows = read_indices("observed", observed, len(D))
    P = read_probabilities(probabilities, len(rows))
    scores = _scores(P, D, rows)
    return scores if isinstance(probabilities, Tensor) else as_given(scores, probabilities)


def frechet_predict(
    probabilities: Any,  # (B, K)
    distances: Any,  # (N, N)
    observed: Any = None,  # (K,)
) -> Any:
    """The Fréchet mean of each row: the class, seen or not, of least mean squared distance; the first on ties.

    Formula: `ŷ = argmin_y Σ_k P_k D(observed_k, y)²`.

    Args:
        probabilities, distances, observed: as for `frechet_scores`.

    Returns:
        `(B,)` int64 rows of D, in the kind of the probabilities.

    Raises:
        ValueError: as `frechet_scores`.

    Example:
        >>> from lowdim.represent import frechet_predict
        >>> line = [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]
        >>> frechet_predict([[0.9, 0.1], [0.5, 0.5]], line, observed=[0, 2])  # the middle class was never seen
        array([0, 1])

    Not where all classes were seen and the model is calibrated, unless an error's cost is its squared distance: argmax is then
    right more often.

    Source: Roberts et al., arXiv 2307.12226.
    """
    scores = frechet_scores(probabilities, distances, observed)
    return scores.argmax(1)


def frechet_one_hot(
    probabilities: Any,  # (B, N)
    distances: Any,  # (N, N)
    *,
    estimator: str = "straight_through",
    eta: float = 0.01,
) -> Any:
    """The prediction as a one-hot row, with a gradient in place of the zero of argmax, so that a model learns through it.

    Formula: forward the one-hot `o` of `frechet_predict`. Backward, with g the gradient at o: g (`"straight_through"`), `-g`
    (`"negative"`), or `o - proj(o - eta g)` (`"polytope"`), proj the Euclidean projection of each row on the simplex.

    Args:
        probabilities: of all N classes.
        distances: D, no gradient.
        estimator: which gradient.
        eta: step > 0 of `"polytope"`.

    Returns:
        `(B, N)` in the dtype and kind of the probabilities.

    Raises:
        ValueError: as `frechet_scores`; an unknown estimator; eta out of range.

    Example:
        >>> import torch
        >>> from lowdim.represent import frechet_one_hot
        >>> P = torch.tensor([[0.5, 0.0, 0.5]], requires_grad=True)
        >>> line = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
        >>> o = frechet_one_hot(P, line)
        >>> (o * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        >>> o.tolist(), P.grad.tolist()
        ([[0.0, 1.0, 0.0]], [[1.0, 2.0, 3.0]])

    Source: Roberts et al., arXiv 2307.12226, and the authors' program.
    """
    check_choice("estimator", estimator, ("straight_through", "negative", "polytope"))
    check_float("eta", eta, 0.0, low_open=True)
    D = check_distances(distances)
    P = read_probabilities(probabilities, len(D))
    one_hot = _OneHot.apply(P, D, estimator, eta)
    return one_hot if isinstance(probabilities, Tensor) else as_given(one_hot, probabilities)


def embedding_distances(
    embeddings: Any,  # (N, d)
) -> Any:
    """Euclidean distances between classes' embeddings: a metric of labels where there is none.

    Args:
        embeddings: one row a class, such as the text embedding of its name.

    Returns:
        `(N, N)` in float32 or better, in the kind of the embeddings; exactly 0 on the diagonal and symmetric to the bit.

    Raises:
        ValueError: not 2-D, empty, NaN or infinite entries.

    Example:
        >>> from lowdim.represent import embedding_distances
        >>> embedding_distances([[0.0, 0.0], [3.0, 4.0]])
        array([[0., 5.],
               [5., 0.]])

    Source: Roberts et al., arXiv 2307.12226 (its experiments with CLIP).
    """
    E = as_tensor(embeddings)
    if E.ndim != 2 or 0 in E.shape:
        raise ValueError(f"embeddings must be (N, d), a row for each class, and not empty; got shape {tuple(E.shape)}")
    E = E.to(compute_dtype(E.dtype)) if E.is_floating_point() else E.double()
    if not bool(torch.isfinite(E).all()):
        raise ValueError("embeddings has NaN or infinite entries")
    D = torch.cdist(E, E, compute_mode="donot_use_mm_for_euclid_dist")  # by products, near classes would be at distance 0
    upper = D.triu(1)
    return as_given(upper + upper.T, embeddings)


def squared_distance_risk(
    y_true: Any,  # (n,)
    y_pred: Any,  # (n,)
    distances: Any,  # (N, N)
) -> float:
    """The mean of `D(y_true, y_pred)²`: what a Fréchet mean minimises, in squared units of D.

    Args:
        y_true, y_pred: classes as rows of D, int.
        distances: D, not squared.

    Raises:
        ValueError: unlike lengths, none at all, classes out of range, distances that are none.

    Example:
        >>> from lowdim.represent import squared_distance_risk
        >>> squared_distance_risk([0, 1, 2], [0, 1, 0], [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
        1.3333333333333333

    Source: Roberts et al., arXiv 2307.12226.
    """
    D = check_distances(distances)
    truth, found = (read_indices(name, y, len(D), distinct=False) for name, y in (("y_true", y_true), ("y_pred", y_pred)))
    if len(truth) != len(found):
        raise ValueError(f"y_true and y_pred must be of equal length; got {len(truth)} and {len(found)}")
    return float(D[truth.to(D.device), found.to(D.device)].double().square().mean())


def read_indices(name: str, given: Any, count: int, *, distinct: bool = True) -> Tensor:
    """Rows of a matrix of `count` rows as an int64 tensor; None: all of them."""
    if given is None:
        return torch.arange(count)
    rows = as_tensor(given) if isinstance(given, Tensor) else torch.from_numpy(np.atleast_1d(_array(name, given)))
    if rows.ndim != 1 or not len(rows):
        raise ValueError(f"{name} must be a list of at least one class; got shape {tuple(rows.shape)}")
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, rows of distances; got {rows.dtype}")
    rows = rows.long()
    wrong = rows[(rows < 0) | (rows >= count)]
    if len(wrong):
        raise ValueError(f"{name} must be rows of distances in [0, {count}); got {int(wrong[0])}")
    if distinct and len(rows.unique()) < len(rows):
        values, times = rows.unique(return_counts=True)
        raise ValueError(f"{name} must be distinct; class {int(values[times > 1][0])} is there more than once")
    return rows


def _array(name: str, given: Any) -> np.ndarray:
    array = np.asarray(given)
    if array.size and array.dtype.kind not in "iufb":
        raise ValueError(f"{name} must be integers, rows of distances; got {shown(given)}")
    return array.astype(np.int64) if array.dtype.kind == "u" else array


def read_probabilities(given: Any, columns: int) -> Tensor:
    """Rows over `columns` observed classes, checked; a tensor keeps its gradient."""
    P = given if isinstance(given, Tensor) else as_tensor(given)
    if P.ndim != 2 or P.shape[1] != columns:
        raise ValueError(f"probabilities must be (B, {columns}), a column for each observed class; got shape {tuple(P.shape)}")
    if not P.is_floating_point():
        P = P.double()
    if not bool(torch.isfinite(P).all()):
        raise ValueError("probabilities has NaN or infinite entries")
    if bool((P < -1e-12).any()):
        raise ValueError(
            f"probabilities must not be negative; the least is {float(P.min()):.6g}. Are these logits? Softmax first"
        )
    return P


def _scores(P: Tensor, D: Tensor, rows: Tensor) -> Tensor:
    dtype = torch.promote_types(compute_dtype(P.dtype), D.dtype)
    squares = D[rows.to(D.device)].to(P.device, dtype).square()
    return -(P.to(dtype) @ squares)


class _OneHot(torch.autograd.Function):
    """One-hot of the Fréchet mean, and one of three gradients."""

    @staticmethod
    def forward(ctx: Any, P: Tensor, D: Tensor, estimator: str, eta: float) -> Tensor:
        one_hot = F.one_hot(_scores(P, D, torch.arange(len(D))).argmax(1), len(D)).to(P.dtype)
        ctx.save_for_backward(one_hot)
        ctx.estimator, ctx.eta = estimator, eta
        return one_hot

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (one_hot,) = ctx.saved_tensors
        if ctx.estimator == "polytope":
            o = one_hot.to(compute_dtype(grad.dtype))
            return (o - _on_simplex(o - ctx.eta * grad.to(o))).to(grad), None, None, None
        return -grad if ctx.estimator == "negative" else grad, None, None, None


def _on_simplex(rows: Tensor) -> Tensor:
    """The nearest point of the simplex to each row: `max(v - θ, 0)` with θ such that it sums to 1."""
    ordered = rows.sort(dim=1, descending=True).values
    count = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
    theta = (ordered.cumsum(1) - 1) / count
    kept = (ordered > theta).sum(1, keepdim=True)  # the entries that stay above 0 come first
    return (rows - theta.gather(1, kept - 1)).clamp_min(0)
