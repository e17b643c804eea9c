"""Collecting what one run leaves behind, and not looking through the rest of the program for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["own_garbage"]

_depth = 0


@contextmanager
def own_garbage() -> Iterator[None]:
    """Within it only objects that were made inside are looked at by the garbage collector; at the end it is run.

    A trainer, its callbacks and the model hold each other, so a run's memory comes back by the collector only. With torch and
    transformers loaded a full collection takes half a second, which is much beside a short run; the objects of a run are few.

    Example:
        >>> from lowdim.train.garbage import own_garbage
        >>> with own_garbage():
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
