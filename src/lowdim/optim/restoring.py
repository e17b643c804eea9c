"""Checking a saved optimizer state against the optimizer that is to go on with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowdim.optim.parts import Layout, State

__all__ = ["check_saved_group", "restored"]


def check_saved_group(index: int, saved: dict[str, Any], group: dict[str, Any], method: str, keys: Iterable[str]) -> None:
    """Raise ValueError unless the group was saved by this method, with the same value of each of these keys."""
    if saved.get("method") != method:
        found = saved.get("method", "another optimizer")
        raise ValueError(f"state_dict must come from {method}; group {index} was saved by {found}")
    for key in keys:
        if _plain(saved.get(key)) != _plain(group.get(key)):
            raise ValueError(
                f"state_dict: group {index} was saved with {key}={saved.get(key)!r}; this optimizer has {group.get(key)!r}"
            )


def restored(p: Tensor, saved: State, wanted: Layout, label: str) -> State:
    """A copy of a parameter's saved state on its device, every tensor in its own dtype.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if "step" in saved:
        for name, (shape, _) in wanted.items():
            found = saved.get(name)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
                raise ValueError(f"state_dict: {label} needs {name!r} of shape {shape}; found {what}")
    return {k: v.detach().to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}


def _plain(value: Any) -> Any:
    """Lists and tuples that hold the same compare equal: a checkpoint may have passed through JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
