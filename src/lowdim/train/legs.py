"""Training in legs: a run pauses at a step, and goes on from a small checkpoint, to the bits of a run in one piece.

The checkpoint leaves out what is frozen: the model is prepared again before the next leg, which gives the same frozen weights.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lowdim.train.checkpoints import checkpoint_errors
from lowdim.train.trainer import MethodTrainer

__all__ = ["LegTrainer", "Pause"]

_TENSORS = "tensors.pt"  # in a checkpoint


class LegTrainer(MethodTrainer):
    """A `MethodTrainer` whose checkpoints hold only what training changes, and of which one is kept.

    Args:
        pause_at: the step after which it stops and writes a checkpoint; that of the last step ends the training as usual.
    """

    kept = 1

    def __init__(self, *args: Any, pause_at: int, **others: Any):
        self.pause_at = pause_at
        super().__init__(*args, **others)
        self._frozen = _frozen(self.applied.model)
        self.add_callback(Pause(pause_at))

    @property
    def last_step(self) -> int:
        """The step at which this leg ends."""
        return min(self.pause_at, self.args.max_steps)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the tensors that are trained, or have changed since the model was prepared."""
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self.applied.model.state_dict()
        changed = {name: value for name, value in state.items() if self._frozen.get(name) != _mark(value)}
        torch.save({name: _own(value) for name, value in changed.items()}, folder / _TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with checkpoint_errors(resume_from_checkpoint):
            state = torch.load(Path(resume_from_checkpoint) / _TENSORS, map_location="cpu", weights_only=True)
            self.applied.model.load_state_dict(state, strict=False)


class Pause(TrainerCallback):
    """Stops a training at a step, with a checkpoint, if more steps follow."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for the checkpoint and the stop."""
        if state.global_step == self.step < state.max_steps:
            control.should_save = control.should_training_stop = True


def _frozen(model: nn.Module) -> dict[str, tuple[int, int] | None]:
    """The marks of the frozen tensors of plain modules; those of lowdim's layers decide themselves what their state is."""
    found = {}
    for prefix, module in model.named_modules():
        if type(module).__module__.startswith("lowdim."):
            continue
        for name, value in chain(module._parameters.items(), module._buffers.items()):
            if value is not None and not value.requires_grad and not getattr(value, "trainable", False):
                found[f"{prefix}.{name}" if prefix else name] = _mark(value)
    return found


def _mark(value: Any) -> tuple[int, int] | None:
    """Changes when the tensor is written to, or replaced."""
    return (value.data_ptr(), value._version) if isinstance(value, Tensor) else None


def _own(value: Any) -> Any:
    """A copy without the rest of its storage, which would be saved, too."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
