"""`lowdim index-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowdim.cli.options import print_line

__all__ = ["index_check"]


def index_check(
    old: Annotated[str, typer.Argument(help="Embeddings by the old model: .npy, .npz, .safetensors, .parquet, or FILE:KEY.")],
    new: Annotated[str, typer.Argument(help="Embeddings of the same items in the same order by the new model.")],
    labels: Annotated[
        str | None, typer.Option("--labels", help="A label for each item: .npy, a table (FILE:COLUMN), or lines.")
    ] = None,
    query: Annotated[
        str | None, typer.Option("--query", help="Which items ask (1 or 0 for each); else half of each class.")
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Neighbours that are compared where there are no labels.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of the intervals.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the page (.html) or the record (.json).")] = None,
) -> None:
    """Say whether an index may stay when its model is replaced, or must be rebuilt."""
    from lowdim.jobs import IndexCheckSettings
    from lowdim.jobs import index_check as run

    console = Console()
    report = run(IndexCheckSettings(old=old, new=new, labels=labels, query=query, k=k, seed=seed, out=out))
    print_line(console, str(report))
    if out is not None:
        print_line(console, f"written {out}")
