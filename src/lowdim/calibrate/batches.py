"""Batches: a tensor, or a dict, tuple or list of such, nested at will; the first dimension of a tensor is the row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["given_batches", "is_one_batch", "map_tensors", "row_count", "to_device"]


def given_batches(batches: Iterable[Any] | None, purpose: str) -> Iterable[Any]:
    """The batches that a caller gave.

    Args:
        purpose: ends the message where there are none, such as "stage 1 needs sample data".

    Raises:
        ValueError: None. TypeError: one batch instead of an iterable of them.
    """
    if batches is None:
        raise ValueError(f"batches is missing: {purpose}")
    if is_one_batch(batches):
        raise TypeError(f"batches must be an iterable of batches; got a single {type(batches).__name__}: put it in a list")
    return batches


def is_one_batch(batches: Any) -> bool:
    """Whether this is a batch, where an iterable of them belongs."""
    return isinstance(batches, (Mapping, Tensor, str))


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
