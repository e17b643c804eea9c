"""Workers on a Ray cluster. All its machines see the folder of the comparison under one path, and have lowdim installed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lowdim.comparison.crew import Crew, Done
from lowdim.comparison.runs import Contest, Run
from lowdim.comparison.worker import Answer, carried, mark_of, perform_here, receive, warn_again
from lowdim.errors import LowdimError, MissingExtraError

__all__ = ["Cluster"]

_MOMENT = 0.25  # seconds between two looks at the live table
_PATIENCE = 10.0  # seconds for an address to answer
# What opens HTTP/2, which Ray speaks: the preface, and a frame of no settings (type 4), to which a server replies with its own.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_LOST = {
    "WorkerCrashedError": "its process ended",
    "OutOfMemoryError": "Ray ended its process, since memory was short",
    "NodeDiedError": "its machine is gone",
    "ObjectLostError": "its result is gone",
    "LocalRayletDiedError": "Ray on its machine ended",
}
_received = ""  # in a worker: the comparison that it works for


class Cluster(Crew):
    """A Ray cluster: a task for each run, on one device where the cluster has devices.

    Args:
        address: `host:port`, `ray://host:port`, `"auto"` (the cluster of this machine), or `"local"`, which starts one here.
        workers: runs at once at most; None: as many as the cluster has room for.
        threads: of each, which is also the number of CPUs that a task asks for.

    Raises:
        MissingExtraError: Ray is not installed.
        LowdimError: no cluster answers, or it has no machine with so many CPUs.
    """

    def __init__(self, address: str, workers: int | None, threads: int):
        super().__init__()
        self._ray, self._ours = _connected(address, workers, threads)
        self.threads = threads
        self._open: dict[Any, Run] = {}
        self._warned: dict[Any, int] = {}
        self._token = uuid.uuid4().hex
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        places = gpus or sum(int(node.get("CPU", 0)) // threads for node in nodes)
        if not places:
            self.end()
            raise LowdimError(f"--ray {address}: no machine of the cluster has {threads} CPUs for a run; take fewer --threads")
        self.size = workers or places
        remote = self._ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=0)
        self._train, self._check = remote(_train), remote(_check)

    def begin(self, bench: Contest) -> None:
        """Put what all runs share on the cluster, and try it on one machine."""
        self._parcel, self._mark = self._ray.put(carried(bench)), mark_of(bench)
        self._result(self._check.remote([self._parcel], self._token, self._mark, self.threads))

    def start(self, run: Run, on_step: Callable[[], None]) -> None:
        """Submit a run."""
        self._open[self._train.remote([self._parcel], self._token, self._mark, self.threads, run)] = run

    def ended(self, on_step: Callable[[], None]) -> list[Done]:
        """The runs that have ended; a lost one starts again."""
        done: list[Done] = []
        ready, _ = self._ray.wait(list(self._open), num_returns=1, timeout=_MOMENT)
        for task in ready:
            run = self._open.pop(task)
            try:
                answer: Answer = self._result(task)
            except _Lost as loss:
                self.lost(run, str(loss))
                self.start(run, on_step)
            else:
                warn_again(answer.warned, self._warned)
                done.append(Done(run, answer.record, answer.seconds))
        on_step()
        return done

    def _result(self, task: Any) -> Any:
        """What a task gave, or the error that ended it."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else LowdimError(f"a worker of the cluster failed: {error}")) from None
        except tuple(getattr(errors, name) for name in _LOST) as error:
            raise _Lost(next(why for name, why in _LOST.items() if isinstance(error, getattr(errors, name)))) from None
        except errors.RayError as error:
            raise LowdimError(f"--ray: the cluster failed: {error}") from error

    def end(self) -> None:
        """Cancel what is open, and let go of the cluster."""
        for task in self._open:
            with contextlib.suppress(Exception):
                self._ray.cancel(task, force=True)
        self._open = {}
        if self._ours:
            self._ray.shutdown()


class _Lost(Exception):
    """A task ended with its worker."""


def _check(parcel: list[Any], token: str, mark: str, threads: int) -> None:
    """In a worker: receive what all runs share, unless it is there."""
    global _received
    if _received != token:
        import ray

        import lowdim.train.trainer  # noqa: F401

        torch.set_num_threads(threads)
        receive(ray.get(parcel[0]), mark)
        _received = token


def _train(parcel: list[Any], token: str, mark: str, threads: int, run: Run) -> Answer:
    """In a worker: train a run."""
    _check(parcel, token, mark, threads)
    return perform_here(run)


def _connected(address: str, workers: int | None, threads: int) -> tuple[Any, bool]:
    """Ray, connected, and whether it was connected here."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--ray") from error
    if ray.is_initialized():
        return ray, False
    _check_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        cores = (workers or max(1, (os.cpu_count() or 1) // threads)) * threads
        how |= {"num_cpus": cores, "include_dashboard": False}
    try:
        with _own_signals():
            ray.init(address, **how)
    except ImportError as error:  # ray://, which needs grpcio
        raise LowdimError(f"--ray {address}: {error}") from error
    except Exception as error:
        raise LowdimError(f"--ray {address}: no Ray cluster answers there ({type(error).__name__}: {error})") from error
    return ray, True


def _check_answer(address: str) -> None:
    """Raise LowdimError for an address at which nothing answers as Ray does; Ray itself would try for minutes."""
    if address in ("local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit():
        raise LowdimError(f"--ray must be host:port, ray://host:port, auto or local; got {address!r}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                connection.sendall(_HELLO)
                frame = connection.recv(9)
                if frame[3:4] != b"\x04":
                    raise OSError("something else than Ray listens there")
    except (OSError, OverflowError) as error:
        raise LowdimError(f"--ray {address}: no Ray cluster answers there ({error})") from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets a handler for SIGTERM; ours comes back."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
