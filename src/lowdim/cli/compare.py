"""`lowdim compare`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from lowdim.cli.options import MODEL_HELP, Methods, rates_of

__all__ = ["compare"]


def compare(
    model: Annotated[str | None, typer.Option("--model", help=f"{MODEL_HELP} Default: by the task.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="jsonl, json, csv, tsv, parquet or text, or a folder of images; repeatable."),
    ] = None,
    evaluation: Annotated[str | None, typer.Option("--eval", help="A separate test file.")] = None,
    validation: Annotated[str | None, typer.Option("--validation", help="A separate validation file.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="classify (with --data the default), regress, instruct, causal-lm, pretrain, image, tokens or embed."
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="pretrain: bytes, characters or a folder.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="The text column; two of them for a pair of texts, or for prompt and answer."),
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="The column of the label, the number or the tags.")] = None,
    label_separator: Annotated[
        str | None, typer.Option("--label-separator", help="What stands between several labels of a text, e.g. ';'.")
    ] = None,
    methods: Methods = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB; what does not fit is left out.")] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="One of the task's metrics, e.g. f1, spearman, exact-match.")
    ] = None,
    answer_pattern: Annotated[
        str | None, typer.Option("--answer-pattern", help="instruct: number, or a regular expression with a group.")
    ] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="A text that must not be forgotten: its loss is shown.")] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            "--trials",
            metavar="N|curvature",
            help="Learning rates of each method in the search, 1 to 5; curvature: 3 and a measured one.",
        ),
    ] = None,
    sizes: Annotated[int | None, typer.Option("--sizes", help="Ranks of each method in the search, 1 to 4.")] = None,
    equal: Annotated[
        str | None, typer.Option("--equal", help="Methods of one size are alike in: parameters, flops, memory or none.")
    ] = None,
    search: Annotated[str | None, typer.Option("--search", help="halving, or grid: all candidates to their end.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Rounds of the final at most, each with a new seed.")] = None,
    prefer: Annotated[
        str | None, typer.Option("--prefer", help="Of methods that may be the best, the least memory, time, size; or score.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of each run.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Texts in an optimizer step.")] = 16,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens kept of a text.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time-limit", help="E.g. 90s, 10m, 2h, for all of it.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of everything that is drawn.")] = 0,
    report_to: Annotated[
        str | None, typer.Option("--report-to", help="A tracker that is installed: tensorboard, wandb, mlflow, trackio.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Keep the base's linear weights in few bits: int8, int4 or nf4.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="adamw, or adamw8bit with moments in 8 bits.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 by autocast; the weights keep their dtype.")] = False,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Put texts of like length into a batch: less padding.")
    ] = False,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", help="farms: a second row for each adapter, with ranks by layer from FARMS. Default: uniform."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes that train, each on a device of its own where there are several.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Of each training; default: all, or an equal share for each worker.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Train on a Ray cluster: host:port, auto or local. --out must be shared.")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="Folder of the results.")] = "lowdim-compare",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the comparison in --out.")] = False,
    compress: Annotated[
        bool, typer.Option("--compress", help="Compressions at equal bytes; --budget is then a ladder: 0.9x,0.7x,0.5x.")
    ] = False,
) -> None:
    """Which method is best for this model, this data and this memory? Forecast, train fairly, export the winner."""
    if compress:
        given = {"--eval": evaluation, "--validation": validation, "--tokenizer": tokenizer, "--metric": metric}
        given |= {"--label-separator": label_separator, "--answer-pattern": answer_pattern, "--keep": keep, "--sizes": sizes}
        given |= {"--equal": equal, "--search": search, "--prefer": prefer, "--time-limit": time_limit, "--ray": ray}
        given |= {"--report-to": report_to, "--quantize": quantize, "--optimizer": optimizer, "--workers": workers}
        given |= {"--ranks": ranks, "--bf16": bf16 or None, "--group-by-length": group_by_length or None}
        strange = [name for name, value in given.items() if value is not None]
        if strange:
            raise ValueError(f"{', '.join(strange)} cannot be used with --compress")
        usual = {"max_length": max_length, "steps": steps, "rates": rates_of(rates), "seeds": seeds, "task": task}
        _compressions(
            {name: value for name, value in usual.items() if value is not None}, model=model, data=data, text=text,
            label=label, methods=methods, budget=budget, batch_size=batch_size, seed=seed, out=out, resume=resume,
        )  # fmt: skip
        return
    from lowdim.comparison import compare as run
    from lowdim.comparison.runner import quote
    from lowdim.jobs import compare_settings
    from lowdim.units import parse_bytes, parse_seconds

    settings = compare_settings(
        model=model, data=data, evaluation=evaluation, validation=validation, task=task, tokenizer=tokenizer,
        text=",".join(text) if text else None, label=label, label_separator=label_separator,
        methods=",".join(methods).split(",") if methods else (),
        budget=None if budget is None else parse_bytes(budget), metric=metric,
        answer_pattern=answer_pattern, keep=keep, rates=rates_of(rates), sizes=sizes, equal=equal, search=search, seeds=seeds,
        prefer=prefer, quantize=quantize, optimizer=optimizer, ranks=ranks, bf16=bf16, group_by_length=group_by_length,
        steps=steps, batch_size=batch_size, max_length=max_length, seed=seed, report_to=report_to,
        time_limit=None if time_limit is None else parse_seconds(time_limit), workers=workers, threads=threads, ray=ray,
    )  # fmt: skip
    run(settings, out, resume=resume, console=Console(), command=quote(sys.argv[1:]))


def _compressions(
    usual: dict[str, Any],
    *,
    model: str | None,
    data: list[str] | None,
    text: list[str] | None,
    label: str | None,
    methods: list[str] | None,
    budget: str | None,
    batch_size: int,
    seed: int,
    out: str,
    resume: bool,
) -> None:
    """`--compress`: without a model, the small language model on the shipped text."""
    from lowdim.cli.options import print_line
    from lowdim.comparison.runner import quote
    from lowdim.pipeline import FamilySettings, compare_families

    if (model is None) != (data is None):
        raise ValueError("--compress needs both --model and --data, or neither for the shipped model and text")
    named = {"methods": methods, "budgets": None if budget is None else [budget]}
    lists: dict[str, Any] = {key: tuple(",".join(value).split(",")) for key, value in named.items() if value}
    settings = FamilySettings(
        model=model or "stories260k", data=tuple(data or ("lowdim:shakespeare",)), text=",".join(text) if text else None,
        label=label, batch_size=batch_size, seed=seed, **usual, **lists,
    )  # fmt: skip
    console = Console()
    compare_families(settings, out, resume=resume, command=quote(sys.argv[1:]), say=lambda line: print_line(console, line))
    print_line(console, f"written {out}, with families.json and report.html")
