"""The check of nested sizes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

__all__ = ["check_dims"]


def check_dims(dims: Iterable[int], limit: int | None = None, limit_name: str = "the embedding") -> tuple[int, ...]:
    """Nested sizes as a tuple: integers, at least 1, strictly increasing, at most `limit`.

    Raises:
        ValueError: empty, below 1, not strictly increasing, or beyond `limit`. TypeError: not integers.
    """
    if isinstance(dims, (str, bytes)) or not isinstance(dims, Iterable):
        raise TypeError(f"dims must be a sequence of integers; got {dims!r}")
    sizes = []
    for size in dims:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"dims must be integers; got {size!r}")
        sizes.append(size.__index__())
    if not sizes:
        raise ValueError("dims must hold at least one size; got none")
    if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(f"dims must be at least 1 and strictly increasing; got {sizes}")
    if limit is not None and sizes[-1] > limit:
        raise ValueError(f"dims must not exceed {limit_name} ({limit}); got {sizes}")
    return tuple(sizes)
