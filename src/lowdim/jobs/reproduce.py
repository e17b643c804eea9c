"""Run a paper's claim as an experiment, and keep its record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.catalogue import Entry, entries, find
from lowdim.errors import unknown
from lowdim.outputs import output_file

__all__ = ["Reproduction", "reproduce", "reproducible"]


@dataclass(frozen=True)
class Reproduction:
    """The outcome of an experiment, and its time.

    Attributes:
        file: the record that was written; None for a quick run, which proves nothing.
    """

    outcome: Any
    seconds: float
    file: Path | None


def reproducible(slug: str) -> Entry:
    """The row of a system that has an experiment.

    Raises:
        UnknownNameError: unknown, or not built yet.
    """
    entry = find(slug)
    if not entry.reproduction:
        raise unknown(f"system ({entry.name} is not built yet)", slug, [e.slug for e in entries() if e.reproduction])
    return entry


def reproduce(slug: str, context: Any, out: str | Path) -> Reproduction:
    """Run the experiment of a system and write `SLUG.json` in `out`, unless it was a quick run.

    Args:
        context: `lowdim.reproduce.Context`.

    Raises:
        FileExistsError: the record is a file that lowdim did not write.
        InUseError: another command works on it.
    """
    entry = reproducible(slug)
    run = entry.build_reproduction()
    if context.quick:
        return Reproduction(*_timed(run, context), None)
    from lowdim.files import write_json
    from lowdim.train.environment import environment

    with output_file(Path(out) / f"{entry.slug}.json") as file:
        outcome, seconds = _timed(run, context)
        record = {**outcome.to_dict(), "environment": environment(), "seconds": round(seconds, 1)}
        return Reproduction(outcome, seconds, write_json(file, record, sealed=True))


def _timed(run: Callable[[Any], Any], context: Any) -> tuple[Any, float]:
    """What the experiment gives, and its seconds."""
    begun = time.monotonic()
    outcome = run(context)
    return outcome, time.monotonic() - begun
