"""Threads of torch's own arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block torch computes in one thread: for many small products, and for times that are to be compared.

    Several threads wait for each other at the end of each product. Where another program has one of their cores, that takes
    milliseconds, which is nothing for a large product and a hundred times the work of a small one.

    Example:
        >>> import torch
        >>> from lowdim.threads import one_thread
        >>> with one_thread():
        ...     torch.get_num_threads()
        1
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
