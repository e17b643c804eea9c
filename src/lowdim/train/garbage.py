"""Garbage collection of one run's objects only."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["isolated_gc"]

_depth = 0


@contextmanager
def isolated_gc() -> Iterator[None]:
    """Limits garbage collection to objects created inside the block, and collects once at the end.

    A trainer, its callbacks and the model reference each other, so only the collector frees a run's memory. With torch and
    transformers loaded a full collection takes half a second, which is long for a short run; the objects of a run are few.

    Example:
        >>> from lowdim.train.garbage import isolated_gc
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
