"""`lowdim export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.cli.options import print_line

__all__ = ["export"]


def export(
    adapter: Annotated[Path, typer.Argument(help="A folder with an adapter that lowdim or PEFT saved, or a run.")],
    out: Annotated[Path, typer.Argument(help="Where to write.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; read from the run's record if left out.")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="peft or merged.")] = "peft",
    rank: Annotated[int | None, typer.Option("--rank", help="Cut every layer to this rank; says the error by layer.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="classify or causal-lm.")] = None,
    target: Annotated[str | None, typer.Option("--for", help="vllm or llamacpp: LoRA that it loads, checked first.")] = None,
    max_error: Annotated[float | None, typer.Option("--max-error", help="Choose each layer's rank by this error.")] = None,
    keep_mask: Annotated[
        bool, typer.Option("--keep-mask", help="merged: what is exactly 0 in a sparse base model stays 0.")
    ] = False,
) -> None:
    """Write an adapter for PEFT (vLLM, llama.cpp), or merge it into a transformers checkpoint."""
    from lowdim.adapters.core.files.peft import RANKS
    from lowdim.adapters.core.files.peft_targets import rank_limit
    from lowdim.jobs import ExportSettings
    from lowdim.jobs import export as run

    settings = ExportSettings(
        adapter=adapter, out=out, model=model, format=format, rank=rank, task=task, target=target, max_error=max_error,
        keep_mask=keep_mask,
    )  # fmt: skip
    result = run(settings)
    console = Console()
    if result.errors:
        _show_errors(console, result, rank_limit(target))
    else:
        print_line(console, "exact" if format == "peft" else "merged; rounded once to the weights' dtype")
    if (out / RANKS).is_file():
        print_line(console, f"ranks and errors by layer: {out / RANKS}")
    for note in result.notes:
        print_line(console, note)
    print_line(console, f"written {out}; how to load it: {out / 'README.md'}")


def _show_errors(console: Console, result: Any, limit: int | None) -> None:
    """The error of truncation, layer by layer, and a rank with almost none."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer")
    table.add_column("rank", justify="right")
    table.add_column("of", justify="right")
    table.add_column("relative error of truncating", justify="right")
    for layer, rank in result.ranks.items():
        table.add_row(escape(layer), str(rank), str(result.whole_ranks.get(layer, "")), f"{result.errors.get(layer, 0.0):.4f}")
    console.print(table)
    wanted = result.suggested_rank
    if max(result.errors.values()) > 0.01:
        if wanted is None:
            print_line(console, "--max-error 0.01 finds the ranks with an error of 1 % or less.")
        elif limit is not None and wanted > limit:
            print_line(console, f"An error of 1 % or less needs rank {wanted}, above the limit of {limit}.")
        else:
            print_line(console, f"--rank {wanted} would bring every layer to an error of 1 % or less.")
    print_line(console, "Each layer's update is its best approximation of that rank; --format merged loses nothing.")
