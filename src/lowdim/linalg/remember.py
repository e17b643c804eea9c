"""Results that are kept for a while: a comparison decomposes the same weights for every rate, size and seed."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import xxhash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Memory", "is_remembering", "recall", "remembered"]

P = ParamSpec("P")
R = TypeVar("R")

_active: Memory | None = None


class Memory:
    """What functions marked with `remembered` have returned, by the content of their arguments.

    A result is given out as a copy, and has the bits that the function would return again.

    Args:
        limit: bytes that are kept; what was used least recently goes first.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> memory = la.Memory()
        >>> with memory.active():
        ...     first, again = la.svd(torch.eye(3)), la.svd(torch.eye(3))
        >>> memory.hits, torch.equal(first[1], again[1])
        (1, True)
    """

    def __init__(self, limit: int = 2**30):
        self.limit = limit
        self.hits = 0
        self.bytes = 0
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, remembered functions look here first."""
        global _active
        before, _active = _active, self
        try:
            yield
        finally:
            _active = before

    def find(self, key: bytes) -> Any:
        """A copy of what is kept under a key; None if there is nothing."""
        if key not in self._kept:
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return _copy(self._kept[key])

    def keep(self, key: bytes, result: Any) -> None:
        """Keep a copy, unless it is too large."""
        size = _bytes(result)
        if size > self.limit:
            return
        self._kept[key] = _copy(result)
        self.bytes += size
        while self.bytes > self.limit:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])


def is_remembering() -> bool:
    """Whether a `Memory` is active: what was computed once may then be had for nothing."""
    return _active is not None


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a pure function of tensors and plain values: its results are kept while a `Memory` is active.

    What it calls itself is not kept besides. Tensors without numbers (in forecasts) are passed on.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return recall((function.__qualname__, args, sorted(kwargs.items())), lambda: function(*args, **kwargs))

    return call


def recall(question: Any, answer: Callable[[], R]) -> R:
    """What `answer()` returned when the same question was asked before while a `Memory` was active; else `answer()`.

    Args:
        question: tensors, numbers and strings in tuples, lists and dicts, compared by content; anything else is never found.

    Example:
        >>> import torch
        >>> from lowdim.linalg import Memory, recall
        >>> with Memory().active():
        ...     [recall(("sum", torch.ones(2)), lambda n=n: n) for n in (1, 2)]
        [1, 1]
    """
    global _active
    memory = _active
    digest = xxhash.xxh3_128()  # for a few hundred MB at every attaching; nobody chooses weights that collide
    if memory is None or not _feed(digest, question):
        return answer()
    result = memory.find(digest.digest())
    if result is None:
        _active = None
        try:
            result = answer()
        finally:
            _active = memory
        memory.keep(digest.digest(), result)
    return result


def _feed(digest: Any, value: Any) -> bool:
    """Add a value to a digest; False for what has no content to compare."""
    if isinstance(value, Tensor):
        if value.is_meta or isinstance(value, FakeTensor) or value.layout != torch.strided:
            return False
        digest.update(f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return True
    if isinstance(value, Mapping):
        return _feed(digest, list(value.items()))
    if isinstance(value, (tuple, list)):
        digest.update(f"{len(value)} values".encode())
        return all(_feed(digest, each) for each in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        digest.update(f"{value!r};".encode())
        return True
    return False


def _copy(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, dict):
        return {name: _copy(value) for name, value in result.items()}
    return tuple(map(_copy, result)) if isinstance(result, tuple) else result


def _bytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    values = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else ()
    return sum(map(_bytes, values))
