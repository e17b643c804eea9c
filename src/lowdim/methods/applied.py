"""A model prepared for training with one method: the optimizer and the loss for a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lowdim.companion import Companion

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowdim.adapters import Adapted
    from lowdim.calibrate import LossFn
    from lowdim.catalogue import Variant

__all__ = ["Applied", "Losses", "add_penalties"]


class Losses(NamedTuple):
    """The loss of a batch: `total = task + penalty`. The total is differentiated, the task loss is reported."""

    total: Tensor
    task: Tensor
    penalty: Tensor | float


@dataclass
class Applied:
    """A model prepared for training with one method.

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
        options: the hyperparameters with all defaults filled in.
        make_companion: `optimizer -> Companion`, or None if the method needs none besides `adapted`.
        notes: messages about parts that were left unchanged, or got a smaller rank than the others.
        capped_ranks: layer -> its rank, where the method's is above what the layer allows.
        layer_ranks: layer -> its rank, where the method was given ranks by layer.
        spent: number of steps that the method has already used in a search before the training.
        companion: made by `start` with `make_companion`. Its state is saved in checkpoints; that of `adapted` is in the model's
            own buffers.
    """

    model: nn.Module
    variant: Variant
    make_optimizer: Callable[[float], torch.optim.Optimizer]
    adapted: Adapted | None = None
    options: dict[str, Any] = field(default_factory=dict)
    make_companion: Callable[[torch.optim.Optimizer], Companion] | None = None
    notes: tuple[str, ...] = ()
    capped_ranks: dict[str, Any] = field(default_factory=dict)
    layer_ranks: dict[str, int] = field(default_factory=dict)
    spent: int = 0
    companion: Companion | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        """The variant's `kind`."""
        return self.variant.kind

    @property
    def companions(self) -> tuple[Companion, ...]:
        """Everything that acts between the steps, in calling order."""
        return tuple(each for each in (self.adapted, self.companion) if each is not None)

    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or getattr(p, "trainable", False))

    def start(self, lr: float) -> torch.optim.Optimizer:
        """Make the optimizer, and the companion if the method has one."""
        optimizer = self.make_optimizer(lr)
        self.companion = None if self.make_companion is None else self.make_companion(optimizer)
        return optimizer

    def loss(self, batch: Any, loss_fn: LossFn, model: nn.Module | None = None, *, smooth: bool = False) -> Losses:
        """The task loss of a batch, and the term that the method adds.

        Args:
            loss_fn: `loss_fn(model, batch) -> scalar`; it must call the model, whose output (or its `logits`) companions see.
            model: a wrapper of `self.model` (DDP), if there is one.
            smooth: without terms that have a kink (`Companion.smooth_loss`).
        """
        return add_penalties(self.companions, self.model if model is None else model, batch, loss_fn, smooth=smooth)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Call once after each step of the optimizer: schedules, allocation of ranks, pruning."""
        for each in self.companions:
            each.step(optimizer)

    def ranks(self) -> dict[str, int]:
        """Layer -> rank now, where each has its own: as it was given, or as the method chooses while it trains."""
        found = {name: rank for each in self.companions for name, rank in each.found_ranks().items()}
        return self.layer_ranks | found

    def compact(self) -> bool:
        """Call before the trained model is evaluated and written: layers become as small as the method has found they can be.

        Returns:
            Whether any did: the model is then written by `lowdim.pretrained.save_compressed`.
        """
        return sum(each.compact() for each in self.companions) > 0

    def finish(self) -> None:
        """Call once, after the last step and before the model is evaluated, merged or saved."""
        for each in self.companions:
            each.finish()


def add_penalties(
    companions: Iterable[Companion], model: nn.Module, batch: Any, loss_fn: LossFn, *, smooth: bool = False
) -> Losses:
    """The task loss of a batch, and the sum of the terms that companions add.

    Args:
        loss_fn: `loss_fn(model, batch) -> scalar`; it must call the model, whose output (or its `logits`) companions see.
        smooth: without terms that have a kink (`Companion.smooth_loss`).
    """
    companions = tuple(companions)
    if not companions:
        task = loss_fn(model, batch)
        return Losses(task, task, 0.0)
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(getattr(out, "logits", out)))

    def again() -> Any:
        loss_fn(model, batch)
        return seen.pop()

    try:
        task = loss_fn(model, batch)
        logits = seen.pop() if seen else None
        penalties = [(each.smooth_loss if smooth else each.loss)(again, logits) for each in companions]
    finally:
        handle.remove()
    penalty = sum(penalties[1:], start=penalties[0])
    return Losses(task + penalty, task, penalty)
