"""The trainer callback that measures layers while they train, for trackers and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowdim.errors import warn_caller
from lowdim.train.callback_base import callback_base
from lowdim.train.checkpoints import checkpoint_errors
from lowdim.train.layer_watch import NUMBERS, LayerWatch

__all__ = ["WatchCallback"]

_FILE = "watch.pt"  # in a checkpoint


class WatchCallback(callback_base()):
    """A `transformers.TrainerCallback` that logs what a `LayerWatch` measures.

    `watch/alpha`, `watch/intruders` and `watch/overlap` are means over the layers, which trackers (tensorboard, wandb, …)
    get as the trainer's other logs; the rows by layer are in `watch.history`. The start and the last step are measured, too.
    Checkpoints hold the state, so that a training that is resumed in the same output folder goes on comparing with its start.

    Args:
        trainer: any `transformers.Trainer`.
        watch: of the model that it trains.
        by_layer: log the numbers of each layer as well, as `watch/alpha/NAME` and so on.

    Raises:
        FloatingPointError: a weight is not finite any more. CheckpointError: the state in a checkpoint is damaged or of
            other layers.

    Example:
        >>> from lowdim.train import LayerWatch, WatchCallback
        >>> # trainer.add_callback(WatchCallback(trainer, LayerWatch(model, interval=50)))
    """

    def __init__(self, trainer: Any, watch: LayerWatch, *, by_layer: bool = False):
        self.trainer, self.watch, self.by_layer = trainer, watch, by_layer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the start; after a resume, take the checkpoint's state."""
        if not state.global_step:
            self._log(control, self.watch.history[0])
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if (folder / _FILE).is_file():
            with checkpoint_errors(folder):
                self.watch.load_state_dict(torch.load(folder / _FILE, map_location="cpu", weights_only=True))
        else:
            warn_caller(f"{folder / _FILE} does not exist: the layers are compared with what they were when the watch was made")
            self.watch.count = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step; measure and log if it is due, or the last one."""
        row = self.watch.step()
        if row is None and state.global_step >= state.max_steps:
            row = self.watch.measure()
        if row is not None:
            self._log(control, row)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the state beside the checkpoint's other files."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (folder / _FILE).is_file():
            self.save(folder)

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder."""
        torch.save(self.watch.state_dict(), folder / _FILE)

    def _log(self, control: Any, row: dict[str, Any]) -> None:
        numbers = {f"watch/{key}": row[key] for key in NUMBERS}
        if self.by_layer:
            numbers |= {f"watch/{key}/{name}": layer[key] for name, layer in row["layers"].items() for key in NUMBERS}
        due = control.should_log
        self.trainer.log({name: float(value) for name, value in numbers.items() if value is not None})
        control.should_log = due  # logging would reset it, and the step's own loss would be lost
