"""What runs in another process than the comparison itself, on this machine or another one."""

from __future__ import annotations

import copy
import dataclasses
import logging
import multiprocessing
import os
import platform
import signal
import threading
import time
import warnings
from typing import Any, NamedTuple

import torch

from lowdim.checksums import file_checksum
from lowdim.comparison.runs import Contest, Run, perform
from lowdim.errors import LowdimError
from lowdim.garbage import isolated_gc
from lowdim.linalg import Memory
from lowdim.records import ComparedRun

__all__ = ["Answer", "Warned", "carried", "get_ready", "mark_of", "perform_here", "receive", "warn_again"]

#: What says that a worker sees the folder of the comparison, and not one of that name.
_MARK = "settings.json"
_contest: Contest | None = None


class Warned(NamedTuple):
    """A warning of another process."""

    text: str
    category: type[Warning]
    file: str
    line: int


class Answer(NamedTuple):
    """What a worker says of a run: its record, the seconds that it took, and what it was warned of."""

    record: ComparedRun
    seconds: float
    warned: list[Warned]


def carried(bench: Contest) -> Contest:
    """What of a contest goes to the workers: the model on the CPU, and nothing that this process does itself."""
    model = bench.model
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):
        model = copy.deepcopy(model).cpu()
    folder = bench.folder.resolve()
    return dataclasses.replace(
        bench, model=model, folder=folder, tracking=None, memory=Memory(), untouched=None, untouched_samples=[]
    )


def mark_of(bench: Contest) -> str:
    """The checksum of the file by which a worker knows the folder."""
    return file_checksum(bench.folder / _MARK)


def get_ready(threads: int, levels: dict[str, int]) -> int:
    """Prepare a new process: its threads, what it prints, and that it ends with the one that started it; returns its number.

    Args:
        levels: of the loggers that the first process has quieted.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the first one ends the others
    torch.set_num_threads(threads)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    import lowdim.train.trainer  # noqa: F401  (takes seconds, while the first process reads the data)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    return os.getpid()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def receive(bench: Contest, mark: str) -> None:
    """Keep what all runs share.

    Raises:
        LowdimError: this process does not see the folder of the comparison.
    """
    global _contest
    try:
        seen = file_checksum(bench.folder / _MARK)
    except OSError:
        seen = ""
    if seen != mark:
        raise LowdimError(
            f"the worker on {platform.node()} does not see {bench.folder}: name an --out that all machines share, with the "
            "same path on each"
        )
    if torch.cuda.is_available():
        bench.model.cuda()
    _contest = bench


def perform_here(run: Run) -> Answer:
    """Train a run with what was received."""
    assert _contest is not None
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught, isolated_gc():
        warnings.simplefilter("default", UserWarning)
        record = perform(_contest, run)
    warned = [Warned(str(each.message), each.category, each.filename, each.lineno) for each in caught]
    return Answer(record, time.monotonic() - begun, warned)


def warn_again(warned: list[Warned], seen: dict[Any, int]) -> None:
    """Repeat the warnings of another process in this one, each once as far as its filters say so.

    Args:
        seen: what was repeated before.
    """
    for each in warned:
        warnings.warn_explicit(each.text, each.category, each.file, each.line, registry=seen)
