"""Damage files, one at a time, and read them.

    python tests/fuzz/run.py [--count 10000] [--seed 0] [--only TEXT ...] [--out results/fuzz.json]

A finding is a file that ends in a traceback, in an error of more than 2,000 characters, in nothing after ten seconds, or, where
files carry checksums, in other numbers than were written. The exit code is 1 where there are findings.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fuzz.damage import damaged
from fuzz.readers import READERS, Reader
from lowdim.cli.errors import _expected
from lowdim.files import write_json

LIMIT = 10  # seconds
LONGEST = 2000  # characters of a message


@dataclass(frozen=True)
class Finding:
    """A damaged file that was not answered rightly; `reader`, `seed` and `number` make it again."""

    reader: str
    seed: int
    number: int
    file: str
    what: str


class _TooSlow(BaseException):
    """Ten seconds are over; no reader catches it."""


def sweep(name: str, count: int, seed: int = 0, folder: Path | None = None, start: int = 0) -> Iterator[Finding]:
    """Damage the files of one reader `count` times; what was not answered rightly."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary) / "whole"
        place.mkdir(parents=True, exist_ok=True)
        reader.make(place)
        files = sorted({path for pattern in reader.files for path in place.glob(pattern) if path.is_file()})
        contents = {path: path.read_bytes() for path in files}
        want = reader.read(place)
        for number in range(start, start + count):
            draw = random.Random(f"{name}/{seed}/{number}")
            chosen = draw.choice(files)
            chosen.write_bytes(damaged(chosen.name, contents[chosen], draw))
            what = _answer(reader, place, want) if chosen.read_bytes() != contents[chosen] else ""
            chosen.write_bytes(contents[chosen])
            if what:
                yield Finding(name, seed, number, str(chosen.relative_to(place)), what)


def _answer(reader: Reader, place: Path, want: Any) -> str:
    """Empty where the damaged folder is answered rightly."""
    begun = time.monotonic()
    try:
        with _limited(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = reader.read(place)
    except _TooSlow:
        return f"nothing after {LIMIT} s"
    except Exception as error:  # noqa: BLE001 (which error it is, is what is asked)
        if not _expected(error):
            return f"{type(error).__name__}: {str(error)[:300]}"
        if len(str(error)) > LONGEST:
            return f"a message of {len(str(error)):,} characters: {str(error)[:200]}"
        return ""
    if time.monotonic() - begun > LIMIT:
        return f"more than {LIMIT} s"
    return _difference(got, want) if reader.sealed else ""


def _difference(got: Any, want: Any) -> str:
    if got.keys() != want.keys():
        return f"other tensors are accepted: {sorted(got.keys() ^ want.keys())[:3]}"
    wrong = [key for key, value in want.items() if not torch.equal(got[key], value)]
    return f"other numbers are accepted: {', '.join(wrong[:3])}" if wrong else ""


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def over(*_: Any) -> None:
        raise _TooSlow

    usual = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, usual)


def main() -> int:
    """The long run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("results/fuzz.json"))
    words = parser.parse_args()
    names = [name for name in READERS if not words.only or any(word in name for word in words.only)]
    whole = sum(READERS[name].weight for name in names)
    findings, counts = [], {}
    for name in names:
        counts[name] = words.count * READERS[name].weight // whole
        begun = time.monotonic()
        found = []
        for finding in sweep(name, counts[name], words.seed):
            found.append(finding)
            print(f"  {finding.number} {finding.file}: {finding.what}", flush=True)
        findings += found
        print(f"{name}: {counts[name]} files, {len(found)} findings, {time.monotonic() - begun:.0f} s", flush=True)
    write_json(words.out, {"files": counts, "seed": words.seed, "findings": [asdict(finding) for finding in findings]})
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
