"""`lowdim report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowdim.cli.options import print_line

__all__ = ["report"]


def report(
    source: Annotated[Path, typer.Argument(help="A record (comparison, run, pipeline or families .json), or its folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; in the record's folder if left out.")] = None,
) -> None:
    """Draw the page of a comparison, run or pipeline again from its record."""
    from lowdim.jobs import report as run

    print_line(Console(), f"written {run(source, out)}")
