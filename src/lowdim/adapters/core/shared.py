"""The module that all adapted layers share: stored in the model, so that trainers save it and wrappers see it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SHARED", "Shared", "StepCounter", "free_name", "shared_prefix"]

#: Its name in the model.
SHARED = "lowdim_shared"


def free_name(model: nn.Module) -> str:
    """`SHARED`, with a number if another adapter already uses that name."""
    taken = sum(name.startswith(SHARED) for name, _ in model.named_children())
    return SHARED if not taken else f"{SHARED}_{taken}"


def shared_prefix(modules_to_save: Iterable[str]) -> str:
    """What the names of the shared module's tensors begin with in a file.

    A module of the user's that is saved whole may have the same name; two dots, which no module's name has, tell them apart.
    """
    taken = any(name.split(".")[0] == SHARED for name in modules_to_save)
    return f"{SHARED}.." if taken else f"{SHARED}."


class Shared(nn.Module):
    """Base of the modules that `Method.shared` returns."""

    def forward(self, x: Any) -> Any:
        """`x` itself: a model that is an nn.Sequential calls every module that it holds."""
        return x


class StepCounter(Shared):
    """Counts the calls of `Adapted.step`: `done` is read without a device synchronisation, `steps` is saved."""

    steps: Tensor

    def __init__(self, device: Any = None):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        self.done = 0

    def count(self) -> None:
        """Count one step."""
        self.done += 1
        self.steps.fill_(self.done)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "steps" in state_dict:
            self.done = int(state_dict[prefix + "steps"])
