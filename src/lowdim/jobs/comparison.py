"""`lowdim.compare(...)`: the command `lowdim compare` as a function, also for models and tasks that are Python objects."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowdim.errors import CheckpointError
from lowdim.jobs.compare import compare_settings
from lowdim.records import ComparisonRecord
from lowdim.results import Result
from lowdim.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from lowdim.comparison.runs import Contest
    from lowdim.train.tasks.base import Task

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison(Result):
    """What `lowdim.compare` found.

    Attributes:
        record: as in `comparison.json`.
        folder: where everything lies.
    """

    left_out: ClassVar[tuple[str, ...]] = ("contest",)

    record: ComparisonRecord
    folder: Path
    contest: Contest

    def to_dict(self) -> dict[str, Any]:
        """The content of `comparison.json`."""
        return self.record.to_dict()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each method, and for what was never trained: its scores, size, rate and costs."""
        metric = self.record.metric.name
        return [
            {
                "method": row.label or row.name,
                metric: row.mean,
                "difference": row.difference,
                "±": row.half_width,
                "may be best": row.may_be_best,
                "size": row.size,
                "rate": row.lr,
                "trained": row.trained_parameters,
                "FLOPs per token": row.flops_per_token,
                "peak bytes": row.measured_peak_bytes or row.forecast_peak_bytes,
                "seconds per step": row.seconds_per_step,
                "file bytes": row.file_bytes,
                "status": row.status,
            }
            for row in self.record.methods
        ]

    @property
    def summary(self) -> str:
        """The verdict."""
        if self.record.judgement is not None and self.record.judgement.headline:
            return self.record.judgement.headline
        return self.record.title

    def _repr_html_(self) -> str:
        from lowdim.report import fragment

        return fragment(self.to_dict())

    @property
    def page(self) -> Path:
        """The report, a page for the browser."""
        return self.folder / "report.html"

    @property
    def winner(self) -> Path | None:
        """The folder of the method that is handed over; None where there is none."""
        return None if self.record.winner is None else self.folder / self.record.winner.folder

    def load_winner(self) -> Any:
        """The trained model of the method that is handed over: an `Adapted`, or the model itself.

        Raises:
            ValueError: no method is handed over. CheckpointError: its files are gone or damaged.
        """
        from lowdim.comparison.winner import restore

        winner = self.record.winner
        if winner is None:
            raise ValueError(f"no method is handed over: {self.summary}")
        seed = int(winner.exported.removeprefix("seed ")) - 1
        run = self.folder / "runs" / winner.method / f"seed-{seed}"
        if not run.is_dir():
            raise CheckpointError(f"{run} is missing, which holds the trained weights")
        return restore(self.contest, run)


