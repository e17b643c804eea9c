"""`lowdim run`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowdim.cli.options import print_line
from lowdim.locking import exclusive

if TYPE_CHECKING:
    from lowdim.train.recipes import Recipe

__all__ = ["run"]


def run(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML. Without one: --task and --model.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Instead of the recipe's: pretrain, classify, causal-lm ...")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Instead of the recipe's.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Instead of the recipe's; repeatable.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Instead of the recipe's.")] = None,
    ffn: Annotated[
        str | None,
        typer.Option(
            "--ffn", help="Feed-forward layers from scratch: blockdense, blockshuffle, lowrank or dense; ',rank=64' after it."
        ),
    ] = None,
    mixer: Annotated[
        str | None, typer.Option("--mixer", help="In the place of attention, from scratch: delta-product or s4d.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Instead of the recipe's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Instead of the recipe's.")] = None,
    master_weights: Annotated[
        bool, typer.Option("--master-weights", help="Keep float32 copies of trained bfloat16 weights.")
    ] = False,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Keep the base's linear weights in few bits: int8, int4 or nf4.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="adamw, or adamw8bit with moments in 8 bits.")] = None,
    watch: Annotated[
        int | None, typer.Option("--watch", help="Measure what training does to the layers, every so many steps; 0: never.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", help="farms: each layer of an adapter has its own rank, from FARMS; or uniform.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe and print it filled in.")] = False,
) -> None:
    """Train with one method, as described in a recipe."""
    import yaml

    from lowdim.catalogue import variant
    from lowdim.methods import with_options, with_ranks
    from lowdim.train.recipes import load_recipe, new_recipe

    if recipe is None and (task is None or model is None):
        raise typer.BadParameter("name a recipe, or --task and --model")
    given: dict[str, Any] = {
        "model": model, "task": task, "data": data or None, "method": method, "ffn": ffn, "mixer": mixer,
        "out": None if out is None else str(out), "steps": steps, "master_weights": True if master_weights else None,
        "quantize": quantize, "optimizer": optimizer, "watch": watch, "ranks": ranks,
    }  # fmt: skip
    loaded = new_recipe(**given) if recipe is None else load_recipe(recipe, **given)
    with_ranks(with_options(variant(loaded.method), loaded.options), loaded.ranks)
    console = Console()
    if check:
        console.print(yaml.safe_dump(loaded.model_dump(), sort_keys=False, allow_unicode=True), highlight=False, markup=False)
        return
    folder = Path(loaded.out)
    first = not int(os.environ.get("RANK", "0"))  # of several processes: the one that prints and writes
    with exclusive(folder) if first else nullcontext():
        _run(loaded, folder, resume, first, console)


def _run(loaded: Recipe, folder: Path, resume: bool, first: bool, console: Console) -> None:
    from lowdim.outputs import check_replaceable
    from lowdim.report import write_run
    from lowdim.train.run import run_recipe

    page, file = folder / "report.html", folder / "run.json"
    before = file.read_bytes() if file.is_file() else None
    if resume and before is None and first:
        check_replaceable(page)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        record = run_recipe(
            loaded,
            resume=resume,
            say=lambda line: bar.console.print(line, highlight=False, markup=False),
            callbacks=(_callback(bar, bar.add_task("training", total=loaded.steps)),),
        )
    if not first:
        return
    if file.read_bytes() != before or not page.exists():  # a finished run that is resumed stays as it is
        write_run(record, page)
    for line in _summary(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if "replacement" in record:
        vectors, items = folder / "index" / "vectors.safetensors", folder / "index" / "items.jsonl"
        console.print(
            f"to see it again: lowdim index-check {vectors}:old {vectors}:new --labels {items}:label --query {items}:asks",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    kept = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    print_line(console, f"written {kept}, {file}, {page}")


def _summary(record: dict[str, Any]) -> list[str]:
    """What the model wrote and scored before and after, in lines."""
    from lowdim.errors import shown
    from lowdim.records import metric_title

    lines = []
    for sample in record.get("samples", ()):
        lines += [f"prompt    {shown(sample['prompt'], 120)}"]
        lines += [f"  {name:<9}{shown(sample[name], 120)}" for name in ("before", "after", "expected")]
    title = metric_title(record["metric"])
    scores = {"validation": (record["before"], record["validation"]), "test": (record.get("before_test"), record["test"])}
    told = (
        f"{part} {title} {after:.4f}" if before is None else f"{part} {title} {before:.4f} before, {after:.4f} after"
        for part, (before, after) in scores.items()
    )
    lines.append(f"{record['label']}: {'; '.join(told)}")
    if replacement := record.get("replacement"):
        lines.append(f"the old index, {replacement['old']}: {replacement['verdict']}: {replacement['reason']}")
    if kept := record.get("kept"):
        lines.append(f"loss on the text to keep: {kept[0]:.4f} before, {kept[1]:.4f} after")
    return lines


def _callback(bar: Progress, task: Any) -> Any:
    """Moves the bar and shows the loss; defined here because its base class is imported late."""
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                shown = (("captured", "subspace_captured"), ("overlap", "subspace_overlap"))
                more = "".join(f"  {word} {float(logs[key]):.2f}" for word, key in shown if key in logs)
                bar.update(task, description=f"loss {float(logs['loss']):.4f}{more}")

    return Tick()
