"""Filling tensors with random numbers that do not depend on the tensor's dtype or device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_normal", "draw_uniform"]


def draw_uniform(tensor: Tensor, bound: float, generator: torch.Generator | None = None) -> None:
    """Fill `tensor` with U(−bound, bound), drawn in float32 or better on the generator's device."""
    if not tensor.is_meta:
        _fill(tensor, _blank(tensor, generator).uniform_(-bound, bound, generator=generator))


def draw_normal(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """Fill `tensor` with N(0, std²), drawn in float32 or better on the generator's device."""
    if not tensor.is_meta:
        _fill(tensor, _blank(tensor, generator).normal_(0.0, std, generator=generator))


def _blank(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    device = tensor.device if generator is None else generator.device
    return torch.empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=device)


def _fill(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
