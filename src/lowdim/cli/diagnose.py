"""`lowdim diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.cli.options import Pairs, print_line

__all__ = ["diagnose"]


def diagnose(
    diagnostic: Annotated[str, typer.Argument(help="A name of `lowdim list diagnose`.")],
    base: Annotated[str | None, typer.Option("--base", help="The model before: a folder, safetensors file or name.")] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="The model after.")] = None,
    option: Pairs = None,
    k: Annotated[int | None, typer.Option("--k", help="Same as --option k=…")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Same as --option threshold=…")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON.")] = None,
) -> None:
    """Measure what training left in the weights. `lowdim list NAME` shows the options of a diagnostic."""
    from lowdim.files import write_json
    from lowdim.jobs import DiagnoseSettings, parse_options
    from lowdim.jobs import diagnose as run

    given = {"base": base, "tuned": tuned}
    flags = [f"{name}={value!r}" for name, value in {"k": k, "threshold": threshold}.items() if value is not None]
    options = parse_options(diagnostic, [*flags, *(option or ())])
    inputs = {name: value for name, value in given.items() if value is not None}
    result = run(DiagnoseSettings(diagnostic=diagnostic, inputs=inputs, options=options))
    console = Console()
    _show(console, result)
    if out is not None:
        print_line(console, f"written {write_json(out, result.to_dict())}")


def _show(console: Console, result: Any) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "intruders", "least similar"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, layer in result.layers.items():
        table.add_row(escape(name), str(layer.count), f"{float(min(layer.similarity)):.3f}")
    console.print(table)
    print_line(console, f"{result.total} intruder dimensions among the first {result.k} of {len(result.layers)} matrices")
