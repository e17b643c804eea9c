"""`lowdim plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.catalogue import Variant
from lowdim.catalogue import methods as choose
from lowdim.errors import check_choice, check_int

__all__ = ["plan"]

_DTYPES = ("float32", "bfloat16", "float16")


def plan(
    model: str,
    budget: str | None,
    methods: str,
    task: str,
    batch_size: int,
    length: int,
    dtype: str,
    checkpointing: bool,
    rank: int | None,
    layerwise: bool,
    layers: bool,
    as_json: bool,
) -> None:
    """Forecast each method and print what fits."""
    check_choice("--task", task, ("classify", "causal-lm", "pretrain"))
    check_choice("--dtype", dtype, _DTYPES)
    check_int("--batch-size", batch_size, 1)
    check_int("--length", length, 1)
    from lowdim.units import parse_bytes

    limit = None if budget is None else parse_bytes(budget)
    from lowdim.strategies import kind_of

    chosen = [v for v in choose(methods) if task == "classify" or v.name != "linear-probe"]
    if rank is not None:
        check_int("--rank", rank, 1)
        chosen = [dataclasses.replace(v, options={**v.options, "rank": rank}) if "rank" in v.options else v for v in chosen]
    if task == "pretrain":
        chosen = [v for v in chosen if kind_of(v) != "adapter"]
    import torch

    from lowdim import models
    from lowdim.plan import affordable, forecast, shows, table

    config = models.load_config(model)
    console = Console()
    if layers:
        _show_layers(console, config, chosen, task, shows)
        return
    outlooks, refused = [], []
    with console.status("forecasting") as status:
        for variant in chosen:
            status.update(f"forecasting {variant.label}")
            try:
                outlooks.append(
                    forecast(
                        config,
                        variant,
                        batch_size=batch_size,
                        sequence_length=length,
                        task=task,
                        dtype=getattr(torch, dtype),
                        gradient_checkpointing=checkpointing,
                        layerwise=layerwise and kind_of(variant) == "optimizer",
                        budget_bytes=limit,
                    )
                )
            except (ValueError, TypeError) as error:
                refused.append((variant, str(error)))
    if as_json:
        print(json.dumps([f.to_dict() for f in outlooks], indent=1))
    else:
        console.print(table(outlooks, limit))
    for variant, reason in refused:
        (Console(stderr=True) if as_json else console).print(f"{variant.label}: {reason}", highlight=False, markup=False)
    if not outlooks:
        raise ValueError("no method can train this model; the reasons are above")
    if limit is not None:
        affordable(outlooks, limit)  # raises where nothing fits


def _show_layers(console: Console, config: object, chosen: list[Variant], task: str, shows: Callable[..., Any]) -> None:
    for variant in chosen:
        table = Table(title=variant.label, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("module", "class", "shape", "trained"):
            table.add_column(name, justify="right" if name == "trained" else "left")
        for touched in shows(config, variant, task=task):
            table.add_row(escape(touched.name), touched.kind, " x ".join(map(str, touched.shape)), f"{touched.trained:,}")
        console.print(table)
