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
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    out: Annotated[Path | None, typer.Option("--out", help="Instead of the recipe's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Instead of the recipe's.")] = None,
    master_weights: Annotated[
        bool, typer.Option("--master-weights", help="Keep float32 copies of trained bfloat16 weights.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe and print it filled in.")] = False,
) -> None:
    """Fine-tune with one method, as described in a recipe."""
    import yaml

    from lowdim.catalogue import variant
    from lowdim.methods import with_options
    from lowdim.train.recipes import load_recipe

    loaded = load_recipe(
        recipe, out=None if out is None else str(out), steps=steps, master_weights=True if master_weights else None
    )
    with_options(variant(loaded.method), loaded.options)
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
    from lowdim.records import metric_title
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
    console.print(
        f"{record['label']}: validation {metric_title(record['metric'])} {record['before']:.4f} before, "
        f"{record['validation']:.4f} after; test {record['test']:.4f}",
        highlight=False,
        markup=False,
    )
    kept = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    print_line(console, f"written {kept}, {file}, {page}")


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
