"""One pass of a model over sample data that leaves the model unchanged."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowdim.surgery import is_quantized, weight_matrix

__all__ = ["as_it_was", "call_model", "evaluating", "give_back"]


def call_model(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)` for a mapping, `model(*batch)` for a tuple or list, else `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode within the block; each module gets its own mode back afterwards.

    Example:
        >>> from torch import nn
        >>> from lowdim.calibrate import evaluating
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     inside = model.training
        >>> inside, model.training
        (False, True)
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def as_it_was(model: nn.Module, layers: Mapping[str, nn.Module], *, want_gradient: bool) -> Iterator[None]:
    """Evaluation mode, gradients off and cleared (on for the weights of `layers` if wanted); restores everything afterwards."""
    flags = {p: p.requires_grad for p in model.parameters()}
    grads = {p: p.grad for p in model.parameters()}
    for p in flags:
        p.requires_grad_(False)
        p.grad = None
    if want_gradient:
        for layer in layers.values():
            if is_quantized(layer):
                continue
            weight_matrix(layer)  # a clear error for a layer without one
            layer.weight.requires_grad_(True)  # type: ignore[union-attr]
    try:
        with evaluating(model):
            yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = grads[p]


def give_back() -> None:
    """Have the C library return freed memory to the system, which takes it milliseconds; where it cannot, nothing is done.

    Glibc keeps what large tensors leave behind, in pieces into which the next ones do not fit: after a pass of a model as much
    again as the pass took.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
