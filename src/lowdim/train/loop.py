"""One training run: `transformers.Trainer` over a model that a strategy has prepared."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowdim.errors import MissingPackageError, check_choice
from lowdim.garbage import isolated_gc
from lowdim.methods import Applied
from lowdim.models import quiet
from lowdim.train.settings import FitResult, FitSettings

if TYPE_CHECKING:
    from lowdim.train.layer_watch import LayerWatch
    from lowdim.train.tasks.base import Task

__all__ = ["FitResult", "FitSettings", "fit"]


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
    fingerprint: Mapping[str, str] | None = None,
    layer_watch: LayerWatch | None = None,
) -> FitResult:
    """Train `applied.model` on the task's training part.

    Args:
        folder: where the trainer keeps its checkpoints, if any.
        resume: continue from the newest checkpoint in `folder`.
        measure_memory: record the peak of one step (the third), which makes that step slower.
        say: called with a line for each spike and each evaluation.
        fingerprint: what the run builds on (`lowdim.train.fingerprint`); a checkpoint of another one is refused.
        layer_watch: measures the layers of `applied.model` while it trains; its state is kept in checkpoints.

    Returns:
        A `FitResult`; a loss that is not finite ends the run and is reported as `failure`, not raised.

    Raises:
        UnknownNameError: `report_to` is not a tracker known to transformers.
        MissingPackageError: that tracker is not installed.
        OSError: a checkpoint cannot be written; earlier ones are complete.
        CheckpointError: the newest checkpoint is damaged, or what the run builds on has changed.
    """
    check_tracker(settings.report_to)
    if settings.pause_at is not None and settings.pause_at <= applied.spent < settings.steps:
        return FitResult()  # the method's own search has used the steps of this leg
    with isolated_gc():
        return _fit(
            applied,
            task,
            settings,
            folder,
            resume=resume,
            measure_memory=measure_memory,
            callbacks=callbacks,
            say=say,
            fingerprint=fingerprint,
            layer_watch=layer_watch,
        )


def _fit(
    applied: Applied,
    task: Task,
    settings: FitSettings,
    folder: Path,
    *,
    resume: bool,
    measure_memory: bool,
    callbacks: tuple[Any, ...],
    say: Callable[[str], None],
    fingerprint: Mapping[str, str] | None,
    layer_watch: LayerWatch | None,
) -> FitResult:
    from lowdim.train import trainer as trainers
    from lowdim.train.monitoring import Recorder, RunMonitor
    from lowdim.train.watch_callback import WatchCallback

    result = FitResult()
    recorder = Recorder(applied.model, measure_memory)
    make = _trainer(settings, applied.spent)
    trainer = make(
        applied,
        settings.lr,
        watch=settings.watch,
        count_items=task.count_items,
        lengths=task.lengths() if settings.group_by_length else None,
        loss_fn=task.loss_for(applied.variant),
        fingerprint=fingerprint,
        args=trainers.arguments(settings, max(1, settings.steps - applied.spent), folder),
        train_dataset=task.train,
        data_collator=task.collate,
        callbacks=[recorder],
    )
    watching = () if layer_watch is None else (WatchCallback(trainer, layer_watch),)
    for callback in (RunMonitor(trainer, task, settings, result, say), *watching, *callbacks):
        trainer.add_callback(callback)
    try:
        with quiet():  # otherwise there is a progress bar for each checkpoint
            trainer.train(resume_from_checkpoint=trainer.resume_point(folder) if resume else None)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        # The second: decomposing a gradient that is not finite.
        result.failure = str(error)
    finally:
        recorder.close()
        _end_autocast(applied.model)
    paused = not result.failure and trainer.state.global_step < trainer.args.max_steps
    if not paused:
        applied.finish()
    result.read(trainer.state.log_history)
    result.peak_bytes = recorder.peak_bytes
    if recorder.times:
        result.seconds_per_step = statistics.median(recorder.times)
    applied.model.zero_grad(set_to_none=True)
    return result


def _trainer(settings: FitSettings, spent: int) -> Callable[..., Any]:
    """The trainer's class; for a training in legs, whose step numbers leave out those that the method has spent."""
    from lowdim.train import trainer as trainers

    if settings.pause_at is None:
        return trainers.MethodTrainer
    from lowdim.train.legs import LegTrainer

    return functools.partial(LegTrainer, pause_at=settings.pause_at - spent)


def _end_autocast(model: Any) -> None:
    """Undo what accelerate put around `forward` for bf16: scores and files are those of the model in its own dtype."""
    forward = vars(model).pop("_original_forward", None)
    if forward is None:
        return
    vars(model).pop("forward", None)
    if forward != model.forward:  # it was already replaced on the instance, by hooks
        model.forward = forward


def check_tracker(name: str) -> None:
    """Check that transformers can report to this tracker.

    Raises:
        UnknownNameError: it has no tracker of this name.
        MissingPackageError: the tracker is not installed.
    """
    if name in ("none", "all"):
        return
    from transformers.integrations import integration_utils

    check_choice("report_to", name, ["none", "all", *integration_utils.INTEGRATION_TO_CALLBACK])
    if name not in integration_utils.get_available_reporting_integrations():
        raise MissingPackageError(f"report_to: {name!r} is not installed: pip install {name}, or choose another tracker")
