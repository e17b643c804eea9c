"""The precision of computations on half-precision tensors: float32 or better, or the widest of the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["wide", "widest", "without_autocast"]


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


def without_autocast(
    place: str,  # a device's type, such as "cuda"
) -> Any:
    """A context in which products keep the dtype of their operands, also on devices that have no autocast.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), la.without_autocast("cpu"):
        ...     print((x @ x).dtype)
        torch.float32
    """
    return torch.autocast(place, enabled=False) if torch.amp.is_autocast_available(place) else nullcontext()
