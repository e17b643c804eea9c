"""`lowdim compare`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from lowdim.cli.options import Methods, Model, parse_seconds

__all__ = ["compare"]


def compare(
    model: Model = "minilm",
    data: Annotated[list[str] | None, typer.Option("--data", help="jsonl, csv, tsv, parquet or text; repeatable.")] = None,
    evaluation: Annotated[str | None, typer.Option("--eval", help="A separate test file.")] = None,
    task: Annotated[str, typer.Option("--task", help="classify, causal-lm or pretrain.")] = "classify",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="pretrain: bytes, characters or a folder.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="The text column; two of them for a pair of texts.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Name of the label column.")] = None,
    methods: Methods = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB; what does not fit is left out.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="accuracy, f1 (macro), mcc; perplexity, loss.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of each method at its chosen rate.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Learning rates tried for each method, 1 to 5.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of each run.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in an optimizer step.")] = 16,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens kept of a text.")] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", help="E.g. 90s, 10m, 2h: fewer rates and seeds, at least one of both each.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of everything that is drawn.")] = 0,
    out: Annotated[str, typer.Option("--out", help="Folder of the results.")] = "lowdim-compare",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison in --out.")] = False,
) -> None:
    """Which method is best for this model, this data and this memory? Forecast, train fairly, export the winner."""
    from lowdim.compare import compare as run
    from lowdim.compare.runner import quote
    from lowdim.jobs import compare_settings
    from lowdim.units import parse_bytes

    settings = compare_settings(
        model=model, data=data, evaluation=evaluation, task=task, tokenizer=tokenizer,
        text=",".join(text) if text else None, label=label,
        methods=",".join(methods).split(",") if methods else (),
        budget=None if budget is None else parse_bytes(budget), metric=metric,
        seeds=seeds, trials=trials, steps=steps, batch_size=batch_size, max_length=max_length, seed=seed,
        time_limit=None if time_limit is None else parse_seconds(time_limit),
    )  # fmt: skip
    run(settings, out, resume=resume, console=Console(), command=quote(sys.argv[1:]))
