"""A model in another mode for a while: in evaluation, with another forward pass, or computing in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "in_bfloat16", "with_forward"]


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


@contextmanager
def with_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A model with another forward pass; what it had, of its class or of its own, is put back.

    Example:
        >>> import torch
        >>> from lowdim.surgery import with_forward
        >>> model = torch.nn.Identity()
        >>> with with_forward(model, lambda x: -x):
        ...     print(model(1))
        -1
        >>> model(1)
        1
    """
    own = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def in_bfloat16(model: nn.Module, device: str) -> Iterator[None]:
    """A model whose forward pass is in bfloat16 by autocast, with float32 outputs, as accelerate trains it.

    Example:
        >>> import torch
        >>> from lowdim.surgery import in_bfloat16
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2**-10]])
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> with in_bfloat16(model, "cpu"):
        ...     print(model(x).item(), model(x).dtype)
        1.0 torch.float32
        >>> model(x).item()
        1.0009765625
    """
    from accelerate.utils import convert_outputs_to_fp32

    with with_forward(model, convert_outputs_to_fp32(torch.autocast(device, torch.bfloat16)(model.forward))):
        yield
