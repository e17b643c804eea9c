"""`lowdim run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["run"]


def run(path: Path, out: Path | None, resume: bool, steps: int | None, check: bool) -> None:
    """Load, check, train, report."""
    from lowdim import strategies
    from lowdim.catalogue import variant
    from lowdim.train.recipes import load_recipe

    recipe = load_recipe(path, out=None if out is None else str(out), steps=steps)
    strategies.with_options(variant(recipe.method), recipe.options)
    console = Console()
    if check:
        console.print(yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True), highlight=False, markup=False)
        return
    from lowdim.report import write_run
    from lowdim.train.run import run_recipe

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("training", total=recipe.steps)
        record = run_recipe(
            recipe,
            resume=resume,
            say=lambda line: bar.console.print(line, highlight=False, markup=False),
            callbacks=(_bar(bar, task),),
        )
    if int(os.environ.get("RANK", "0")):
        return  # the first process tells and writes
    folder = Path(recipe.out)
    write_run(record, folder / "report.html")
    metric = record["metric"]
    console.print(
        f"{record['label']}: validation {metric} {record['before']:.4f} before, {record['validation']:.4f} after; "
        f"test {record['test']:.4f}",
        highlight=False,
        markup=False,
    )
    kept = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    written = f"written {kept}, {folder / 'run.json'}, {folder / 'report.html'}"
    console.print(written, highlight=False, markup=False, soft_wrap=True)


def _bar(bar: Progress, task: Any) -> Any:
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                seen = (("captured", "subspace_captured"), ("overlap", "subspace_overlap"))
                more = "".join(f"  {word} {float(logs[key]):.2f}" for word, key in seen if key in logs)
                bar.update(task, description=f"loss {float(logs['loss']):.4f}{more}")

    return Tick()
