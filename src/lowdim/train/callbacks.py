"""Trainer callbacks: for adapted models (the regularizer, one call after each optimizer step), and for rates by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowdim.adapters.core.files.layout import TENSORS, read_adapter
from lowdim.errors import warn_caller
from lowdim.files import read_json_object, write_json
from lowdim.pretrained.guard import begin_checkpoints, end_checkpoints
from lowdim.surgery import unwrap
from lowdim.train.callback_base import callback_base

if TYPE_CHECKING:
    from lowdim.adapters import Adapted
    from lowdim.diagnose import TempBalance

__all__ = ["AdaptedCallback", "TempBalanceCallback"]


class AdaptedCallback(callback_base()):
    """A `transformers.TrainerCallback` for adapters: adds the regularizer and calls `adapted.step()`.

    If the method has a regularizer (SoRA, IncreLoRA, SaRA with a nuclear norm), its gradient is added once before each
    optimizer step, after the trainer has clipped the gradients of the loss. The trainer logs the task loss. Prefer
    `AdaptedTrainerMixin`, which clips both together, trains the method's own parameter groups and knows companions; this
    callback is for trainers that cannot be subclassed.

    Checkpoints hold the adapter as `adapted.save` writes it, and can be resumed; `from_pretrained` refuses them.

    Args:
        regularize: False if your own `compute_loss` adds `adapted.regularizer()` to the loss.

    Raises:
        ValueError: a regularizer under `fp16`, whose gradients are scaled (in `on_train_begin`).

    Example:
        >>> import torch, lowdim
        >>> from lowdim.train import AdaptedCallback
        >>> adapted = lowdim.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), lowdim.adapters.LoRA(rank=1))
        >>> callback = AdaptedCallback(adapted)  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, adapted: Adapted, *, regularize: bool = True):
        self.adapted, self.regularize = adapted, regularize
        self._first = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume the optimizer may have more groups than the scheduler was made for."""
        if self.regularize and args.fp16 and self._penalty() is not None:
            raise ValueError(
                f"{type(self.adapted.method).__name__} has a regularizer, whose gradient cannot be added to scaled gradients: "
                "train with bf16, or add adapted.regularizer() to the loss in compute_loss and set regularize=False"
            )
        for model in self._models(kwargs.get("model")):
            begin_checkpoints(model, self.adapted.save)
        self._resume(args, state)
        self._follow(args, state, kwargs.get("lr_scheduler"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on, saving the model is the user's."""
        for model in self._models(kwargs.get("model")):
            end_checkpoints(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the regularizer's gradient. After the first backward pass every adapted layer must have a gradient."""
        if self._first:
            self._first = False
            self.adapted.check_gradients()
        penalty = self._penalty() if self.regularize else None
        if penalty is None:
            return
        trained = [p for p in self.adapted.trainable().values() if p.requires_grad]
        for parameter, gradient in zip(trained, torch.autograd.grad(penalty, trained, allow_unused=True)):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance schedules, rank allocation and proximal steps."""
        self.adapted.step(kwargs.get("optimizer"))
        self._follow(args, state, kwargs.get("lr_scheduler"))

    def _models(self, trained: Any) -> list[Any]:
        """The model that the trainer saves, and the adapted one, which may be a part of it."""
        return [self.adapted.model] if trained is None else [self.adapted.model, unwrap(trained)]

    def _resume(self, args: Any, state: Any) -> None:
        """Read the adapter of the checkpoint that the trainer continues from: it holds what is no part of the model."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.global_step and (folder / TENSORS).is_file():
            self.adapted.load_state_dict(read_adapter(folder)[0])

    def _follow(self, args: Any, state: Any, scheduler: Any) -> None:
        if scheduler is not None:
            warmup = args.get_warmup_steps(state.max_steps)
            self.adapted.follow(scheduler, warmup=warmup, total=state.max_steps)

    def _penalty(self) -> torch.Tensor | None:
        """The regularizer, if it depends on trained parameters."""
        with torch.enable_grad():
            value = self.adapted.regularizer()
        return value if isinstance(value, torch.Tensor) and value.requires_grad else None


class TempBalanceCallback(callback_base()):
    """A `transformers.TrainerCallback` that gives each layer its own learning rate by the tail of its spectrum, once an epoch.

    Give the trainer an optimizer with a group for each layer: `Trainer(…, optimizers=(torch.optim.AdamW(balance_groups(model),
    lr=…), None), callbacks=[TempBalanceCallback(model)])`. Checkpoints hold the factors, so that a training that is resumed in
    the same output folder continues with them.

    Args:
        model: the model that is trained.
        **options: as in `lowdim.diagnose.TempBalance`.

    Attributes:
        balance: the TempBalance; None before the training begins.

    Raises:
        ValueError, TypeError: as TempBalance, in `on_train_begin`.

    Example:
        >>> import torch
        >>> from lowdim.train import TempBalanceCallback
        >>> callback = TempBalanceCallback(torch.nn.Linear(8, 8), high=1.4)  # Trainer(..., callbacks=[callback])

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280; Zhou et al., "Temperature Balancing", arXiv 2312.00359.
    """

    def __init__(self, model: torch.nn.Module, **options: Any):
        self.model, self.options = model, options
        self.balance: TempBalance | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hook the trainer's optimizer; after a resume, take the checkpoint's factors."""
        from lowdim.diagnose import TempBalance

        if self.balance is not None:
            self.balance.remove()
        self.balance = TempBalance(self.model, kwargs["optimizer"], **self.options)
        stored = self._stored(args, state)
        if state.global_step and stored.is_file():
            self.balance.load_state_dict(read_json_object(stored))
        elif state.global_step:
            warn_caller(f"{stored} does not exist: the rates of the layers are measured anew at step {state.global_step}")
            self.balance.update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, for `interval`."""
        assert self.balance is not None
        self.balance.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure anew."""
        assert self.balance is not None
        self.balance.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the factors beside the checkpoint's other files."""
        if self.balance is not None and state.is_world_process_zero:
            write_json(self._stored(args, state), self.balance.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off the optimizer."""
        if self.balance is not None:
            self.balance.remove()

    @staticmethod
    def _stored(args: Any, state: Any) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "balance.json"
