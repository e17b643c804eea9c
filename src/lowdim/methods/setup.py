"""Training options that are independent of the method; every strategy receives them with the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowdim.calibrate import LossFn

__all__ = ["OPTIMIZERS", "RANKS", "WARMUP", "Setup"]

OPTIMIZERS = ("adamw", "adamw8bit")
"""What trains the parameters of methods without an optimizer of their own."""

RANKS = ("uniform", "farms")
"""How the ranks of an adapter's layers are chosen."""

WARMUP = 0.1
"""Default share of the steps in which the rate rises."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The training that a model is prepared for.

    Attributes:
        lr: the peak rate (some methods start from it).
        steps: optimizer steps in all (some methods have schedules).
        head: modules of the model that are new and always trained, e.g. `("classifier",)`.
        batches, loss_fn: sample data for methods that need it before training.
        warmup: share of the steps in which the rate rises; some methods begin their schedules after it.
        seed: of everything that the method draws, including its companion.
        initialise: False allocates only, for forecasts.
        scratch: training starts from random weights: structured layers draw their own.
        layerwise: update each parameter in the backward pass and free its gradient at once; optimizers only.
        accumulate: forward passes of an optimizer step; optimizers that update layer by layer sum over them.
        master_weights: keep a float32 copy of every trained 16-bit weight in the optimizer; otherwise they are rounded
            stochastically.
        optimizer: `"adamw"`, or `"adamw8bit"` with moments in 8 bits; of methods without an optimizer of their own.
        max_norm: clipping, for optimizers that clip gradients themselves; 0 switches it off.

    Example:
        >>> from lowdim.methods import Setup
        >>> Setup(lr=1e-3, steps=100).initialise
        True
    """

    lr: float
    steps: int
    head: tuple[str, ...] = ()
    batches: Iterable[Any] | None = None
    loss_fn: LossFn | None = None
    warmup: float = WARMUP
    seed: int = 0
    initialise: bool = True
    scratch: bool = False
    layerwise: bool = False
    accumulate: int = 1
    max_norm: float = 0.0
    master_weights: bool = False
    optimizer: str = "adamw"

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps in which the rate rises."""
        return round(self.warmup * self.steps)
