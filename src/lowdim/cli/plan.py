"""`lowdim plan`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lowdim.cli.options import Methods, Model, print_line

if TYPE_CHECKING:
    from lowdim.jobs import FitOutcome, PlanOutcome, PlanSettings
    from lowdim.records import MeasuredRate

__all__ = ["plan"]


def plan(
    model: Model,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB.")] = None,
    methods: Methods = None,
    task: Annotated[
        str, typer.Option("--task", help="classify, regress, instruct, causal-lm, pretrain, image, tokens or embed.")
    ] = "causal-lm",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts or images in a forward pass.")] = 1,
    length: Annotated[int, typer.Option("--length", help="Tokens in a sequence.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Instead of each method's own, if it has one.")] = None,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="Free gradients at once, if the optimizer can.")] = False,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Forward passes (gradient accumulation) of a step.")] = 1,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="bytes, a folder or hub id, for pretrain.")] = None,
    classes: Annotated[int, typer.Option("--classes", help="Classes of --task classify, image or tokens.")] = 2,
    master_weights: Annotated[
        bool, typer.Option("--master-weights", help="With float32 copies of trained 16-bit weights.")
    ] = False,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="With the base's linear weights in few bits: int8, int4 or nf4.")
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, or adamw8bit with moments in 8 bits.")] = "adamw",
    bf16: Annotated[bool, typer.Option("--bf16", help="Computing in bfloat16 by autocast.")] = False,
    ranks: Annotated[
        str, typer.Option("--ranks", help="farms: ranks by layer from FARMS, which needs the weights; or uniform.")
    ] = "uniform",
    ffn: Annotated[str | None, typer.Option("--ffn", help="pretrain: feed-forward layers, as of lowdim run.")] = None,
    mixer: Annotated[
        str | None, typer.Option("--mixer", help="pretrain: delta-product or s4d in the place of attention.")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", help="Spread over so many by FSDP2; memory of each.")] = 1,
    layers: Annotated[bool, typer.Option("--layers", help="Show which modules the patterns match.")] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="The smallest change of each method's settings that fits --budget.")
    ] = False,
    recipes: Annotated[
        Path | None, typer.Option("--write-recipes", help="With --fit: a new folder for a recipe of each method that fits.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="With --write-recipes or --rates: what to train on.")] = None,
    rates: Annotated[
        str | None, typer.Option("--rates", help="curvature: load the model, and measure a learning rate on --data.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Forecast the peak memory of training by each method, without allocating the model (unless --rates measures on it).

    Not counted: the program and a GPU's context, what the allocator keeps, the data, and work done once before training.
    """
    from lowdim.jobs import PlanSettings
    from lowdim.jobs import plan as run
    from lowdim.units import parse_bytes

    limit = None if budget is None else parse_bytes(budget)
    settings = PlanSettings(
        model=model, methods=",".join(methods or ["all"]), task=task, batch_size=batch_size, length=length, dtype=dtype,
        gradient_checkpointing=checkpointing, rank=rank, layerwise=layerwise, accumulate=accumulate, tokenizer=tokenizer,
        classes=classes, master_weights=master_weights, quantize=quantize, optimizer=optimizer, bf16=bf16, ranks=ranks,
        ffn=ffn, mixer=mixer, devices=devices, budget=limit,
    )  # fmt: skip
    console = Console()
    notes = Console(stderr=True) if as_json else console
    if layers and (fit or as_json or limit is not None or rates is not None):
        raise ValueError(
            "--layers shows which modules are trained and forecasts nothing; leave out --fit, --budget, --rates and --json"
        )
    if layers:
        _show_layers(console, settings)
        _print_notes(notes, settings)
        return
    if fit and rates is not None:
        raise ValueError("--rates measures the settings as they are; --fit changes them: leave out one of the two")
    if not fit and (recipes is not None or (data and rates is None)):
        raise ValueError(
            "--write-recipes and --data are for --fit, which finds settings that fit --budget; --data is for --rates, too"
        )
    if fit:
        _fit(console, notes, settings, recipes, data or [], as_json)
        return
    measured = None if rates is None else _measured(notes, settings, data or [], rates)
    with _progress(settings) as (say, done):
        outcome = run(settings, say=say, done=done)
    from lowdim.plan import affordable, table

    if as_json:
        rows = [f.to_dict() for f in outcome.forecasts]
        print(json.dumps([{**row, **_rate_of(measured, row["method"])} for row in rows], indent=1))
    else:
        found = None if measured is None else {name: rate.lr for name, rate in measured.items()}
        console.print(table(list(outcome.forecasts), limit, found))
    _print_remarks(notes, settings, outcome)
    if limit is not None:
        affordable(list(outcome.forecasts), limit)  # raises if nothing fits


