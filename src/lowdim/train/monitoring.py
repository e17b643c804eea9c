"""What watches a run of `MethodTrainer`: times, peak memory, evaluations, spikes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from lowdim.optim import ProjectedOptimizer
from lowdim.train.metrics import METRICS
from lowdim.train.rehearsing import rehearse_saving
from lowdim.train.settings import FitResult, FitSettings
from lowdim.train.spikes import SpikeAlarm

if TYPE_CHECKING:
    from lowdim.train.tasks.base import Task
    from lowdim.train.trainer import MethodTrainer

__all__ = ["Recorder", "RunMonitor", "Tick"]

_WORDS = {"captured": "captured", "overlap": "overlap with the last subspaces"}


class Recorder(TrainerCallback):
    """Records step times, and the peak memory once.

    Args:
        measure: measure the peak of one step, which makes that step slower.

    Attributes:
        times: seconds of each step from the third on.
        peak_bytes: of the measured step, or None.
    """

    measured_step = 3  # of this process, so a resumed run is measured too; the first two allocate and warm up

    def __init__(self, model: nn.Module, measure: bool):
        self.model, self.measure = model, measure
        self.begun, self.start = 0, 0.0
        self.times: list[float] = []
        self.peak_bytes: int | None = None
        self._peak: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, or the measurement."""
        self.begun += 1
        if self.measure and self.begun == self.measured_step:
            from lowdim.plan import PeakMemory

            self._peak = PeakMemory(self.model, kwargs.get("optimizer"))
            self._peak.__enter__()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock, or the measurement."""
        seconds = time.perf_counter() - self.start
        if self._peak is not None:
            self._peak.__exit__(None, None, None)
            self.peak_bytes, self._peak = self._peak.bytes, None
        elif self.begun >= self.measured_step:
            self.times.append(seconds)

    def close(self) -> None:
        """End a measurement whose step raised an exception; an open profiler would break the next run."""
        if self._peak is not None:
            self._peak.__exit__(None, None, None)
            self._peak = None


class RunMonitor(TrainerCallback):
    """Monitors a run: the method's own steps, evaluations, the alarm for spikes, the rehearsal of saving.

    Args:
        result: the steps whose loss jumped are added to it.
        say: called with a line for each spike and each evaluation.
    """

    def __init__(
        self, trainer: MethodTrainer, task: Task, settings: FitSettings, result: FitResult, say: Callable[[str], None]
    ):
        self.trainer, self.task, self.settings, self.result, self.say = trainer, task, settings, result, say
        self.alarm = SpikeAlarm()
        self._first = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the earlier losses of a resumed run, and rehearse saving."""
        trainer, settings = self.trainer, self.settings
        self._follow(args, state, kwargs["lr_scheduler"])
        optimizer = trainer.plain_optimizer()
        if isinstance(optimizer, ProjectedOptimizer):
            optimizer.watcher.on = settings.watch
        logged = [entry for entry in state.log_history if "loss" in entry]
        jumped = self.alarm.recall(float(entry["loss"]) for entry in logged)
        self.result.spikes += [int(entry["step"]) for entry, spike in zip(logged, jumped) if spike]
        if settings.save_steps and not state.global_step and not trainer.is_fsdp_enabled and state.is_world_process_zero:
            companion = trainer.applied.companion
            short = rehearse_saving(trainer.applied.model, optimizer, companion, Path(args.output_dir), trainer.kept + 1)
            if short:
                self.say(f"note: {short}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the first backward pass: every adapted layer must have a gradient."""
        if self._first and self.trainer.applied.adapted is not None:
            self.trainer.applied.adapted.check_gradients()
        self._first = False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The method's own steps."""
        self.trainer.applied.after_step(kwargs["optimizer"])
        self._follow(args, state, kwargs["lr_scheduler"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Report loss spikes."""
        if logs and "loss" in logs and self.alarm.spike(float(logs["loss"])):
            self.result.spikes.append(state.global_step)
            usual = f"below {self.alarm.threshold():.4f}"
            self.say(f"step {state.global_step}: the loss jumped to {float(logs['loss']):.4f} (usual: {usual})")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the validation part when it is due."""
        every = self.settings.eval_steps
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            metric = self.task.metrics()[0]
            judged = METRICS.get(metric.judged, metric)
            value = self.task.evaluate(self.trainer.applied.model, self.task.validation, judged)
            due = control.should_log
            self.trainer.log({"eval_loss" if judged.name == "loss" else f"eval_{judged.name}": value})
            control.should_log = due  # logging would reset it, and the step's own loss would be lost
            shown = math.exp(min(value, 50.0)) if metric.name == "perplexity" else value
            score = f"step {state.global_step}: validation {metric.title} {shown:.4f}"
            self.say(score + _seen(self.trainer.plain_optimizer()))

    def _follow(self, args: Any, state: Any, scheduler: Any) -> None:
        """Add new optimizer groups to the scheduler, also after a resume."""
        if self.trainer.applied.adapted is not None and scheduler is not None:
            warmup = args.get_warmup_steps(state.max_steps)
            self.trainer.applied.adapted.follow(scheduler, warmup=warmup, total=state.max_steps)


class Tick(TrainerCallback):
    """Calls a function after each optimizer step."""

    def __init__(self, on_step: Callable[[], None]):
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count one step."""
        self.on_step()


def _seen(optimizer: Any) -> str:
    """A projected optimizer's numbers of the last step, as text."""
    numbers = optimizer.log() if isinstance(optimizer, ProjectedOptimizer) else {}
    return "".join(f"; {words} {numbers[name]:.3g}" for name, words in _WORDS.items() if name in numbers)
