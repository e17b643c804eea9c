"""Checks of one attention head's input, weights and adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowdim.errors import check_float, unknown

__all__ = ["PARTS", "Pair", "check_head", "scale_of"]

PARTS = ("q", "k", "v")
Pair = tuple[Tensor, Tensor]


def check_head(
    x: Tensor, weights: Mapping[str, Tensor], adapters: Mapping[str, Pair], alpha: float, beta: float | None, least: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Pair], float]:
    """Everything in one dtype (float32 or better), and beta.

    Raises:
        ValueError: a missing weight, an unknown name, shapes that do not fit, numbers that are not finite or out of range.
    """
    check_float("alpha", alpha, 0.0, low_open=True)
    for which, given in (("weights", weights), ("adapters", adapters)):
        for name in given:
            if name not in PARTS:
                raise unknown(f"a key of {which}", name, PARTS)
    missing = [name for name in PARTS if name not in weights]
    if missing:
        raise ValueError(f"weights must hold q, k and v; {missing[0]!r} is missing")
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"x must be (L, d) with at least {least} rows; got shape {tuple(x.shape)}")
    tensors = [x, *weights.values(), *(factor for pair in adapters.values() for factor in pair)]
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError("x, weights and adapters must be finite; one has NaN or infinite entries")
    width = x.shape[1]
    for name in PARTS:
        w = weights[name]
        if w.ndim != 2 or w.shape[1] != width or (name == "k" and w.shape[0] != weights["q"].shape[0]):
            raise ValueError(f"the weight of {name} must be (h, {width}), with one h for q and k; got {tuple(w.shape)}")
        if name in adapters:
            a, b = adapters[name]
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != width or b.shape != (w.shape[0], a.shape[0]) or not len(a):
                shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise ValueError(f"the adapter of {name} must be A (r, {width}) and B ({w.shape[0]}, r); got {shapes}")
    scale = weights["q"].shape[0] ** -0.5 if beta is None else beta
    check_float("beta", scale, 0.0, low_open=True)
    pairs = {name: (adapters[name][0].to(dtype), adapters[name][1].to(dtype)) for name in PARTS if name in adapters}
    return x.detach().to(dtype), {name: weights[name].detach().to(dtype) for name in PARTS}, pairs, float(scale)


def scale_of(pair: Pair, alpha: float) -> float:
    """`alpha / r`."""
    return alpha / len(pair[0])
