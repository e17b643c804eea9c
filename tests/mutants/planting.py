"""Planting a fault in a copy of the package, and seeing whether the tests that should catch it do."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CAUGHT, SURVIVED, BROKEN, TIMED_OUT = "caught", "survived", "broken", "timed out"


@dataclass(frozen=True)
class Tests:
    """A selection of tests.

    Attributes:
        nodes: pytest's node ids below tests/, as `adapters/test_lora.py::TestLoRA`.
        keyword: pytest's `-k`; tests marked slow can be selected, too.
        shared: only the tests that `lowdim.testing` gives, so that the file's own cannot help.
    """

    nodes: tuple[str, ...]
    keyword: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Fault:
    """One wrong line.

    Attributes:
        what: is wrong, for the report.
        file: below src/lowdim.
        old: the text that is replaced; it must occur exactly once.
        new: what takes its place.
        tests: that should catch it.
    """

    what: str
    file: str
    old: str
    new: str
    tests: Tests

    def line(self) -> int:
        """Where it is planted, from 1.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        path = ROOT / "src" / "lowdim" / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.what}: the text to replace occurs {count} times in {self.file}:\n{self.old}")
        return text.count("\n", 0, text.index(self.old)) + 1


@dataclass(frozen=True)
class Outcome:
    """What a run of tests said: one of `CAUGHT`, `SURVIVED`, `BROKEN` (nothing ran, or not to its end), `TIMED_OUT`."""

    status: str
    seconds: float
    output: str

    @property
    def failed(self) -> list[str]:
        """The tests that failed."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return [line.split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") for line in lines]


class Copy:
    """A copy of the package's sources, one fault at a time in it. The tests are those of the repository.

    Use it as a context manager, or close it: each copy has a process from which its test runs are forked.
    """

    def __init__(self, folder: Path):
        self.folder, self.source = folder, folder / "src"
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        command = [sys.executable, str(Path(__file__).with_name("forks.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)  # no lowdim but the copy's
        self.forks = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process from which test runs are forked."""
        assert self.forks.stdin is not None
        self.forks.stdin.close()
        self.forks.wait()

    @contextlib.contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The fault is there inside the block, and gone after it."""
        fault.line()  # raises where the text is not there exactly once
        path = self.source / "lowdim" / fault.file
        text = path.read_text(encoding="utf-8")
        try:
            _write(path, text.replace(fault.old, fault.new))
            yield
        finally:
            _write(path, text)

    def run(self, tests: Tests, timeout: float = 60.0, *, to_the_end: bool = False) -> Outcome:
        """Run the selection on the copy as it is now, up to the first failure or to the end."""
        nodes = [f"tests/{node}" for node in tests.nodes]
        options = [
            *([] if to_the_end else ["-x"]),
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "slow or not slow",
            "--tb=short",
            "--hypothesis-seed=0",
        ]
        options += ["-k", tests.keyword] if tests.keyword else []
        options += ["-p", "mutants.shared_only"] if tests.shared else []
        output = self.folder / "output.txt"
        request = {
            "path": [str(self.source), str(ROOT / "tests")],
            "arguments": [*options, *nodes],
            "output": str(output),
            "timeout": math.ceil(timeout),
        }
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        begun = time.monotonic()
        self.forks.stdin.write(json.dumps(request) + "\n")
        self.forks.stdin.flush()
        code = int(self.forks.stdout.readline())
        status = {0: SURVIVED, 1: CAUGHT, -signal.SIGALRM: TIMED_OUT}.get(code, BROKEN)
        text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
        return Outcome(status, time.monotonic() - begun, text)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Python recognises a stale compiled file by size and whole seconds, which two faults may share.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
