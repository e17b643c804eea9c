"""`lowdim diagnose`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lowdim.cli.options import Pairs, print_line

__all__ = ["diagnose"]


def diagnose(
    diagnostic: Annotated[str, typer.Argument(help="A name of `lowdim list diagnose`, or all: one page about a model.")],
    model: Annotated[
        str | None,
        typer.Argument(help="A model: a folder (an adapter's too), file or name. intrinsic-dimension takes a recipe."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The model before: a folder, safetensors file or name.")] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="The model after.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Files of texts, or lowdim:shakespeare; repeatable.")] = None,
    option: Pairs = None,
    k: Annotated[int | None, typer.Option("--k", help="Same as --option k=…")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Same as --option threshold=…")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Same as --option batch_size=…")] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="Same as --option optimizer=…")] = None,
    layer: Annotated[str | None, typer.Option("--layer", help="Same as --option layer=…")] = None,
    dims: Annotated[str | None, typer.Option("--dims", help="Same as --option dims=[…]: numbers with commas.")] = None,
    search: Annotated[str | None, typer.Option("--search", help="Same as --option search=…")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Same as --option seeds=…")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON; of all, the folder of the page.")] = None,
) -> None:
    """Measure trained models. `lowdim list NAME` shows the options of a diagnostic."""
    from lowdim.files import write_json
    from lowdim.jobs import DiagnoseSettings, parse_options
    from lowdim.jobs import diagnose as run
    from lowdim.outputs import output_file

    if diagnostic == "all":
        if tuned is not None:
            raise ValueError("--tuned: diagnose all measures MODEL, against --base")
        _all(model, base, data, parse_options("all", [*_pairs(k=k, threshold=threshold), *(option or ())]), out)
        return
    given = {"model": model, "base": base, "tuned": tuned, "data": data}
    short = {"batch_size": batch_size, "optimizer": optimizer, "layer": layer, "search": search, "seeds": seeds}
    flags = [*_pairs(k=k, threshold=threshold, **short), *([] if dims is None else [f"dims=[{dims}]"])]
    options = parse_options(diagnostic, [*flags, *(option or ())])
    inputs = {name: value for name, value in given.items() if value is not None}
    console = Console()
    with nullcontext() if out is None else output_file(out):
        settings = DiagnoseSettings(diagnostic=diagnostic, inputs=inputs, options=options)
        result = run(settings, say=lambda line: print_line(console, line))
        print_line(console, str(result))
        if out is not None:
            print_line(console, f"written {write_json(out, result.to_dict(), sealed=True)}")


def _pairs(**given: Any) -> list[str]:
    return [f"{name}={value!r}" for name, value in given.items() if value is not None]


def _all(model: str | None, base: str | None, data: list[str] | None, options: dict[str, Any], out: Path | None) -> None:
    """Everything about one model, as a page."""
    import shlex
    import sys
    from functools import partial

    from lowdim.jobs import DiagnosisSettings, diagnose_all, write_diagnosis
    from lowdim.jobs.options import check_options, options_of
    from lowdim.outputs import new_folder

    if model is None:
        raise ValueError("diagnose all measures MODEL; missing: MODEL")
    known = {name: option for name, option in options_of(DiagnosisSettings).items() if name in ("k", "threshold", "rows")}
    check_options("all", known, options)
    console = Console()
    with new_folder(out or Path("lowdim-diagnosis")) as folder:
        settings = DiagnosisSettings(model=model, base=base, data=tuple(data or ()), **options)
        done = diagnose_all(settings, say=partial(print_line, console))
        print_line(console, str(done))
        for name, why in done.not_measured.items():
            print_line(console, f"not measured: {name}: {why}")
        written = write_diagnosis(done, folder, command=shlex.join(["lowdim", *sys.argv[1:]]))
    print_line(console, f"written {', '.join(map(str, written))}")
