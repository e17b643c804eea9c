"""A model made ready to be trained one way, and the two things that every training loop asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lowdim.companion import Companion

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowdim.adapters import Adapted
    from lowdim.calibrate import LossFn
    from lowdim.catalogue import Variant

__all__ = ["Applied", "Losses"]


class Losses(NamedTuple):
    """The loss of a batch: `total = task + penalty`. The total is differentiated, the task's is reported."""

    total: Tensor
    task: Tensor
    penalty: Tensor | float


@dataclass
class Applied:
    """A model made ready to be trained one way.

    ```text
    optimizer = applied.start(lr)
    for batch in batches:
        applied.loss(batch, loss_fn).total.backward()
        optimizer.step(); applied.after_step(optimizer); optimizer.zero_grad()
    applied.finish()
    ```

    Attributes:
        model: changed in place.
        variant: the method, with the options that it was given.
        make_optimizer: `lr -> torch.optim.Optimizer` over the trained parameters, weight decay 0 unless the options say so.
        adapted: for adapters.
        options: the hyperparameters with everything filled in.
        make_companion: `optimizer -> Companion`, or None where the method needs none beside `adapted`.
        notes: what was left as it was, in words.
        spent: how many of the steps the method has used already, in a search before the training.
        companion: what `start` made with `make_companion`. Its state goes into checkpoints; that of `adapted` stands in the
            model's own buffers.
    """

    model: nn.Module
    variant: Variant
    make_optimizer: Callable[[float], torch.optim.Optimizer]
    adapted: Adapted | None = None
    options: dict[str, Any] = field(default_factory=dict)
    make_companion: Callable[[torch.optim.Optimizer], Companion] | None = None
    notes: tuple[str, ...] = ()
    spent: int = 0
    companion: Companion | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        """Which way of training this is: the variant's `kind`."""
        return self.variant.kind

    @property
    def companions(self) -> tuple[Companion, ...]:
        """Everything that acts beside the steps, in the order in which it is called."""
        return tuple(each for each in (self.adapted, self.companion) if each is not None)

    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or getattr(p, "trainable", False))

    def start(self, lr: float) -> torch.optim.Optimizer:
        """Make the optimizer, and with it the companion where the method has one."""
        optimizer = self.make_optimizer(lr)
        self.companion = None if self.make_companion is None else self.make_companion(optimizer)
        return optimizer

    def loss(self, batch: Any, loss_fn: LossFn, model: nn.Module | None = None) -> Losses:
        """The task's loss of a batch, and what the method adds to it.

        Args:
            loss_fn: `loss_fn(model, batch) -> scalar`; it must call the model, whose output (or its `logits`) companions see.
            model: a wrapper of `self.model` (DDP), where there is one.
        """
        called = self.model if model is None else model
        if not self.companions:
            task = loss_fn(called, batch)
            return Losses(task, task, 0.0)
        seen: list[Any] = []
        handle = called.register_forward_hook(lambda module, args, out: seen.append(getattr(out, "logits", out)))

        def again() -> Any:
            loss_fn(called, batch)
            return seen.pop()

        try:
            task = loss_fn(called, batch)
            logits = seen.pop() if seen else None
            penalties = [each.loss(again, logits) for each in self.companions]
        finally:
            handle.remove()
        penalty = sum(penalties[1:], start=penalties[0])
        return Losses(task + penalty, task, penalty)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Once after each step of the optimizer: schedules, allocation of ranks, pruning."""
        for each in self.companions:
            each.step(optimizer)

    def ranks(self) -> dict[str, int]:
        """Layer -> rank now, where the method chooses them while it trains."""
        return {name: rank for each in self.companions for name, rank in each.found_ranks().items()}

    def finish(self) -> None:
        """Once, after the last step and before the model is evaluated, merged or saved."""
        for each in self.companions:
            each.finish()
