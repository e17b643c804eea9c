"""What adapted models need from a training loop: one call after each optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowdim.adapters import Adapted

__all__ = ["AdaptedCallback"]


def _base() -> type:
    try:
        from transformers import TrainerCallback
    except ImportError:
        return object
    return TrainerCallback


class AdaptedCallback(_base()):
    """A `transformers.TrainerCallback` that calls `adapted.step()` after each optimizer step.

    Example:
        >>> import torch, lowdim
        >>> from lowdim.train import AdaptedCallback
        >>> adapted = lowdim.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), lowdim.adapters.LoRA(rank=1))
        >>> callback = AdaptedCallback(adapted)  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, adapted: Adapted):
        self.adapted = adapted
        self._first = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the first backward pass: every adapted layer must have got a gradient."""
        if self._first:
            self._first = False
            self.adapted.check_gradients()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume the optimizer may have more groups than the scheduler was made for."""
        if kwargs.get("lr_scheduler") is not None:
            warmup = args.get_warmup_steps(state.max_steps)
            self.adapted.follow(kwargs["lr_scheduler"], warmup=warmup, total=state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance schedules, rank allocation and proximal steps."""
        self.adapted.step(kwargs.get("optimizer"))
        self.on_train_begin(args, state, control, **kwargs)
