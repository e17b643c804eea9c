"""Run a paper's claim as an experiment, and keep its record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.catalogue import Entry, entries, find
from lowdim.errors import unknown

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
    """
    from lowdim.files import write_json
    from lowdim.train.environment import environment

    entry = reproducible(slug)
    run = entry.build_reproduction()
    begun = time.monotonic()
    outcome = run(context)
    seconds = time.monotonic() - begun
    if context.quick:
        return Reproduction(outcome, seconds, None)
    record = {**outcome.to_dict(), "environment": environment(), "seconds": round(seconds, 1)}
    return Reproduction(outcome, seconds, Path(write_json(Path(out) / f"{entry.slug}.json", record)))
