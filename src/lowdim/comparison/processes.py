"""Workers that are processes of this machine, each with a device of its own where there are several."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from lowdim.comparison.crew import Crew, Done
from lowdim.comparison.runs import Contest, Run
from lowdim.comparison.worker import Answer, carried, get_ready, mark_of, perform_here, receive, warn_again
from lowdim.errors import LowdimError
from lowdim.temporary import clear_temporaries

__all__ = ["Processes"]

_MOMENT = 0.25  # seconds between two looks at the live table


class Processes(Crew):
    """So many processes, each with an executor of its own: one that dies takes no other with it, and it is known what it did.

    Args:
        workers: how many.
        threads: of each.
    """

    def __init__(self, workers: int, threads: int):
        super().__init__()
        self.size, self.threads = workers, threads
        self._members: list[_Member] = []
        self._open: dict[Future[Answer], tuple[Run, _Member]] = {}
        self._warned: dict[Any, int] = {}
        self._bench: Contest | None = None

    def call(self) -> None:
        """Start the processes."""
        devices = _devices()
        self._members = [
            _Member(self.threads, devices[place % len(devices)] if devices else None) for place in range(self.size)
        ]
        for member in self._members:
            member.call()

    def begin(self, bench: Contest) -> None:
        """Send what all runs share, and wait until every worker has it."""
        self._bench = bench
        parcel, mark = carried(bench), mark_of(bench)
        given = [(member, member.give(parcel, mark)) for member in self._members]
        for member, ready in given:
            member.check(ready)

    def start(self, run: Run, on_step: Callable[[], None]) -> None:
        """Give a run to a free worker."""
        busy = {id(member) for _, member in self._open.values()}
        member = next(each for each in self._members if id(each) not in busy)
        try:
            future = member.executor.submit(perform_here, run)
        except BrokenProcessPool:  # it died while it had nothing to do
            self._replace(member)
            future = member.executor.submit(perform_here, run)
        self._open[future] = run, member

    def ended(self, on_step: Callable[[], None]) -> list[Done]:
        """The runs that have ended; a lost one starts again."""
        done: list[Done] = []
        ready, _ = wait(self._open, timeout=_MOMENT, return_when=FIRST_COMPLETED)
        for future in ready:
            run, member = self._open.pop(future)
            try:
                answer = future.result()
            except BrokenProcessPool:
                self.lost(run, member.fate())
                self._replace(member)
                self.start(run, on_step)
            else:
                warn_again(answer.warned, self._warned)
                done.append(Done(run, answer.record, answer.seconds))
        on_step()
        return done

    def _replace(self, member: _Member) -> None:
        assert self._bench is not None
        member.end()
        clear_temporaries(self._bench.folder)
        member.call()
        member.check(member.give(carried(self._bench), mark_of(self._bench)))

    def end(self) -> None:
        """End the workers."""
        for member in self._members:
            member.kill()
        for member in self._members:
            member.end()
        if self._open and self._bench is not None:
            clear_temporaries(self._bench.folder)
        self._members, self._open = [], {}


@dataclass(eq=False)
class _Member:
    """A process, and the executor that gives it its work."""

    threads: int
    device: str | None
    executor: ProcessPoolExecutor = field(init=False)
    process: BaseProcess | None = None
    _ready: Future[int] = field(init=False)

    def call(self) -> None:
        """Start the process, which imports what it needs."""
        before = set(multiprocessing.active_children())
        self.executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        with _visible(self.device):
            self._ready = self.executor.submit(get_ready, self.threads, _levels())
        new = set(multiprocessing.active_children()) - before
        self.process = next(iter(new), None)

    def give(self, bench: Contest, mark: str) -> Future[None]:
        """Send what all runs share; functions and classes of a notebook go by value, and tensors without shared memory."""
        from joblib import wrap_non_picklable_objects

        try:
            return self.executor.submit(receive, wrap_non_picklable_objects(bench, keep_wrapper=False), mark)
        except BrokenProcessPool as error:
            raise self._unable(error) from error

    def check(self, given: Future[None]) -> None:
        """Wait until the process has what it needs.

        Raises:
            LowdimError: it has died, or the model or the task cannot be sent.
        """
        try:
            self._ready.result()
            given.result()
        except BrokenProcessPool as error:
            raise self._unable(error) from error
        except LowdimError:
            raise
        except Exception as error:
            raise LowdimError(
                f"--workers: the model or the task cannot be sent to another process ({type(error).__name__}: {error}); "
                "compare in one process"
            ) from error

    def _unable(self, error: BrokenProcessPool) -> LowdimError:
        return LowdimError(
            f"--workers: a worker did not start ({self.fate()}); if memory is short, take fewer workers; a script that calls "
            "lowdim.compare(workers=...) must do so under `if __name__ == '__main__':`"
        )

    def fate(self) -> str:
        """How the process ended, in words."""
        if self.process is None:
            return "its process ended"
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"its process ended with code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"its process was ended by {name}" + (", as the system does when memory is short" if code == -9 else "")

    def kill(self) -> None:
        """End the process now."""
        if self.process is not None:
            self.process.kill()

    def end(self) -> None:
        """Clear up after the process."""
        self.executor.shutdown(wait=True, cancel_futures=True)


def _levels() -> dict[str, int]:
    """The loggers whose levels are set here."""
    known = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    return {name: level for name, level in known.items() if level != logging.NOTSET}


def _devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names each device; empty without one, and for a single device, which all workers share."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if len(named) >= count else [str(place) for place in range(count)]


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """What is started inside sees this device only."""
    if device is None:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
