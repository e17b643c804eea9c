"""The precision in which a decomposition that a checkpoint does not hold can be made again elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widest"]


def widest(tensor: Tensor) -> Tensor:
    """The tensor in float64, without gradient; in float32 where its device has no float64 (Apple's GPUs).

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.widest(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float64
    """
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
