"""The live view of a comparison: a table of scores, a progress bar, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lowdim.catalogue import Variant
from lowdim.compare.runs import Run
from lowdim.records import ComparedRun
from lowdim.train.metrics import Metric

__all__ = ["LiveTable"]


class LiveTable:
    """A live table on a terminal; otherwise (logs, CI) one line per finished run.

    `planned` has the method of each run that is to come. The time left is estimated for each method from its finished runs.
    """

    def __init__(self, console: Console, metric: Metric, planned: list[Variant], steps: int):
        self.console, self.metric, self.steps = console, metric, steps
        self.todo: dict[str, int] = {}
        self.labels: dict[str, str] = {}
        for variant in planned:
            self.todo[variant.name] = self.todo.get(variant.name, 0) + 1
            self.labels[variant.name] = variant.label
        self.spent: dict[str, list[float]] = {name: [] for name in self.todo}
        self.validation: dict[str, list[float]] = {name: [] for name in self.todo}
        self.test: dict[str, list[float]] = {name: [] for name in self.todo}
        self.state: dict[str, str] = dict.fromkeys(self.todo, "waiting")
        self.total, self.done, self.begun = len(planned), 0, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=32), TextColumn("{task.fields[left]}"), console=console
        )
        self.task = self.bar.add_task("", total=len(planned) * steps, left="")
        self.live = Live(self._view(), console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def start(self, run: Run) -> None:
        """A run begins."""
        what = "rate" if run.phase == "trial" else "seed"
        self.state[run.variant.name] = f"{what} {run.index + 1}, lr {run.lr:g}"
        self.begun = time.monotonic()
        self._refresh()

    def tick(self) -> None:
        """Count one optimizer step."""
        self.bar.advance(self.task)
        self._refresh()

    def finish(self, run: Run, record: ComparedRun, *, cached: bool = False) -> None:
        """A run has ended (or was already finished)."""
        name = run.variant.name
        self.done += 1
        self.todo[name] -= 1
        if not cached:
            self.spent[name].append(time.monotonic() - self.begun)
        if record.failure:
            self.state[name] = f"failed: {record.failure}"
        else:
            self.state[name] = "done" if not self.todo[name] else "waiting"
            kept = self.test if run.phase == "seed" else self.validation
            kept[name].append(_known(record))
        self.bar.update(self.task, completed=self.done * self.steps)
        self._refresh()
        if self.live is None:
            shown = record.failure or f"{self.metric.title} {_digits(_known(record), 4)}"
            kind = "test" if run.phase == "seed" else "validation"
            again = " (finished before)" if cached else ""
            self.console.print(
                f"[{self.done}/{self.total}] {run.variant.label}: {run.phase} {run.index + 1}, lr {run.lr:g}: "
                f"{kind} {shown}{again}{self._left()}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def leave_out(self, variants: list[Variant]) -> None:
        """These planned runs will not be made."""
        for variant in variants:
            self.todo[variant.name] -= 1
            self.total -= 1
        self.bar.update(self.task, total=self.total * self.steps)

    def seconds_of(self, variants: Sequence[Variant]) -> float:
        """The estimated time of one run of each of these methods; 0 before the first has ended."""
        known = [t for times in self.spent.values() for t in times]
        overall = sum(known) / len(known) if known else 0.0
        return sum(sum(t) / len(t) if (t := self.spent[v.name]) else overall for v in variants)

    def seconds_left(self) -> float | None:
        """The estimated time of the remaining runs; None before the first has ended."""
        known = [t for times in self.spent.values() for t in times]
        if not known:
            return None
        overall = sum(known) / len(known)
        return sum(count * (sum(t) / len(t) if (t := self.spent[name]) else overall) for name, count in self.todo.items())

    def _left(self) -> str:
        left = self.seconds_left()
        return "" if left is None or not any(self.todo.values()) else f", about {_clock(left)} left"

    def _refresh(self) -> None:
        self.bar.update(
            self.task, description=f"run {min(self.done + 1, self.total)} of {self.total}", left=self._left().lstrip(", ")
        )
        if self.live:
            self.live.update(self._view())

    def _view(self) -> Group:
        table = Table(title=None, box=None, pad_edge=False, header_style="bold")
        table.add_column("method")
        table.add_column(f"validation {self.metric.title}", justify="right")
        table.add_column(f"test {self.metric.title}", justify="right")
        table.add_column("now")
        for name, label in self.labels.items():
            state = self.state[name]
            style = (
                "dim" if state == "waiting" else "green" if state == "done" else "red" if state.startswith("failed") else "bold"
            )
            table.add_row(
                label, _scores(self.validation[name], self.metric), _mean(self.test[name]), f"[{style}]{escape(state)}[/]"
            )
        return Group(table, self.bar)


def _known(record: ComparedRun) -> float:
    """The score of a run that did not fail."""
    return math.nan if record.score is None else record.score


def _scores(values: list[float], metric: Metric) -> str:
    if not values:
        return "-"
    best = max(values) if metric.higher_is_better else min(values)
    return f"{_digits(best, 3)} (best of {len(values)})"


def _mean(values: list[float]) -> str:
    return "-" if not values else f"{_digits(sum(values) / len(values), 3)} ({len(values)})"


def _digits(value: float, digits: int) -> str:
    """A score; one beyond a million in powers of ten."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 or math.isnan(value) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    """A rough time as people say it."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return f"{round(whole / 60)} min" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"
