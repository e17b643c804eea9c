"""Batches: a tensor, or a dict, tuple or list of such, nested at will; the first dimension of a tensor is the row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["map_tensors", "row_count", "to_device"]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device))


def map_tensors(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """The batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [map_tensors(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def row_count(batch: Any) -> int:
    """The number of rows of a batch: the length of its first tensor.

    Raises:
        TypeError: it holds no tensor with rows.

    Example:
        >>> import torch
        >>> from lowdim.calibrate import row_count
        >>> row_count({"x": (torch.zeros(3, 8), torch.zeros(3))})
        3
    """
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    if not found or not found[0].ndim:
        raise TypeError(f"a batch must hold a tensor with a row for each example; got {type(batch).__name__}")
    return len(found[0])