def compare(
    *,
    task: str | Task | None = None,
    model: str | os.PathLike[str] | nn.Module | Callable[[], nn.Module] | None = None,
    data: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    methods: str | Iterable[str] = (),
    out: str | os.PathLike[str] = "lowdim-compare",
    resume: bool = False,
    console: Console | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    validation: str | os.PathLike[str] | None = None,
    tokenizer: str | None = None,
    text: str | tuple[str, str] | None = None,
    label: str | None = None,
    label_separator: str | None = None,
    budget: int | str | None = None,
    metric: str | None = None,
    answer_pattern: str | None = None,
    keep: str | os.PathLike[str] | None = None,
    seeds: int | None = None,
    rates: int | str | None = None,
    sizes: int | None = None,
    equal: str | None = None,
    search: str | None = None,
    prefer: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    time_limit: float | str | None = None,
    seed: int | None = None,
    limit: int | None = None,
    report_to: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    pretrained: bool = True,
    quantize: str | None = None,
    optimizer: str | None = None,
    ranks: str | None = None,
    bf16: bool = False,
    group_by_length: bool = False,
) -> Comparison:
    """Which method is best for this model, this data and this memory? Search, train fairly, judge, hand over.

    The settings are those of the command (`lowdim compare --help`), and so is the folder that is written. None means the
    command's default. Nothing is printed without a `console`.

    Args:
        task: its name, or a `Task`: of `lowdim.train.own_task(...)`, or a ready one such as
            `lowdim.train.classification(tokenizer, files)`.
        model: a name or a folder; with a `Task` also a module, or a function without arguments that builds one. It is copied
            for each run and stays as it is.
        data: files; a `Task` has its data already.
        methods: names and families, as a list or with commas.
        console: of `rich`, which shows the progress and the table.
        budget: bytes, or a text such as `"8GiB"`.
        rates: how many of each method's own are tried, 1 to 5, or `"curvature"`: three, and one that is measured from the
            curvature of its loss.
        time_limit: seconds, or a text such as `"10m"`.
        workers: processes that train; a script must call this under `if __name__ == "__main__":` then.
        threads: of each training.
        ray: the address of a Ray cluster that trains, or `"local"`.
        pretrained: False for a module with random weights: rates for training from scratch are tried.
        quantize: `"int8"`, `"int4"` or `"nf4"`: the base's linear weights are kept in few bits; a module is copied first.
        optimizer: `"adamw"`, or `"adamw8bit"` with moments in 8 bits.
        ranks: `"farms"` gives every adapter with ranks by layer a second row, `NAME+farms`, with ranks from the layers' tail
            exponents at the same number of trained parameters, and says whether it helped.
        bf16: train in bfloat16 by autocast, in which the search scores, too; the weights keep their dtype, in which the final
            scores.
        group_by_length: put rows of like length into a batch, so that less of it is padding.

    Returns:
        A `Comparison`: `rows()`, `to_dataframe()`, `summary`, `page`, `winner`, `load_winner()`.

    Raises:
        DataError, UnknownNameError, ValueError: of the settings, the data or the model, before anything is trained.
        BudgetError: no method fits.
        FileExistsError: `out` holds a comparison; `resume=True` continues it.
        CheckpointError: the model or the data has changed since.
    """
    from rich.console import Console as RichConsole

    from lowdim.comparison.runner import run_comparison

    own_model = None if model is None or isinstance(model, (str, os.PathLike)) else model
    own_task = None if task is None or isinstance(task, str) else task
    named_task = task if isinstance(task, str) else None
    if own_task is not None and data is not None:
        raise ValueError(f"data must be left out where task is a {type(own_task).__name__}, which has its data")
    objects = {"model": own_model, "task": own_task}
    settings = compare_settings(
        model=_text(model) if own_model is None else _label(own_model),
        task=named_task if own_task is None else own_task.kind,
        data=() if own_task is not None else _texts(data),
        methods=methods.split(",") if isinstance(methods, str) and methods else methods,
        given=tuple(name for name, value in objects.items() if value is not None) or None,
        evaluation=_text(evaluation),
        validation=_text(validation),
        tokenizer=tokenizer,
        text=",".join(text) if isinstance(text, tuple) else text,
        label=label,
        label_separator=label_separator,
        budget=parse_bytes(budget) if isinstance(budget, str) else budget,
        metric=metric,
        answer_pattern=answer_pattern,
        keep=_text(keep),
        seeds=seeds,
        rates=rates,
        sizes=sizes,
        equal=equal,
        search=search,
        prefer=prefer,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        time_limit=parse_seconds(time_limit) if isinstance(time_limit, str) else time_limit,
        seed=seed,
        limit=limit,
        report_to=report_to,
        workers=workers,
        threads=threads,
        ray=ray,
        pretrained=pretrained,
        quantize=quantize,
        optimizer=optimizer,
        ranks=ranks,
        bf16=bf16,
        group_by_length=group_by_length,
    )
    shown = console or RichConsole(quiet=True)
    record, contest = run_comparison(settings, Path(out), resume=resume, console=shown, model=own_model, task=own_task)
    return Comparison(copy.copy(record), Path(out), contest)


def _label(model: nn.Module | Callable[[], nn.Module]) -> str:
    """A name for titles: that of the class, or of the function."""
    return getattr(model, "__name__", type(model).__name__)


def _text(path: Any) -> str | None:
    return None if path is None else os.fspath(path)


def _texts(data: Any) -> list[str] | None:
    """The files as texts; None for the task's usual ones."""
    if data is None:
        return None
    return [os.fspath(data)] if isinstance(data, (str, os.PathLike)) else [os.fspath(each) for each in data]
