"""Large tensors are worked through piece by piece. A forecast runs two of the pieces, and counts the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from lowdim.linalg.leading import has_numbers

__all__ = ["counting_pieces", "slices"]


class _Counter(Protocol):
    def now(self) -> Any: ...

    def repeat(self, before: Any, times: float) -> None: ...


_counter: _Counter | None = None


def slices(total: int, piece: int, like: Tensor) -> Iterator[slice]:
    """Slices of `piece` entries that cover `range(total)`; the last may be shorter.

    If `like` has no numbers (a forecast), only the first two are given: the second allocates what any other would, and its work
    is counted for those that are left out (`counting_pieces`).

    Example:
        >>> import torch, lowdim.linalg as la
        >>> [(s.start, s.stop) for s in la.slices(10, 4, torch.ones(10))]
        [(0, 4), (4, 8), (8, 10)]
        >>> [(s.start, s.stop) for s in la.slices(10, 4, torch.ones(10, device="meta"))]
        [(0, 4), (4, 8)]
    """
    starts = range(0, total, piece)
    whole = len(starts) <= 2 or has_numbers(like)
    for start in starts if whole else starts[:1]:
        yield slice(start, min(start + piece, total))
    if not whole:
        counter = _counter
        before = counter.now() if counter is not None else None
        yield slice(piece, 2 * piece)
        if counter is not None:
            counter.repeat(before, (total - 2 * piece) / piece)


@contextmanager
def counting_pieces(counter: _Counter) -> Iterator[None]:
    """Inside the block, `counter.repeat(before, times)` is called for slices that are left out.

    Args:
        counter: `before` is what its `now()` returned at the slice that stands for them.
    """
    global _counter
    kept, _counter = _counter, counter
    try:
        yield
    finally:
        _counter = kept
