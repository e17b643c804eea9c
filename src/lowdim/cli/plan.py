"""`lowdim plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.cli.options import Methods, Model, print_line

__all__ = ["plan"]


def plan(
    model: Model,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB.")] = None,
    methods: Methods = "all",
    task: Annotated[str, typer.Option("--task", help="classify, causal-lm or pretrain.")] = "causal-lm",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in a forward pass.")] = 1,
    length: Annotated[int, typer.Option("--length", help="Tokens in a sequence.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Instead of each method's own, if it has one.")] = None,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="Free gradients at once, if the optimizer can.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show which modules the patterns match.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Forecast the peak memory of training by each method, without allocating the model."""
    from lowdim.jobs import PlanSettings
    from lowdim.jobs import plan as run
    from lowdim.units import parse_bytes

    limit = None if budget is None else parse_bytes(budget)
    settings = PlanSettings(
        model=model, methods=methods, task=task, batch_size=batch_size, length=length, dtype=dtype,
        gradient_checkpointing=checkpointing, rank=rank, layerwise=layerwise, budget=limit,
    )  # fmt: skip
    console = Console()
    if layers:
        _show_layers(console, settings)
        return
    with console.status("forecasting") as status:
        outcome = run(settings, say=status.update)
    from lowdim.plan import affordable, table

    if as_json:
        print(json.dumps([f.to_dict() for f in outcome.forecasts], indent=1))
    else:
        console.print(table(list(outcome.forecasts), limit))
    if unchanged := settings.unchanged():
        notes = Console(stderr=True) if as_json else console
        print_line(notes, f"--rank does not change {', '.join(unchanged)}: they have no rank")
    for variant, reason in outcome.refused:
        print_line(Console(stderr=True) if as_json else console, f"{variant.label}: {reason}")
    if not outcome.forecasts:
        raise ValueError("no method can train this model; the reasons are above")
    if limit is not None:
        affordable(list(outcome.forecasts), limit)  # raises if nothing fits


def _show_layers(console: Console, settings: object) -> None:
    from lowdim.jobs import touched_layers

    for variant, layers in touched_layers(settings):  # type: ignore[arg-type]
        table = Table(title=variant.label, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("module", "class", "shape", "trained"):
            table.add_column(name, justify="right" if name == "trained" else "left")
        for layer in layers:
            table.add_row(escape(layer.name), layer.kind, " x ".join(map(str, layer.shape)), f"{layer.trained:,}")
        console.print(table)
