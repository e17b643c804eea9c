"""What goes on beside the steps of a run: the method's companion, scores on the way, an alarm, a rehearsal of saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.train.metrics import metric_for
from lowdim.train.watching import SpikeAlarm, rehearse_saving

if TYPE_CHECKING:
    from lowdim.train.loop import FitResult, FitSettings
    from lowdim.train.tasks import Task

__all__ = ["attendant"]

_KEPT = 3  # two whole checkpoints, and the next one beside them


_WORDS = {"captured": "captured", "overlap": "overlap with the last subspaces"}


def _seen(optimizer: Any) -> str:
    """What a projected optimizer saw in the last step, in words."""
    numbers = optimizer.log() if hasattr(optimizer, "watcher") else {}
    return "".join(f"; {words} {numbers[name]:.3g}" for name, words in _WORDS.items() if name in numbers)


def attendant(trainer: Any, task: Task, settings: FitSettings, result: FitResult, say: Callable[[str], None]) -> Any:
    """A callback for this trainer; made late, so that importing lowdim.train stays cheap."""
    from transformers import TrainerCallback

    class Attendant(TrainerCallback):
        def __init__(self) -> None:
            self.alarm = SpikeAlarm()
            self.first = True

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._follow(args, state, kwargs["lr_scheduler"])
            optimizer = trainer.plain_optimizer()
            if hasattr(optimizer, "watcher"):
                optimizer.watcher.on = settings.watch
            self.alarm.recall(float(entry["loss"]) for entry in state.log_history if "loss" in entry)
            if settings.save_steps and not state.global_step and not trainer.is_fsdp_enabled and state.is_world_process_zero:
                short = rehearse_saving(trainer.model, optimizer, trainer.applied.companion, Path(args.output_dir), _KEPT)
                if short:
                    say(f"note: {short}")

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.applied.after_step(kwargs["optimizer"])
            self._follow(args, state, kwargs["lr_scheduler"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.first and trainer.applied.adapted is not None:
                trainer.applied.adapted.check_gradients()
            self.first = False

        def _follow(self, args: Any, state: Any, scheduler: Any) -> None:
            """Tell the scheduler of groups that the optimizer got, also by a resume."""
            if trainer.applied.adapted is not None and scheduler is not None:
                warmup = args.get_warmup_steps(state.max_steps)
                trainer.applied.adapted.follow(scheduler, warmup=warmup, total=state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs and self.alarm.spike(float(logs["loss"])):
                result.spikes.append(state.global_step)
                say(f"step {state.global_step}: the loss jumped to {float(logs['loss']):.4f} (usual: {self._usual()})")

        def _usual(self) -> str:
            return f"below {self.alarm.threshold():.4f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            every = settings.eval_steps
            if every and state.global_step % every == 0 and state.global_step < settings.steps:
                loss = task.evaluate(trainer.model, task.validation, metric_for(task.kind, "loss"))
                due = control.should_log
                trainer.log({"eval_loss": loss})
                control.should_log = due  # which logging switches off: the step's own loss would be lost
                score = f"step {state.global_step}: validation perplexity {math.exp(min(loss, 50.0)):.4f}"
                say(score + _seen(trainer.plain_optimizer()))

    return Attendant()
