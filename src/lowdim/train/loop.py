"""One training run: `transformers.Trainer` over a model that a strategy has prepared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowdim.errors import check_choice
from lowdim.methods import WARMUP, Applied
from lowdim.models import quiet
from lowdim.results import Result
from lowdim.train.garbage import isolated_gc

if TYPE_CHECKING:
    from lowdim.train.tasks import Task

__all__ = ["FitResult", "FitSettings", "fit"]

PENALTY = "penalty"  # the log key of a method's penalty, next to the task loss
SUBSPACE = "subspace_"  # prefix of a projected optimizer's log keys


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Settings of the training loop that do not depend on the method."""

    steps: int
    batch_size: int = 16
    lr: float = 1e-3
    warmup: float = WARMUP  # share of the steps
    schedule: str = "linear"  # any name that transformers.get_scheduler knows
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    clips_itself: bool = False  # the optimizer clips itself: it frees gradients before the trainer could clip them
    bf16: bool = False  # autocast; the weights keep their dtype
    seed: int = 0
    save_steps: int = 0  # 0: no checkpoints
    log_steps: int = 1
    eval_steps: int = 0  # 0: score the validation part at the end only
    watch: bool = False  # log norms of full and projected gradients
    report_to: str = "none"


@dataclass
class FitResult(Result):
    """The result of one run: the loss of each logged step, its time and memory, and why it ended.

    `losses` are those of the task, and `penalties` the terms that the method added to them (empty if it adds none).
    `evaluations` are `(step, loss in nats per token)` of the validation part, `subspaces` the log of a projected optimizer,
    `spikes` the steps whose loss jumped.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds_per_step: float = math.nan
    peak_bytes: int | None = None
    failure: str | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    subspaces: list[dict[str, float]] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each logged step: its loss."""
        return [{"step": step, "loss": loss} for step, loss in zip(self.steps, self.losses)]

    @property
    def summary(self) -> str:
        """One line."""
        if self.failure:
            return self.failure
        return f"{self.steps[-1]} steps, last loss {self.losses[-1]:.4g}" if self.steps else "no step was logged"

    def read(self, history: list[dict[str, Any]]) -> None:
        """Read the numbers from a trainer's history, which includes the earlier part of a resumed run."""
        logged = [entry for entry in history if "loss" in entry]
        scored = [entry for entry in history if "eval_loss" in entry]
        self.steps = [int(entry["step"]) for entry in logged]
        self.losses = [float(entry["loss"]) for entry in logged]
        self.penalties = [float(entry[PENALTY]) for entry in logged if PENALTY in entry]
        self.evaluations = [(int(entry["step"]), float(entry["eval_loss"])) for entry in scored]
        self.subspaces = [{"step": entry["step"], **_subspace(entry)} for entry in logged if _subspace(entry)]
        self.grad_norms = [float(entry["grad_norm"]) for entry in logged if "grad_norm" in entry]


def fit(
    applied: Applied,
    task: Task,
    settings: FitSettings,
    folder: Path,
    *,
    resume: bool = False,
    measure_memory: bool = False,
    callbacks: tuple[Any, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Train `applied.model` on the task's training part.

    Args:
        folder: where the trainer keeps its checkpoints, if any.
        resume: continue from the newest checkpoint in `folder`.
        measure_memory: record the peak of one step (the third), which makes that step slower.
        say: called with a line for each spike and each evaluation.

    Returns:
        A `FitResult`; a loss that is not finite ends the run and is reported as `failure`, not raised.

    Raises:
        UnknownNameError: `report_to` is not a tracker known to transformers.
        ImportError: that tracker is not installed.
        OSError: a checkpoint cannot be written; earlier ones are complete.
    """
    check_tracker(settings.report_to)
    with isolated_gc():
        return _fit(applied, task, settings, folder, resume, measure_memory, callbacks, say)


def _fit(
    applied: Applied,
    task: Task,
    settings: FitSettings,
    folder: Path,
    resume: bool,
    measure_memory: bool,
    callbacks: tuple[Any, ...],
    say: Callable[[str], None],
) -> FitResult:
    from lowdim.train import trainer as trainers

    result = FitResult()
    recorder = trainers.Recorder(applied.model, measure_memory)
    trainer = trainers.MethodTrainer(
        applied,
        settings.lr,
        watch=settings.watch,
        args=trainers.arguments(settings, max(1, settings.steps - applied.spent), folder),
        train_dataset=task.train,
        data_collator=task.collate,
        callbacks=[recorder],
    )
    for callback in (trainers.RunMonitor(trainer, task, settings, result, say), *callbacks):
        trainer.add_callback(callback)
    try:
        with quiet():  # otherwise there is a progress bar for each checkpoint
            trainer.train(resume_from_checkpoint=trainers.newest_checkpoint(folder) if resume else None)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        # The second: decomposing a gradient that is not finite.
        result.failure = str(error)
    finally:
        recorder.close()
    applied.finish()
    result.read(trainer.state.log_history)
    result.peak_bytes = recorder.peak_bytes
    if recorder.times:
        result.seconds_per_step = statistics.median(recorder.times)
    applied.model.zero_grad(set_to_none=True)
    return result


def check_tracker(name: str) -> None:
    """Check that transformers can report to this tracker.

    Raises:
        UnknownNameError: it has no tracker of this name.
        ImportError: the tracker is not installed.
    """
    if name in ("none", "all"):
        return
    from transformers.integrations import integration_utils

    check_choice("report_to", name, ["none", "all", *integration_utils.INTEGRATION_TO_CALLBACK])
    if name not in integration_utils.get_available_reporting_integrations():
        raise ImportError(f"report_to: {name!r} is not installed")


def _subspace(entry: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix(SUBSPACE): float(value) for key, value in entry.items() if key.startswith(SUBSPACE)}
