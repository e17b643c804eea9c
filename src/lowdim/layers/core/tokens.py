"""What token mixers check of their inputs: tokens, masks and carried states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.errors import shown

__all__ = ["check_state", "check_token", "check_tokens"]


def check_tokens(
    x: Tensor,  # (batch, length, features)
    features: int,
    attention_mask: Tensor | None = None,  # (batch, length)
) -> None:
    """Raise ValueError unless `x` holds sequences of tokens, and the mask one number for each."""
    if x.ndim != 3 or x.shape[-1] != features:
        raise ValueError(f"x must be (batch, length, {features}); got shape {tuple(x.shape)}")
    if attention_mask is not None and attention_mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask must be (batch, length) = {tuple(x.shape[:2])}; got {tuple(attention_mask.shape)}")


def check_token(
    x: Tensor,  # (batch, features)
    features: int,
) -> None:
    """Raise ValueError unless `x` is one token for each sequence."""
    if x.ndim != 2 or x.shape[-1] != features:
        raise ValueError(f"x must be one token for each sequence, (batch, {features}); got shape {tuple(x.shape)}")


def check_state(
    state: Any,
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype] | None],  # name -> shape and dtype; None: the part is absent
) -> None:
    """Raise ValueError unless a state has these parts, in this order, with their shapes and dtypes."""
    if not isinstance(state, tuple) or len(state) != len(wanted):
        raise ValueError(f"state must have the parts {', '.join(wanted)}; got {shown(type(state).__name__)}")
    for part, (name, want) in zip(state, wanted.items(), strict=True):
        if want is None and part is None:
            continue
        if want is None or part is None:
            raise ValueError(f"state.{name} must be {'None' if want is None else 'a tensor'}; got {shown(type(part).__name__)}")
        shape, dtype = want
        if tuple(part.shape) != shape or part.dtype != dtype:
            raise ValueError(f"state.{name} must be {shape} in {dtype}; got {tuple(part.shape)} in {part.dtype}")
