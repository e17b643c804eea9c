"""`lowdim sizes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowdim.cli.options import print_line

__all__ = ["sizes"]


def sizes(
    model: Annotated[str, typer.Argument(help="A sentence encoder: a folder, a hub id, or minilm.")],
    data: Annotated[list[str], typer.Option("--data", help="Pairs of texts, with or without a score; repeatable.")],
    beside: Annotated[
        str | None, typer.Option("--beside", help="Another model to show beside it, such as the untouched one.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The two columns of the texts, with a comma.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="The column of the score.")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Numbers of layers, with commas; else all.")] = None,
    dims: Annotated[str | None, typer.Option("--dims", help="Dimensions, with commas; else halves of the whole.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Pairs that are read at most.")] = 2000,
    within: Annotated[float, typer.Option("--within", help="Quality that the smallest size may lose.")] = 0.01,
    vectors: Annotated[int, typer.Option("--vectors", help="Vectors of the index whose size is shown.")] = 1_000_000,
    repeats: Annotated[int, typer.Option("--repeats", help="Of the timing.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the intervals.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the page (.html) or the record (.json).")] = None,
) -> None:
    """Measure a sentence encoder cut to fewer layers and dimensions: quality, bytes, time, and size of the index."""
    from lowdim.jobs import SizesSettings, parse_numbers
    from lowdim.jobs import sizes as run

    settings = SizesSettings(
        model=model, data=tuple(data), beside=beside, text=text, label=label, layers=parse_numbers("--layers", layers),
        dims=parse_numbers("--dims", dims), limit=limit, within=within, vectors=vectors, repeats=repeats, seed=seed, out=out,
    )  # fmt: skip
    outcome = run(settings)
    console = Console()
    for line in (*outcome.notes, str(outcome.table), *outcome.table.notes):
        print_line(console, line)
    if outcome.beside is not None:
        print_line(console, f"beside it, {beside}:\n{outcome.beside}")
    smallest = outcome.table.smallest(within)
    print_line(console, f"smallest within {within:g}: {smallest.layers} layers, {smallest.dim} dimensions")
    if out is not None:
        print_line(console, f"written {out}")
