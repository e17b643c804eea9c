"""Linear probing: the model is frozen, only its new head is trained."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lowdim.methods.applied import Applied
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, adamw
from lowdim.surgery import freeze, freeze_statistics

__all__ = ["ProbeStrategy"]


class ProbeStrategy(Strategy):
    """Trains `setup.head` on frozen features."""

    kind: ClassVar[str] = "probe"

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Freeze everything but the head.

        Raises:
            ValueError: the model has no head.
        """
        if not setup.head:
            raise ValueError("linear-probe needs a head: the model has no module that is trained on top of frozen features")
        freeze(model)
        for name in setup.head:
            model.get_submodule(name).requires_grad_(True)
        freeze_statistics(model)
        return Applied(model, self.variant, lambda lr: adamw([p for p in model.parameters() if p.requires_grad], lr, setup))
