"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lowdim.methods.applied import Applied
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, adamw
from lowdim.modules import quantized_scheme

__all__ = ["FullStrategy"]


class FullStrategy(Strategy):
    """Trains all parameters with AdamW."""

    kind: ClassVar[str] = "full"
    trains_base: ClassVar[bool] = True

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Make every parameter trainable.

        Raises:
            ValueError: the base is kept in few bits.
        """
        self.check_quantize(quantized_scheme(model))
        model.requires_grad_(True)
        return Applied(model, self.variant, lambda lr: adamw(model.parameters(), lr, setup))
