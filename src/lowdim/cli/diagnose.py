"""`lowdim diagnose`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    """Measure the weights of trained models. `lowdim list NAME` shows the options of a diagnostic."""
    from lowdim.files import write_json
    from lowdim.jobs import DiagnoseSettings, parse_options
    from lowdim.jobs import diagnose as run
    from lowdim.outputs import output_file

    given = {"base": base, "tuned": tuned}
    flags = [f"{name}={value!r}" for name, value in {"k": k, "threshold": threshold}.items() if value is not None]
    options = parse_options(diagnostic, [*flags, *(option or ())])
    inputs = {name: value for name, value in given.items() if value is not None}
    console = Console()
    with nullcontext() if out is None else output_file(out):
        result = run(DiagnoseSettings(diagnostic=diagnostic, inputs=inputs, options=options))
        print_line(console, str(result))
        if out is not None:
            print_line(console, f"written {write_json(out, result.to_dict(), sealed=True)}")
