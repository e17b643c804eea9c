"""The end of a comparison: its record and page are written and printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lowdim.records import ComparisonRecord
from lowdim.units import format_seconds

__all__ = ["PAGE", "finish"]

PAGE = "report.html"


def finish(result: ComparisonRecord, folder: Path, console: Console) -> ComparisonRecord:
    """Write and print the result; one that was written before, with the same numbers, stays as it is."""
    from lowdim.report import summary, write

    earlier = _same(result, folder)
    if earlier is None:
        result.write(folder)
    result = earlier or result
    if earlier is None or not (folder / PAGE).is_file():
        write(result.to_dict(), folder / PAGE)
    console.print(summary(result.to_dict(), width=console.width))
    for note in result.notes:
        console.print(f"[dim]-[/] {escape(note)}", highlight=False)
    winner = result.winner
    if winner is not None:
        console.print(escape(winner.why), highlight=False)
        place = f"winner  {folder / winner.folder} ({winner.format})"
        console.print(place, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report  {folder / PAGE}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"took    {format_seconds(result.seconds)}", highlight=False)
    return result


def _same(result: ComparisonRecord, folder: Path) -> ComparisonRecord | None:
    """The record in the folder, if it differs in time and command only."""
    if not (folder / result.file).is_file():
        return None
    earlier = ComparisonRecord.read(folder)
    now = ComparisonRecord.from_dict(json.loads(json.dumps(result.to_dict())), result.file)
    timed = {"created": earlier.created, "seconds": earlier.seconds, "command": earlier.command}
    return earlier if dataclasses.replace(now, **timed) == earlier else None
