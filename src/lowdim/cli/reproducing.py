"""`lowdim reproduce`."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.catalogue import entries, find
from lowdim.errors import unknown

__all__ = ["reproduce"]


def reproduce(slug: str, data: Path | None, quick: bool, out: Path) -> None:
    """Run the experiment, print claim, numbers and verdict, write the record."""
    entry = find(slug)
    if not entry.reproduction:
        raise unknown(f"system ({entry.name} is not built yet)", slug, [e.slug for e in entries() if e.reproduction])
    from lowdim.files import write_json
    from lowdim.reproduce import Context
    from lowdim.train.environment import environment

    console = Console()
    console.print(f"[bold]{escape(entry.name)}[/]  {escape(entry.paper)}", highlight=False)
    console.print(f"claim   {entry.claim}", highlight=False, markup=False)
    module, _, function = entry.reproduction.partition(":")
    run = getattr(importlib.import_module(module), function)
    begun = time.monotonic()
    with console.status("running") as status:
        outcome = run(Context(data=data, quick=quick, say=lambda line: status.update(str(line))))
    seconds = time.monotonic() - begun
    console.print(f"setting {outcome.setting}", highlight=False, markup=False)
    if outcome.rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
        for column in columns:
            table.add_column(column)
        for row in outcome.rows:
            table.add_row(*(escape(_show(row.get(column))) for column in columns))
        console.print(table)
    for check in outcome.checks:
        sign = "[green]holds[/]" if check.passed else "[red]fails[/]"
        what = escape(f"{check.name}: {_show(check.value)} {check.relation} {_show(check.bound)}")
        console.print(f"{sign}  {what}", highlight=False)
    for note in outcome.notes:
        console.print(f"note    {note}", highlight=False, markup=False)
    verdict = outcome.verdict if not quick else f"{outcome.verdict} (quick: proves nothing)"
    console.print(f"[bold]verdict {verdict}[/]   {seconds:.0f} s", highlight=False)
    if not quick:
        record = {**outcome.to_dict(), "environment": environment(), "seconds": round(seconds, 1)}
        console.print(
            f"written {write_json(out / f'{entry.slug}.json', record)}", highlight=False, markup=False, soft_wrap=True
        )


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
