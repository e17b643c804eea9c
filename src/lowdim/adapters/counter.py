"""How often `Adapted.step` was called, kept where trainers save it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StepCounter"]


class StepCounter(nn.Module):
    """A method's `shared` module that counts steps: `done` is read without a device synchronisation, `steps` is saved."""

    steps: Tensor

    def __init__(self, device: Any = None):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.done = 0

    def forward(self, x: Any) -> Any:
        """`x` itself: a model that is an nn.Sequential calls every module that it holds."""
        return x

    def count(self) -> None:
        """One step more."""
        self.done += 1
        self.steps.fill_(self.done)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "steps" in state_dict:
            self.done = int(state_dict[prefix + "steps"])