def _measured(notes: Console, settings: PlanSettings, data: list[str], origin: str) -> dict[str, MeasuredRate]:
    """`lowdim plan --rates`: a rate for each method; each is printed with its eigenvalue, or why there is none."""
    from lowdim.comparison.measured_rates import rate_sentence
    from lowdim.jobs import plan_rates

    with _progress(settings) as (say, _):
        found = plan_rates(settings, data, origin, say=say)
    for rate in found.values():
        print_line(notes, rate_sentence(rate))
    return found


def _rate_of(measured: dict[str, MeasuredRate] | None, method: str) -> dict[str, Any]:
    return {} if measured is None else {"measured_rate": measured[method].to_dict()}


def _fit(
    console: Console, notes: Console, settings: PlanSettings, recipes: Path | None, data: list[str], as_json: bool
) -> None:
    """`lowdim plan --fit`: a line for each method, and its recipe."""
    from lowdim.jobs import fit_plan, write_recipes
    from lowdim.outputs import new_folder
    from lowdim.plan import affordable, fit_table

    if data and recipes is None:
        raise ValueError("--data is what the recipes of --write-recipes train on; name their folder")
    with nullcontext() if recipes is None else new_folder(recipes), _progress(settings) as (say, done):
        outcome = fit_plan(settings, say=say, done=done)
    if as_json:
        print(json.dumps([found.to_dict() for found in outcome.fits], indent=1))
    else:
        console.print(fit_table(list(outcome.fits)))
    _print_remarks(notes, settings, outcome)
    assert settings.budget is not None
    affordable([found.forecast for found in outcome.fits], settings.budget)  # raises if nothing fits
    if recipes is not None:
        files = write_recipes(settings, outcome.fits, recipes, data)
        print_line(
            notes, f"written {len(files)} {'recipe' if len(files) == 1 else 'recipes'} to {recipes}: lowdim run {files[0]}"
        )


@contextmanager
def _progress(settings: PlanSettings) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar over the methods, on standard error; what to call before and after each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("forecasting", total=len(settings.chosen()))
        yield (lambda line: bar.update(task, description=line)), (lambda: bar.advance(task))


def _print_remarks(console: Console, settings: PlanSettings, outcome: PlanOutcome | FitOutcome) -> None:
    """Which methods are left out, why others cannot train the model, and which weights adapters do not reach.

    Raises:
        ValueError: none can.
    """
    _print_notes(console, settings)
    for variant, reason in outcome.refused:
        print_line(console, f"{variant.label}: {reason}")
    if outcome.unreached:
        print_line(console, f"adapters: {outcome.unreached}")
    if len(outcome.refused) == len(settings.chosen()):
        raise ValueError("no method can train this model; the reasons are above")


def _print_notes(console: Console, settings: PlanSettings) -> None:
    for note in settings.notes():
        print_line(console, note)


def _show_layers(console: Console, settings: PlanSettings) -> None:
    from lowdim.jobs import touched_layers

    for variant, layers in touched_layers(settings):
        table = Table(title=variant.label, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("module", "class", "shape", "trained"):
            table.add_column(name, justify="right" if name == "trained" else "left")
        for layer in layers:
            table.add_row(escape(layer.name), layer.kind, " x ".join(map(str, layer.shape)), f"{layer.trained:,}")
        console.print(table)
