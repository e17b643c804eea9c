"""Evaluation mode for a while, and every module back in the mode that it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Modules in evaluation mode without gradients; whatever else can be called is left alone.

    Example:
        >>> import torch
        >>> from lowdim.surgery import evaluating
        >>> model = torch.nn.Dropout(0.5)
        >>> with evaluating(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    found = [model for model in models if isinstance(model, nn.Module)]
    modes = {module: module.training for model in found for module in model.modules()}
    for model in found:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
