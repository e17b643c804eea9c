"""Code that acts between training steps: schedules, pruning, guidance, monitoring.

A training loop that knows a `Companion` calls it in three places and stores its state in checkpoints:

```text
loss = task_loss(model, batch) + companion.loss(forward, logits)
loss.backward(); optimizer.step(); companion.step(optimizer)     # every optimizer step
companion.finish()                                               # once, after the last step
```
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Companion", "RateFactor", "warn_of_lost_updates"]


class Companion:
    """Acts between training steps. Does nothing by default; a method overrides what it needs.

    Subclasses that hold state between steps override `state_dict` and `load_state_dict` together. A state may
    hold only tensors, numbers, strings and containers of these, so that checkpoints load without pickled code.

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
        """The term to add to the loss of a batch; 0.0 adds nothing.

        Args:
            forward: runs the model on the same batch again and returns its logits, for methods that compare two passes.
            logits: the logits of the pass that gave the task's loss.
        """
        return 0.0

    def smooth_loss(self, forward: Callable[[], Any], logits: Any) -> torch.Tensor | float:
        """`loss` without terms that have a kink, such as norms: what curvature is measured of. All of `loss` by default."""
        return self.loss(forward, logits)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Runs once after each step of the optimizer."""

    def finish(self) -> None:
        """Runs once, after the last step and before the model is evaluated, merged or saved."""

    def compact(self) -> bool:
        """Runs once, after `finish`, where the trained model is to be written; the training cannot go on afterwards.

        Puts plain small layers in the place of those that the method has found to be smaller; True if it did.
        """
        return False

    def found_ranks(self) -> dict[str, int]:
        """Layer -> rank now, for methods that choose ranks while they train; it goes into the record of a run."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint needs, so that a resumed run gives the same bits."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


class RateFactor:
    """A factor on the learning rate (a warm-up after a restart, a rate of its own for each layer), under any scheduler.

    Multiplies each group's learning rate within `optimizer.step()`, and restores it afterwards.

    A scheduler writes `group["lr"]` from its own memory after each step, so a factor that was written there would be lost or,
    with some schedulers, multiplied in for good. Hooks around the step leave the groups as they found them.

    Args:
        optimizer: any torch optimizer; not one that updates in the backward pass, whose steps happen elsewhere.
        factor: called before each step; a number for all groups, or a list with one number a group. 1 leaves the rates alone.

    Raises:
        ValueError: at a step, a list that has not one number for each of the optimizer's groups.

    Example:
        >>> import torch
        >>> from lowdim.companion import RateFactor
        >>> p = torch.nn.Parameter(torch.zeros(1)); p.grad = torch.ones(1)
        >>> optimizer = torch.optim.SGD([p], lr=1.0)
        >>> factor = RateFactor(optimizer, lambda: 0.25)
        >>> optimizer.step(); p.item(), optimizer.param_groups[0]["lr"]
        (-0.25, 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[], float | list[float]]):
        self.factor = factor
        self._kept: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._kept = [group["lr"] for group in optimizer.param_groups]
        factor, groups = self.factor(), optimizer.param_groups
        factors = factor if isinstance(factor, list) else [factor] * len(groups)
        if len(factors) != len(groups):
            raise ValueError(f"factor must give one number for each of the {len(groups)} parameter groups; got {len(factors)}")
        for group, each in zip(groups, factors):
            if each != 1.0:
                group["lr"] = group["lr"] * each

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._kept):
            group["lr"] = rate


def warn_of_lost_updates(optimizer: Any) -> None:
    """Warn where an optimizer rounds most of its updates of 16-bit weights away.

    An update of about the learning rate is lost where it is below half of a weight's last bit: `lr < ε/2 · RMS(W)`, with
    ε = 2⁻⁷ for bfloat16 and 2⁻¹⁰ for float16. Optimizers of lowdim do not lose it (`keeps_small_updates`).

    Args:
        optimizer: any torch optimizer, or a wrapper with an attribute `.optimizer`.

    Warns:
        UserWarning: it would; the message names the share of the weights, and what to use instead.

    Example:
        >>> import torch, warnings
        >>> from lowdim.companion import warn_of_lost_updates
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], lr=1e-4)
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always")
        ...     warn_of_lost_updates(optimizer)
        >>> len(found)
        1
    """
    import torch

    plain = getattr(optimizer, "optimizer", optimizer)
    if getattr(plain, "keeps_small_updates", False) or getattr(plain, "bf16_stochastic_round", False):
        return
    lost, total = 0, 0
    for group in plain.param_groups:
        lr = float(group.get("initial_lr", group["lr"]))
        for p in group["params"]:
            total += p.numel()
            if p.requires_grad and p.numel() and p.dtype in (torch.bfloat16, torch.float16):
                size = float(p.detach().float().square().mean().sqrt())
                lost += p.numel() * (lr < torch.finfo(p.dtype).eps / 2 * size)
    if lost:
        warnings.warn(
            f"{type(plain).__name__} rounds updates to 16 bits: at this learning rate most updates of {lost / total:.0%} of "
            "the trained numbers are lost. Use lowdim.optim.AdamW (stochastic rounding, or master_weights=True), or train in "
            "float32",
            stacklevel=2,
        )
