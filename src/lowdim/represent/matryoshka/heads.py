"""MRL: one embedding whose first m coordinates serve as an embedding of size m, for every m of a nested list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost, wide
from lowdim.represent.core.nested import check_dims

__all__ = ["MatryoshkaCrossEntropy", "MatryoshkaEmbeddingLoss", "MatryoshkaHead"]

_PREFIX = "nesting_classifier_"  # the authors' name, so that their checkpoints load


class MatryoshkaHead(nn.Module):
    """Classification heads for every size of a nested embedding (MRL), or one shared head (MRL-E).

    Formula: `l_g = x[..., :m_g] W_gᵀ + b_g`; with `efficient=True`, `l_g = x[..., :m_G] W[:, :m_g]ᵀ + b`. Features are not
    normalised first.

    Args:
        in_features: size D of the features.
        num_classes: number of classes C.
        dims: nested sizes `m_1 < … < m_G ≤ D`.
        efficient: one weight `(C, m_G)` and one bias for all sizes: fewer parameters, slightly lower accuracy.
        bias: whether the heads have a bias.
        device, dtype: as in nn.Linear.

    Shapes: parameters are `nesting_classifier_{g}.weight (C, m_g)` and `.bias (C,)`; with `efficient` one, `(C, m_G)`.

    Raises:
        ValueError: sizes empty, not strictly increasing, below 1 or beyond `in_features`; features of another size.
        TypeError: sizes that are not integers.

    Example:
        >>> import torch
        >>> from lowdim.represent import MatryoshkaCrossEntropy, MatryoshkaHead
        >>> head = MatryoshkaHead(16, 3, dims=[2, 4, 16])
        >>> logits = head(torch.randn(5, 16))
        >>> [tuple(l.shape) for l in logits]
        [(5, 3), (5, 3), (5, 3)]
        >>> loss = MatryoshkaCrossEntropy()(logits, torch.tensor([0, 1, 2, 0, 1]))

    Do not use it where only one size will ever be served: a model trained for that size is at least as good there (at
    very small sizes clearly better), and above roughly the task's own dimension truncating a plain embedding is as good.

    Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, arXiv 2205.13147.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        dims: Iterable[int],
        *,
        efficient: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("num_classes", num_classes, 1)
        self.dims = check_dims(dims, in_features, "in_features")
        self.in_features, self.num_classes, self.efficient = in_features, num_classes, efficient
        for g, size in enumerate(self.dims[-1:] if efficient else self.dims):
            self.add_module(f"{_PREFIX}{g}", nn.Linear(size, num_classes, bias, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> tuple[Tensor, ...]:
        """Logits `(..., C)` for each size, smallest first."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension; got shape {tuple(x.shape)}")
        if self.efficient:
            shared = self._linear(0)
            return tuple(F.linear(x[..., :m], shared.weight[:, :m], shared.bias) for m in self.dims)
        return tuple(self._linear(g)(x[..., :m]) for g, m in enumerate(self.dims))

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of the logits of all sizes for `tokens` rows."""
        chain = [(m * self.num_classes, m, self.num_classes) for m in self.dims]
        return chain_cost(chain, tokens, parameters=sum(p.numel() for p in self.parameters()), itemsize=itemsize)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, dims={self.dims}, efficient={self.efficient}"

    def _linear(self, g: int) -> nn.Linear:
        linear = self.get_submodule(f"{_PREFIX}{g}")
        assert isinstance(linear, nn.Linear)
        return linear


class MatryoshkaCrossEntropy(nn.Module):
    """Cross entropy summed over the sizes of a nested classifier.

    Formula: `L = Σ_g c_g CE(l_g, y)`: a weighted sum over sizes, not a mean; CE itself averages over the batch.

    Args:
        weights: `c_g`, one number per size; None means all 1.
        **cross_entropy: torch's keywords: `label_smoothing`, `weight` (per class), `ignore_index`, `reduction`.

    Shapes: logits a sequence of G tensors `(N, C, ...)`, target `(N, ...)` of class indices or class probabilities.

    Returns:
        A scalar (unless `reduction="none"`), computed in float32 or better whatever the dtype of the logits.

    Raises:
        ValueError: the number of weights differs from the number of logits. TypeError: a keyword that torch does not know.

    Example:
        >>> import torch
        >>> from lowdim.represent import MatryoshkaCrossEntropy
        >>> logits = [torch.zeros(4, 2), torch.zeros(4, 2)]
        >>> f"{MatryoshkaCrossEntropy()(logits, torch.zeros(4, dtype=torch.long)).item():.4f}"  # 2 log 2
        '1.3863'

    Source: Kusupati et al., NeurIPS 2022, arXiv 2205.13147.
    """

    def __init__(self, weights: Sequence[float] | None = None, **cross_entropy: Any):
        super().__init__()
        self.weights = _check_weights(weights)
        self.cross_entropy = nn.CrossEntropyLoss(**cross_entropy)

    def forward(
        self,
        logits: Sequence[Tensor],  # G of (N, C, ...)
        target: Tensor,  # (N, ...)
    ) -> Tensor:
        """The weighted sum."""
        # float32 also under autocast: sums of exponentials lose too much in half precision.
        losses = [self.cross_entropy(wide(l), target) for l in logits]
        return _weighted_sum(losses, self.weights, "logits")


class MatryoshkaEmbeddingLoss(nn.Module):
    """Any loss on embeddings (contrastive, distance, …) summed over nested sizes.

    Formula: `L = Σ_g c_g f(u_g, v_g, …)`, `u_g = normalize(u[..., :m_g])`: cut first, then normalise, per size.

    Args:
        loss: `loss(*embeddings, **kw) -> scalar`.
        dims: nested sizes, strictly increasing.
        weights: `c_g`; None means all 1.
        normalize: scale each cut embedding to length 1 (a zero vector stays zero).

    Returns:
        A scalar. Embeddings reach `loss` in float32 or better.

    Raises:
        ValueError: sizes empty, not increasing, below 1 or beyond an embedding; the number of weights differs from that of
            sizes.
        TypeError: sizes that are not integers, a loss that cannot be called.

    Example:
        >>> import torch
        >>> from lowdim.represent import MatryoshkaEmbeddingLoss
        >>> def pull(a, b):
        ...     return (a - b).square().sum(-1).mean()
        >>> u = torch.randn(8, 16)
        >>> MatryoshkaEmbeddingLoss(pull, [4, 16])(u, 3 * u).item() < 1e-10
        True

    To train a SentenceTransformer use sentence-transformers' own MatryoshkaLoss, which also handles its cached losses;
    this one works on plain tensors and gives the same number.

    Source: Kusupati et al., NeurIPS 2022, arXiv 2205.13147.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Iterable[int],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = True,
    ):
        super().__init__()
        if not callable(loss):
            raise TypeError(f"loss must be callable: loss(*embeddings) -> scalar; got {type(loss).__name__}")
        self.loss, self.dims, self.normalize = loss, check_dims(dims), normalize
        self.weights = _check_weights(weights, len(self.dims))

    def forward(
        self,
        *embeddings: Tensor,  # (..., D) each
        **kw: Any,
    ) -> Tensor:
        """The weighted sum; `kw` is passed to the loss."""
        if not embeddings:
            raise ValueError("embeddings must hold at least one tensor; got none")
        for embedding in embeddings:
            check_dims(self.dims, embedding.shape[-1], "the size of the embedding")
        full = [wide(e) for e in embeddings]
        losses = [self.loss(*(self._cut(e, m) for e in full), **kw) for m in self.dims]
        return _weighted_sum(losses, self.weights, "dims")

    def _cut(self, embedding: Tensor, size: int) -> Tensor:
        cut = embedding[..., :size]
        return F.normalize(cut, dim=-1) if self.normalize else cut


def _check_weights(weights: Sequence[float] | None, count: int | None = None) -> tuple[float, ...] | None:
    if weights is None:
        return None
    # Python floats: a float32 tensor would round weights such as 0.1 and tie the loss to one device.
    numbers = tuple(float(w) for w in weights)
    if count is not None and len(numbers) != count:
        raise ValueError(f"weights must hold one number per size ({count}); got {len(numbers)}: {numbers}")
    return numbers


def _weighted_sum(losses: list[Tensor], weights: tuple[float, ...] | None, what: str) -> Tensor:
    if not losses:
        raise ValueError(f"{what} must hold at least one size; got none")
    if weights is not None and len(weights) != len(losses):
        raise ValueError(f"weights must hold one number for each of the {len(losses)} {what}; got {len(weights)}: {weights}")
    if weights is not None:
        losses = [c * loss for c, loss in zip(weights, losses)]
    return sum(losses[1:], losses[0])
