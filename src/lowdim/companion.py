"""What acts beside the steps of a training: schedules, pruning, guidance, monitoring.

A training loop that knows a `Companion` calls it in three places and stores its state in checkpoints:

```text
loss = task_loss(model, batch) + companion.loss(forward, logits)
loss.backward(); optimizer.step(); companion.step(optimizer)     # every optimizer step
companion.finish()                                               # once, after the last step
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Companion"]


class Companion:
    """Acts beside the steps of a training. Does nothing by default; a method overrides what it needs.

    Subclasses that hold state between steps override `state_dict` and `load_state_dict` together. A state holds tensors,
    numbers, strings and containers of these only, so that checkpoints load without pickled code.

    Example:
        >>> class Counter(Companion):
        ...     steps = 0
        ...     def step(self, optimizer=None):
        ...         self.steps += 1
        >>> counter = Counter()
        >>> counter.step()
        >>> counter.steps
        1
    """

    def loss(self, forward: Callable[[], Any], logits: Any) -> torch.Tensor | float:
        """What is added to the loss of a batch; 0.0 adds nothing.

        Args:
            forward: runs the model on the same batch again and returns its logits, for methods that compare two passes.
            logits: the logits of the pass that gave the task's loss.
        """
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Runs once after each step of the optimizer."""

    def finish(self) -> None:
        """Runs once, after the last step and before the model is evaluated, merged or saved."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed training gives the same bits."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
