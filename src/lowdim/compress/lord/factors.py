"""Factors of one layer from the mean and covariance of its outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_int
from lowdim.linalg import canonical_signs, compute_dtype
from lowdim.modules import LowRankLinear
from lowdim.surgery import as_linear

__all__ = ["decompose", "lord_factors"]


def lord_factors(
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    mean: Tensor,  # (out,)
    covariance: Tensor,  # (out, out)
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors and new bias of one layer from the mean and the centred covariance of its own outputs.

    Formula: `B = V_r`, `A = V_rᵀ W`, `bias' = μ − V_r V_rᵀ (μ − bias)`. With mean zero and the second moment as
    covariance it is the uncentred form.

    Returns:
        `A (rank, in)`, `B (out, rank)`, `bias (out,)` in the weight's dtype, computed in the covariance's (float32 or better).

    Raises:
        ValueError: shapes that do not fit, rank outside [1, min(out, in)], NaN or infinity.

    Example:
        >>> import torch
        >>> from lowdim.compress import lord_factors
        >>> A, B, bias = lord_factors(torch.eye(3), None, torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])), 2)
        >>> (B @ A).diag().tolist()
        [0.0, 1.0, 1.0]

    Source: Kaushal, Vaidhya, Rish, "LORD", arXiv 2309.14021.
    """
    A, B, new_bias, _ = factors_of(weight, bias, mean, covariance, rank)
    return A, B, new_bias


def decompose(
    layer: nn.Module, stats: Mapping[str, Any], rank: int, dtype: torch.dtype, *, centered: bool
) -> tuple[LowRankLinear, float]:
    """The layer that replaces `layer`, and its relative error, from what `collect` found of its outputs."""
    linear = as_linear(layer, dtype=dtype)
    mean, covariance = stats["output_mean"], stats["output_covariance"]
    if not centered:
        covariance = covariance + torch.outer(mean, mean)
        mean = torch.zeros_like(mean)
    A, B, bias, eigenvalues = factors_of(linear.weight, linear.bias, mean, covariance, rank)
    total = float(eigenvalues.sum())
    error = 0.0 if total == 0 else math.sqrt(float(eigenvalues[rank:].sum()) / total)
    new = LowRankLinear.from_factors(A, B, bias if centered or linear.bias is not None else None)
    return new.take_place_of(layer), error


def factors_of(
    weight: Tensor, bias: Tensor | None, mean: Tensor, covariance: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape
    check_int("rank", rank, 1, min(out_features, in_features))
    shapes = {"mean": (mean, (out_features,)), "covariance": (covariance, (out_features, out_features))}
    if bias is not None:
        shapes["bias"] = (bias, (out_features,))
    wide = compute_dtype(torch.promote_types(weight.dtype, covariance.dtype))
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} for a weight {tuple(weight.shape)}; got {tuple(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} has NaN or infinite entries")
    eigenvalues, vectors = _principal(weight.detach().to(wide), bias, covariance.detach().to(wide))
    B, _ = canonical_signs(vectors[:, :rank])
    mean = mean.detach().to(wide)
    shifted = mean if bias is None else mean - bias.detach().to(wide)
    A = B.T @ weight.detach().to(wide)
    new_bias = mean - B @ (B.T @ shifted)
    return A.to(weight.dtype), B.to(weight.dtype), new_bias.to(weight.dtype), eigenvalues


def _principal(weight: Tensor, bias: Tensor | None, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of the outputs' covariance (or second moment)."""
    reach = weight if bias is None else torch.cat([weight, bias.detach().to(weight.dtype)[:, None]], dim=1)
    if reach.shape[0] <= reach.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(covariance)
    else:  # outputs are in the span of the weight's columns and the bias: an eigenproblem of the inputs' size is enough
        span = torch.linalg.qr(reach).Q
        eigenvalues, vectors = torch.linalg.eigh(span.T @ covariance @ span)
        vectors = span @ vectors
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)  # rounding may leave some slightly below 0
