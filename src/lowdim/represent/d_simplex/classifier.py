"""A classifier that is never trained: the vertices of a regular simplex, one for each class that may ever come."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import shown

__all__ = ["DSimplexClassifier", "simplex_vertices"]


def simplex_vertices(num_classes: int, *, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
    """K unit vectors in K - 1 dimensions with the same angle between any two.

    Formula: the K - 1 unit vectors of the axes and `a·1`, `a = (1 - √K) / (K - 1)`, less their mean, at length 1. Then
    `V_i · V_j = -1 / (K - 1)`, and the rows sum to zero.

    Args:
        num_classes: K.
        dtype, device: of the result; it is computed in float64.

    Returns:
        `(K, K - 1)`.

    Raises:
        ValueError: K below 2. TypeError: K that is not an integer.

    Example:
        >>> from lowdim.represent import simplex_vertices
        >>> V = simplex_vertices(3)
        >>> [round(x, 4) for x in (V @ V.T).flatten().tolist()]
        [1.0, -0.5, -0.5, -0.5, 1.0, -0.5, -0.5, -0.5, 1.0]

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """
    if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__"):
        raise TypeError(f"num_classes must be an integer; got {shown(num_classes)}")
    count = num_classes.__index__()
    if count < 2:
        raise ValueError(f"num_classes must be at least 2; got {count}")
    size = count - 1
    last = torch.full((1, size), (1 - math.sqrt(count)) / size, dtype=torch.float64)
    points = torch.cat([torch.eye(size, dtype=torch.float64), last])
    return F.normalize(points - points.mean(0), dim=1).to(device=device, dtype=dtype)


class DSimplexClassifier(nn.Module):
    """Logits of features against the fixed vertices of a simplex.

    Formula: `logits = f Vᵀ`, f not normalised, no bias, no scale.

    Args:
        num_classes: K, all classes that may ever come; it is fixed when the first model is trained, and features have K - 1
            dimensions.
        reverse_labels: class y takes vertex `K - 1 - y`, so that a model that is tuned apart fills the vertices from the other
            end.
        dtype, device: of the vertices; None means float32.

    Shapes: `weight (K, K - 1)` is a buffer; there are no parameters. K = 1024 is 4 MiB in float32.

    Raises:
        ValueError: K below 2, features of another size than K - 1. TypeError: K that is not an integer.

    Example:
        >>> import torch
        >>> from lowdim.represent import DSimplexClassifier
        >>> classifier = DSimplexClassifier(8)
        >>> classifier.feature_dim, tuple(classifier(torch.randn(5, 7)).shape)
        (7, (5, 8))

    Use it where a model will be replaced while vectors of the old one stay in use. Where none is ever replaced, a learned head
    is as good or better.

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """

    weight: Tensor

    def __init__(self, num_classes: int, *, reverse_labels: bool = False, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.register_buffer("weight", simplex_vertices(num_classes, dtype=dtype or torch.float32, device=device))
        self.reverse_labels = reverse_labels

    @property
    def num_classes(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def feature_dim(self) -> int:
        """K - 1."""
        return self.weight.shape[1]

    def forward(
        self,
        features: Tensor,  # (..., K - 1)
    ) -> Tensor:
        """Logits `(..., K)`, in the wider of both dtypes."""
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"features must have {self.feature_dim} dimensions, one less than the {self.num_classes} classes; "
                f"got shape {tuple(features.shape)}"
            )
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        return F.linear(features.to(dtype), self.weight.to(dtype))

    def targets(
        self,
        labels: Tensor,  # (B,)
    ) -> Tensor:
        """The vertex of each label."""
        return self.num_classes - 1 - labels if self.reverse_labels else labels

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_classes={self.num_classes}, reverse_labels={self.reverse_labels}"
