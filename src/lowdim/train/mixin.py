"""What a transformers Trainer needs to train an adapted model as lowdim's own loop does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lowdim.companion import Companion
from lowdim.errors import CheckpointError
from lowdim.methods.applied import Losses, add_penalties
from lowdim.train.settings import PENALTY

if TYPE_CHECKING:
    from lowdim.adapters import Adapted

__all__ = ["AdaptedTrainerMixin", "PenaltyLog"]

_FILE = "companions.pt"  # in a checkpoint


class _Noted(NamedTuple):
    """What one pass adds to the logged loss, and to the logged penalty."""

    task: torch.Tensor
    penalty: torch.Tensor


class PenaltyLog:
    """For a Trainer whose loss holds a penalty: `loss` in its log is the task's, and `penalty` stands next to it.

    The Trainer's `compute_loss` calls `note` once for each pass.
    """

    state: Any
    _noted: _Noted | None = None
    _penalty: float | None = None  # summed since the last entry of the log
    _logged_step: int = 0

    def note(self, losses: Losses, weight: float, penalty_weight: float) -> None:
        """The pass adds `weight · task + penalty_weight · penalty` to the step's loss."""
        if isinstance(losses.penalty, torch.Tensor) and losses.penalty.requires_grad:
            self._noted = _Noted(losses.task.detach().mean() * weight, losses.penalty.detach().mean() * penalty_weight)

    def check_total(self, total: torch.Tensor) -> None:
        """Called with the loss of a pass, penalty included, after its backward pass."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass; returns the task's loss, which is logged."""
        total = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.check_total(total)
        noted, self._noted = self._noted, None
        if noted is None:
            return total
        self._penalty = (self._penalty or 0.0) + float(noted.penalty)
        return noted.task

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log also the method's penalty."""
        if "loss" in logs:
            if self._penalty is not None:
                logs[PENALTY] = self._penalty / max(1, self.state.global_step - self._logged_step)
            self._penalty, self._logged_step = None, self.state.global_step
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class AdaptedTrainerMixin(PenaltyLog):
    """Makes any `transformers.Trainer` train an adapted model in full, as lowdim's own loop does.

    It trains `adapted.param_groups(…)` (with the rates and the decay that the method asks for) with the optimizer that the
    arguments name; adds the method's regularizer to the loss, once in each step whatever the accumulation; calls
    `adapted.step()` after each optimizer step, and the companions' `step` and, at the end, `finish`; keeps the state of
    companions in checkpoints; lets schedulers follow groups that a method adds. `loss` in the log is the task's, `penalty`
    the method's.

    Args:
        adapted: of `lowdim.adapt`, over the Trainer's model.
        companions: further ones, such as `lowdim.compress.SparseTraining(model)`.
        others: as the Trainer's.

    Raises:
        TypeError: no `adapted`.
        ValueError: an AdaptedCallback for the same adapter, which would add the regularizer twice; an optimizer in the
            arguments that chooses parameters by itself.

    Example:
        >>> from transformers import Trainer
        >>> from lowdim.train import AdaptedTrainerMixin
        >>> class AdaptedTrainer(AdaptedTrainerMixin, Trainer):  # or any subclass of Trainer
        ...     pass
        >>> # AdaptedTrainer(model, arguments, train_dataset=rows, adapted=adapted).train()
    """

    model: Any
    args: Any
    optimizer: Any

    def __init__(self, *args: Any, adapted: Adapted, companions: Iterable[Companion] = (), **others: Any):
        from lowdim.train.callbacks import AdaptedCallback

        self.adapted, self.companions = adapted, tuple(companions)
        super().__init__(*args, **others)
        trainer: Any = self
        if any(isinstance(c, AdaptedCallback) and c.adapted is adapted for c in trainer.callback_handler.callbacks):
            raise ValueError(
                "callbacks: AdaptedCallback would make the steps of AdaptedTrainerMixin a second time; leave it out"
            )
        trainer.add_callback(_steps()(adapted, self.companions))

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments name, over the groups of the method."""
        if self.optimizer is not None:
            return self.optimizer
        trainer: Any = self
        make, options = trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        if unfit := sorted({"params", "model", "optimizer_dict"} & options.keys()):
            raise ValueError(
                f"optim={self.args.optim!r} chooses parameters by itself ({', '.join(unfit)}); an adapted model is trained by "
                "the groups of its method: use optim='adamw_torch', or pass optimizers=(your own, None)"
            )
        groups = self.adapted.param_groups(self.args.learning_rate, self.args.weight_decay or None)
        if issubclass(make, torch.optim.AdamW) and _has_half(groups):
            from lowdim.optim import AdamW

            options = {key: value for key, value in options.items() if key in ("lr", "betas", "eps")}
            make = AdamW
        self.optimizer = make(groups, **{**options, "weight_decay": self.args.weight_decay})
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss, in training with the method's penalty."""
        usual: Any = super().compute_loss  # type: ignore[misc]
        if not model.training:
            return usual(model, inputs, return_outputs, **kwargs)
        outputs: list[Any] = []

        def task(called: nn.Module, batch: Any) -> torch.Tensor:
            found = usual(called, dict(batch), return_outputs, **kwargs)  # some trainers make outputs in a second pass
            if not return_outputs:
                return found
            outputs.append(found[1])
            return found[0]

        losses = add_penalties((self.adapted, *self.companions), model, inputs, task)
        trainer: Any = self
        passes = trainer.current_gradient_accumulation_steps
        divided = not self._is_scaled(kwargs.get("num_items_in_batch"))  # then the Trainer divides the sum by the passes
        self.note(losses, 1 / passes if divided else 1.0, 1 / passes)
        total = losses.task + (losses.penalty if divided else losses.penalty / passes)
        return (total, outputs[0]) if return_outputs else total

    def _is_scaled(self, items: Any) -> bool:
        """Whether the task's loss is already that of the whole accumulated batch, as `Trainer.training_step` decides it."""
        trainer: Any = self
        if trainer.loss_is_scaled_for_ga is not None:
            return trainer.loss_is_scaled_for_ga
        return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.companions and self.args.should_save:
            torch.save([each.state_dict() for each in self.companions], Path(output_dir) / _FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or not self.companions:
            return
        file = Path(checkpoint) / _FILE
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: this checkpoint was not written with these companions")
        for each, state in zip(self.companions, torch.load(file, weights_only=True), strict=True):
            each.load_state_dict(state)


def _has_half(groups: list[dict[str, Any]]) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for group in groups for p in group["params"])


def _steps() -> Any:
    """The callback that makes the method's steps; a function, as its base class is imported late."""
    from lowdim.train.callbacks import AdaptedCallback

    class Steps(AdaptedCallback):
        def __init__(self, adapted: Adapted, companions: tuple[Companion, ...]):
            super().__init__(adapted, regularize=False)
            self.companions = companions

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_optimizer_step(args, state, control, **kwargs)
            for each in self.companions:
                each.step(kwargs.get("optimizer"))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_end(args, state, control, **kwargs)
            self.adapted.finish()
            for each in self.companions:
                each.finish()

    return Steps
