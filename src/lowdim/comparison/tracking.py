"""A comparison's runs in an experiment tracker: a tracker's run for each, in one group, and one for the verdict.

A run is reported when it has finished, from its record, through the callback that transformers has for the tracker. So what a
tracker shows is what the comparison's files hold, and a run is never slowed or stopped by a tracker.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowdim.errors import warn_caller
from lowdim.records import ComparedRun, ComparisonRecord
from lowdim.train.loop import check_tracker

__all__ = ["Tracking"]

_GROUPS = {"wandb": "WANDB_RUN_GROUP"}
#: Trackers that keep a run open after training, and the function that ends it.
_ENDS = {"wandb": "finish"}
_BOARD = "TENSORBOARD_LOGGING_DIR"


class Tracking:
    """The trackers of a comparison.

    Args:
        report_to: a tracker known to transformers, `"all"` that are installed, or `"none"`.
        folder: of the comparison; its name is that of the group. TensorBoard's files lie in `tensorboard/` below it.

    Raises:
        UnknownNameError, MissingPackageError: there is no such tracker, or it is not installed.
    """

    def __init__(self, report_to: str, folder: Path):
        check_tracker(report_to)
        self.folder = folder
        self.names = _installed() if report_to == "all" else () if report_to == "none" else (report_to,)

    def run(self, name: str, record: ComparedRun) -> None:
        """Report a run: its method, size, rate and seed, its losses, and its scores."""
        what = {"method": record.method, "size": record.size, "rate": record.lr, "seed": record.seed, "rung": record.rung}
        losses = zip(record.loss_steps or (), record.losses or ())
        scores = {f"eval_{record.metric}": record.validation, f"test_{record.metric}": record.test, "failure": record.failure}
        last = max(record.loss_steps or (0,))
        entries = [(0, what), *((step, {"loss": loss}) for step, loss in losses), (last, scores)]
        self._report(name, entries, learning_rate=record.lr, seed=record.seed, max_steps=record.steps)

    def verdict(self, record: ComparisonRecord) -> None:
        """Report what the comparison shows: the verdict, the method that is handed over, the mean score of each row."""
        found, winner = record.judgement, record.winner
        told = found.headline if found is not None else winner.why if winner is not None else ""
        means = {f"test_{row.name}": row.mean for row in record.methods}
        self._report("verdict", [(0, {"verdict": told, "handed over": winner and winner.method, **means})])

    def _report(self, name: str, entries: Iterable[tuple[int, Mapping[str, Any]]], **arguments: Any) -> None:
        entries = [(step, {key: value for key, value in logs.items() if value is not None}) for step, logs in entries]
        for tracker in self.names:
            try:
                self._report_to(tracker, name, entries, arguments)
            except Exception as error:  # noqa: BLE001  (a tracker's own, such as a lost connection: the comparison goes on)
                self.names = tuple(each for each in self.names if each != tracker)
                warn_caller(f"{tracker} failed, and gets no more of this comparison: {error}")

    def _report_to(self, tracker: str, name: str, entries: list[tuple[int, dict[str, Any]]], arguments: dict[str, Any]) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.integrations import integration_utils

        place = self.folder / "tensorboard" / name
        args = TrainingArguments(output_dir=str(place), run_name=f"{self.folder.name}/{name}", use_cpu=True, **arguments)
        state, control = TrainerState(), TrainerControl()
        with _environment({_BOARD: str(place), **({_GROUPS[tracker]: self.folder.name} if tracker in _GROUPS else {})}):
            callback = integration_utils.INTEGRATION_TO_CALLBACK[tracker]()
            callback.on_train_begin(args, state, control, model=None)
            for step, logs in entries:
                state.global_step = step
                callback.on_log(args, state, control, model=None, logs=dict(logs))
            callback.on_train_end(args, state, control, model=None, processing_class=None)
            if tracker in _ENDS:
                getattr(importlib.import_module(tracker), _ENDS[tracker])()


def _installed() -> tuple[str, ...]:
    from transformers.integrations import integration_utils

    return tuple(sorted(integration_utils.get_available_reporting_integrations()))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside the block; one that the user has set stays as it is."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
