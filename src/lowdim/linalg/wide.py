"""The precision of computations on half-precision tensors: float32 or better, or the widest of the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide", "widest"]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better; differentiable.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.wide(torch.ones(2, dtype=torch.bfloat16)).dtype, la.wide(torch.ones(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest(tensor: Tensor) -> Tensor:
    """The tensor in float64, without gradient, for decompositions that must be the same on other machines.

    In float32 where its device has no float64 (Apple's GPUs).

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.widest(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float64
    """
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
