"""The crew that the settings ask for, and how many threads each of its trainings has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowdim.comparison.crew import Alone, Crew
from lowdim.comparison.settings import CompareSettings
from lowdim.train.environment import environment

__all__ = ["hired", "limited_threads", "threads_of"]


def threads_of(settings: CompareSettings) -> int:
    """Threads of each training: those that are asked for, or an equal share of this process's; one on a Ray cluster."""
    if settings.threads is not None:
        return settings.threads
    return 1 if settings.ray is not None else max(1, torch.get_num_threads() // (settings.workers or 1))


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """The process itself works with so many threads inside, too: a fitted head then has the same bits whoever trains."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    environment.cache_clear()  # it tells the number of threads
    try:
        yield
    finally:
        torch.set_num_threads(before)
        environment.cache_clear()


@contextmanager
def hired(settings: CompareSettings) -> Iterator[Crew]:
    """Those who train, until the end of the block, however it ends.

    Raises:
        MissingExtraError: Ray is not installed.
        LowdimError: no cluster answers at the address.
    """
    crew: Crew
    if settings.ray is not None:
        from lowdim.comparison.cluster import Cluster

        crew = Cluster(settings.ray, settings.workers, threads_of(settings))
    elif (settings.workers or 1) > 1:
        from lowdim.comparison.processes import Processes

        crew = Processes(settings.workers or 1, threads_of(settings))
    else:
        crew = Alone()
    try:
        yield crew
    finally:
        crew.end()
