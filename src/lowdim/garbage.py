"""Garbage collection where many objects are made: of one run's objects only, or later."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["isolated_gc", "paused_gc"]

_depth = 0


@contextmanager
def isolated_gc() -> Iterator[None]:
    """Limits garbage collection to objects created inside the block, and collects once at the end.

    A trainer, its callbacks and the model reference each other, so only the collector frees a run's memory. With torch and
    transformers loaded a full collection takes half a second, which is long for a short run; the objects of a run are few.

    Example:
        >>> from lowdim.garbage import isolated_gc
        >>> with isolated_gc():
        ...     one = []
        ...     one.append(one)
        ...     del one
    """
    global _depth
    if _depth == 0:
        gc.freeze()
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        gc.collect()
        if _depth == 0:
            gc.unfreeze()


@contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection inside the block: thousands of new modules would each time be searched with all that is loaded.

    Example:
        >>> import gc
        >>> from lowdim.garbage import paused_gc
        >>> with paused_gc():
        ...     gc.isenabled()
        False
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
