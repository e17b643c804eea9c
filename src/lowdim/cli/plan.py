"""`lowdim plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.cli.options import Methods, Model, print_line

if TYPE_CHECKING:
    from lowdim.jobs import PlanSettings

__all__ = ["plan"]


def plan(
    model: Model,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB.")] = None,
    methods: Methods = None,
    task: Annotated[str, typer.Option("--task", help="classify, causal-lm or pretrain.")] = "causal-lm",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in a forward pass.")] = 1,
    length: Annotated[int, typer.Option("--length", help="Tokens in a sequence.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Instead of each method's own, if it has one.")] = None,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="Free gradients at once, if the optimizer can.")] = False,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Forward passes (gradient accumulation) of a step.")] = 1,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="bytes, a folder or hub id, for pretrain.")] = None,
    classes: Annotated[int, typer.Option("--classes", help="Classes of --task classify.")] = 2,
    master_weights: Annotated[
        bool, typer.Option("--master-weights", help="With float32 copies of trained 16-bit weights.")
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show which modules the patterns match.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Forecast the peak memory of training by each method, without allocating the model.

    Not counted: the program and a GPU's context, what the allocator keeps, the data, and work done once before training.
    """
    from lowdim.jobs import PlanSettings
    from lowdim.jobs import plan as run
    from lowdim.units import parse_bytes

    limit = None if budget is None else parse_bytes(budget)
    settings = PlanSettings(
        model=model, methods=",".join(methods or ["all"]), task=task, batch_size=batch_size, length=length, dtype=dtype,
        gradient_checkpointing=checkpointing, rank=rank, layerwise=layerwise, accumulate=accumulate, tokenizer=tokenizer,
        classes=classes, master_weights=master_weights, budget=limit,
    )  # fmt: skip
    console = Console()
    notes = Console(stderr=True) if as_json else console
    if layers:
        _show_layers(console, settings)
        _print_notes(notes, settings)
        return
    with console.status("forecasting") as status:
        outcome = run(settings, say=status.update)
    from lowdim.plan import affordable, table

    if as_json:
        print(json.dumps([f.to_dict() for f in outcome.forecasts], indent=1))
    else:
        console.print(table(list(outcome.forecasts), limit))
    _print_notes(notes, settings)
    for variant, reason in outcome.refused:
        print_line(notes, f"{variant.label}: {reason}")
    if not outcome.forecasts:
        raise ValueError("no method can train this model; the reasons are above")
    if limit is not None:
        affordable(list(outcome.forecasts), limit)  # raises if nothing fits


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
