"""Counts the tensors that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["kept_bytes", "kept_tensors"]


def kept_tensors(run: Callable[[], Any], *modules: nn.Module) -> list[Tensor]:
    """One tensor for each distinct storage that `run()` saves for its backward pass.

    Args:
        modules: their own parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()  # kept alive until everything is counted, so that no address is reused
    found = [tensor for pointer, tensor in kept.items() if pointer not in own]
    del output
    return found


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that `model(x)` keeps, without the model's own tensors."""
    return sum(tensor.untyped_storage().nbytes() for tensor in kept_tensors(lambda: model(x), model))
