"""How far apart two tensors are."""

from __future__ import annotations

from torch import Tensor

__all__ = ["relative_error"]


def relative_error(got: Tensor, want: Tensor) -> float:
    """`max |got − want| / max |want|`, in float64; NaN where either has one."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"shape must be {tuple(want.shape)}; got {tuple(got.shape)}")
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
