"""Running a function in another process, to check that saved files are sufficient."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

__all__ = ["run_in_new_process"]


def run_in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh interpreter, which is started once and kept for later calls.

    The function must be importable by name, arguments and result must pickle: pass files, not tensors.
    """
    return _pool().submit(function, *args).result(timeout=120)


@functools.cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
