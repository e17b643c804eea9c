"""The live view of a comparison: a table of scores, the rung or round, a progress bar, and the time left of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lowdim.comparison.runs import Run
from lowdim.methods import strategy_for
from lowdim.records import ComparedRun
from lowdim.train.metrics import Metric

__all__ = ["LiveTable"]

_STYLES = {"waiting": "dim", "left": "dim", "done": "green", "failed": "red"}


class LiveTable:
    """A live table on a terminal; otherwise (logs, CI) one line per finished run.

    Args:
        labels: of the methods, by name.
        rungs: of the search.
        search: what the search ranks by, if it is not the metric.
    """

    def __init__(
        self,
        console: Console,
        metric: Metric,
        labels: Mapping[str, str],
        rungs: Sequence[int],
        search: Metric | None = None,
    ):
        self.ranked = search or metric
        self.console, self.metric, self.labels, self.rungs = console, metric, dict(labels), tuple(rungs)
        self.validation: dict[str, list[float]] = {name: [] for name in self.labels}
        self.test: dict[str, list[float]] = {name: [] for name in self.labels}
        self.state: dict[str, str] = dict.fromkeys(self.labels, "waiting")
        self.stage, self.total, self.done = "", 0, 0
        self.begun = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=32), TextColumn("{task.fields[left]}"), console=console
        )
        self.task = self.bar.add_task("", total=1, left="")
        self.live = Live(self._view(), console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def rung(self, index: int, steps: int, count: int) -> None:
        """A rung of the search begins, with so many candidates."""
        self._begin(f"rung {index + 1} of {len(self.rungs)} ({steps} steps)", count)

    def round(self, index: int, most: int, count: int) -> None:
        """A round of the final begins, with so many methods."""
        self._begin(f"final, seed {index + 1} of {'at most ' if most > 1 else ''}{most}", count)

    def _begin(self, stage: str, count: int) -> None:
        self.stage, self.total, self.done, self.begun = stage, count, 0, time.monotonic()
        self.bar.update(self.task, total=max(1, count), completed=0)
        self._refresh()

    def start(self, run: Run) -> None:
        """A run begins."""
        self.state[run.variant.name] = _described(run)
        self._refresh()

    def tick(self) -> None:
        """One optimizer step was made."""
        self._refresh()

    def finish(self, run: Run, record: ComparedRun, *, cached: bool = False) -> None:
        """A run has ended (or was already finished)."""
        name = run.variant.name
        self.done += 1
        self.total = max(self.total, self.done)  # rates that the search adds
        if record.failure:
            self.state[name] = f"failed: {record.failure}"
        else:
            self.state[name] = "done" if run.phase == "seed" else "waiting"
            kept = self.test if run.phase == "seed" else self.validation
            kept[name].append(math.nan if record.score is None else record.score)
        self.bar.update(self.task, total=max(1, self.total), completed=self.done)
        self._refresh()
        if self.live is None:
            part, metric = ("test", self.metric) if run.phase == "seed" else ("validation", self.ranked)
            score = math.nan if record.score is None else record.score
            shown = record.failure or f"{part} {metric.title} {_digits(score, 4)}"
            again = " (finished before)" if cached else ""
            self.console.print(
                f"{self.stage} [{self.done}/{self.total}] {run.variant.label}: {_described(run)}: {shown}{again}{self._left()}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def _left(self) -> str:
        """The estimated time to the end of the rung or round."""
        if not self.done or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.begun) / self.done * (self.total - self.done)
        return f", about {_clock(seconds)} left of it" if seconds >= 1 else ""

    def _refresh(self) -> None:
        run = f", run {min(self.done + 1, self.total)} of {self.total}" if self.total else ""
        self.bar.update(self.task, description=f"{self.stage}{run}", left=self._left().lstrip(", "))
        if self.live:
            self.live.update(self._view())

    def _view(self) -> Group:
        table = Table(title=None, box=None, pad_edge=False, header_style="bold")
        table.add_column("method")
        table.add_column(f"validation {self.ranked.title}", justify="right")
        table.add_column(f"test {self.metric.title}", justify="right")
        table.add_column("now")
        for name, label in self.labels.items():
            state = self.state[name]
            style = _STYLES.get(state.partition(":")[0], "bold")
            table.add_row(
                label, _scores(self.validation[name], self.ranked), _mean(self.test[name]), f"[{style}]{escape(state)}[/]"
            )
        return Group(table, self.bar)


def _described(run: Run) -> str:
    """What tells the run from others of its method."""
    word = "rank" if strategy_for(run.variant).at_rank(8) is not None else "blocks"
    size = "" if run.size is None else f", {word} {run.size}"
    what = f"seed {run.index + 1}, " if run.phase == "seed" else ""
    origin = f" ({run.origin})" if run.origin else ""
    return f"{what}lr {run.lr:g}{origin}{size}"


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
