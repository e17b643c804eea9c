"""`lowdim reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.cli.options import print_line

__all__ = ["reproduce"]


def reproduce(
    slug: Annotated[str, typer.Argument(help="A system of the catalogue.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of data sets (or LOWDIM_DATA).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds and steps: shows that it runs, proves nothing.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of the result file.")] = Path("results"),
) -> None:
    """Run a paper's claim as an experiment: prints the claim, the numbers and a verdict."""
    from lowdim.jobs.reproduce import reproduce as run
    from lowdim.jobs.reproduce import reproducible

    entry = reproducible(slug)
    from lowdim.reproduce import Context

    console = Console()
    console.print(f"[bold]{escape(entry.name)}[/]  {escape(entry.paper)}", highlight=False)
    print_line(console, f"claim   {entry.claim}")
    with console.status("running") as status:
        done = run(slug, Context(data=data, quick=quick, say=lambda line: status.update(str(line))), out)
    _show(console, done.outcome)
    verdict = f"{done.outcome.verdict} (quick: proves nothing)" if quick else done.outcome.verdict
    console.print(f"[bold]verdict {verdict}[/]   {done.seconds:.0f} s", highlight=False)
    if done.file is not None:
        print_line(console, f"written {done.file}")


def _show(console: Console, outcome: Any) -> None:
    """Setting, table, checks and notes."""
    console.print(f"setting {outcome.setting}", highlight=False, markup=False)
    if outcome.rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
        for column in columns:
            table.add_column(column)
        for row in outcome.rows:
            table.add_row(*(escape(_text(row.get(column))) for column in columns))
        console.print(table)
    for check in outcome.checks:
        sign = "[green]holds[/]" if check.passed else "[red]fails[/]"
        what = escape(f"{check.name}: {_text(check.value)} {check.relation} {_text(check.bound)}")
        console.print(f"{sign}  {what}", highlight=False)
    for note in outcome.notes:
        console.print(f"note    {note}", highlight=False, markup=False)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
