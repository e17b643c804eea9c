"""`lowdim compare`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from lowdim.cli.options import Model, parse_seconds

__all__ = ["compare"]

#: Without --data: a sample of sentence polarity and a short run, to end within five minutes on two cores.
_DEMO = {"seeds": 3, "trials": 2, "steps": 20, "max_length": 40, "time_limit": 255.0}
_USUAL = {"seeds": 3, "trials": 3, "steps": 100, "max_length": 128, "time_limit": None}


def compare(
    model: Model = "minilm",
    data: Annotated[list[str] | None, typer.Option("--data", help="jsonl, csv, tsv, parquet or text; repeatable.")] = None,
    evaluation: Annotated[str | None, typer.Option("--eval", help="A separate test file.")] = None,
    task: Annotated[str, typer.Option("--task", help="classify, causal-lm or pretrain.")] = "classify",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="pretrain: bytes, characters or a folder.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Name of the text column.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Name of the label column.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Names, families or all, with commas.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB; what does not fit is left out.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="accuracy, f1, mcc; perplexity, loss.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of each method at its chosen rate.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Learning rates tried for each method, 1 to 5.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of each run.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in an optimizer step.")] = 16,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens kept of a text.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time-limit", help="E.g. 90s, 10m, 2h: fewer seeds if needed.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of everything that is drawn.")] = 0,
    out: Annotated[str, typer.Option("--out", help="Folder of the results.")] = "lowdim-compare",
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in --out.")] = False,
) -> None:
    """Which method is best for this model, this data and this memory? Forecast, train fairly, export the winner."""
    given: dict[str, Any] = {
        "model": model, "evaluation": evaluation, "task": task, "text": text, "label": label, "metric": metric,
        "batch_size": batch_size, "seed": seed, "tokenizer": tokenizer,
    }  # fmt: skip
    limit = None if time_limit is None else parse_seconds(time_limit)
    if budget is not None:
        from lowdim.units import parse_bytes

        given["budget"] = parse_bytes(budget)
    from lowdim.compare import CompareSettings
    from lowdim.compare import compare as run
    from lowdim.compare.runner import quote
    from lowdim.models.architectures import SHAPES

    demo = data is None and task == "classify"
    if task == "pretrain" and tokenizer is None and model in SHAPES:
        given["tokenizer"] = "bytes"
    given["data"] = tuple(data or ["lowdim:sentence-polarity" if demo else "lowdim:shakespeare"])
    given["methods"] = tuple(methods.split(",")) if methods else ()
    chosen = {"seeds": seeds, "trials": trials, "steps": steps, "max_length": max_length, "time_limit": limit}
    given |= {key: usual if chosen[key] is None else chosen[key] for key, usual in (_DEMO if demo else _USUAL).items()}
    run(CompareSettings(**given), out, resume=resume, console=Console(), command=quote(sys.argv[1:]))
