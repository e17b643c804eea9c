"""Weights that no adapter can reach, named before anything is trained."""

from __future__ import annotations

from typing import Any

from lowdim.plan.fake import Subject, fake_mode
from lowdim.surgery import find_layers, unreached_note

__all__ = ["unreached"]


def unreached(model: Any, *, task: str = "classify", num_labels: int = 2) -> str:
    """What to say of weights that adapters leave frozen (experts stacked in one parameter), with their share; or nothing.

    Nothing is allocated.

    Args:
        model, task, num_labels: as for `forecast`.

    Example:
        >>> import torch
        >>> from lowdim.plan import unreached
        >>> unreached(torch.nn.Sequential(torch.nn.Linear(30, 20)))
        ''
    """
    with fake_mode():
        built = Subject.of(model, task=task, num_labels=num_labels).build()
        return unreached_note(built, find_layers(built), None)
