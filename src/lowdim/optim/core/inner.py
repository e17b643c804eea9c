"""Inner rules that act entry by entry: AdamW with float32 moments, AdamW with 8-bit moments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lowdim.linalg import dequantize_blockwise, dynamic_codebook, has_numbers, quantize_blockwise
from lowdim.optim.core.parts import InnerRule, Layout, Side, State, moment_dtype
from lowdim.optim.core.pieces import pieces

__all__ = ["AdamW8bitRule", "AdamWRule", "joined", "rotated"]

EpsMode = Literal["outside", "inside"]

#: The code of 0 in the signed and in the unsigned codebook.
_ZERO = {True: 127, False: 0}


@dataclass(frozen=True)
class AdamWRule(InnerRule):
    """Adam's direction; two families of implementations differ in where eps is added.

    Formula: `m ← β₁ m + (1−β₁) g`, `v ← β₂ v + (1−β₂) g²`, `D = m / (√v + e)`, `η = lr √(1−β₂ᵏ) / (1−β₁ᵏ)`, k = step + 1.
    `eps_mode="outside"`: e = eps (as transformers had it); `"inside"`: `e = eps √(1−β₂ᵏ)` (torch's AdamW).
    `correct_bias=False`: η = lr.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    eps_mode: EpsMode = "outside"
    correct_bias: bool = True

    elementwise = True

    def init(self, low: Tensor, state: State) -> None:
        """Zero moments."""
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(low, dtype=moment_dtype(low.dtype))

    def rotate(self, state: State, R: Tensor, side: Side) -> None:
        """`m R` and `|v R|`, or the same from the left."""
        state["exp_avg"] = rotated(state["exp_avg"], R, side)
        state["exp_avg_sq"] = rotated(state["exp_avg_sq"], R, side).abs_()

    def direction(self, low: Tensor, state: State, step: int, lr: float, weight: Tensor) -> tuple[Tensor, float]:
        """`(D, η)`."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return self.advance(low, m, v, step), self.step_size(step, lr)

    def walk(self, low: Tensor, state: State, step: int) -> Iterator[tuple[slice, Tensor]]:
        """D of contiguous tensors piece by piece, in slices of the flattened tensor; also updates the moments."""
        grad, m, v = low.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for here in pieces(low, 1):
            yield here, self.advance(grad[here], m[here], v[here], step)

    def advance(self, low: Tensor, m: Tensor, v: Tensor, step: int) -> Tensor:
        """Update the moments in place; D, with one temporary."""
        beta1, beta2 = self.betas
        low = low.to(m.dtype)
        m.lerp_(low, 1 - beta1)
        v.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        eps = self.eps if self.eps_mode == "outside" else self.eps * math.sqrt(1 - beta2 ** (step + 1))
        return v.sqrt().add_(eps).reciprocal_().mul_(m)

    def step_size(self, step: int, lr: float) -> float:
        """η."""
        if not self.correct_bias:
            return lr
        beta1, beta2 = self.betas
        return lr * math.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))

    def layout(self, low_shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Two moments."""
        return {name: (low_shape, moment_dtype(dtype)) for name in ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class AdamW8bitRule(AdamWRule):
    """AdamW whose moments are bytes between steps, with one float32 scale per block of 256.

    The update uses the new float32 moments, which are quantized afterwards. Low gradients of fewer than `min_size` entries keep
    float32 moments.
    """

    eps: float = 1e-8
    eps_mode: EpsMode = "inside"
    min_size: int = 4096
    block: int = 256

    elementwise = False  # blocks run over the whole tensor, not per shard

    def init(self, low: Tensor, state: State) -> None:
        """Zero moments, as bytes where the tensor is large enough."""
        if low.numel() < self.min_size:
            return super().init(low, state)
        blocks = -(-low.numel() // self.block)
        for name, scale, zero in (("exp_avg", "absmax1", _ZERO[True]), ("exp_avg_sq", "absmax2", _ZERO[False])):
            state[name] = torch.full(low.shape, zero, dtype=torch.uint8, device=low.device)
            state[scale] = torch.zeros(blocks, dtype=torch.float32, device=low.device)

    def rotate(self, state: State, R: Tensor, side: Side) -> None:
        """Through float32 and back."""
        if "absmax1" not in state:
            return super().rotate(state, R, side)
        m, v = self._load(state)
        self._store(state, rotated(m, R, side), rotated(v, R, side).abs_())

    def direction(self, low: Tensor, state: State, step: int, lr: float, weight: Tensor) -> tuple[Tensor, float]:
        """`(D, η)`; D is the only full-size tensor in floating point."""
        if "absmax1" not in state:
            return super().direction(low, state, step, lr, weight)
        return joined(low, self.walk(low, state, step)), self.step_size(step, lr)

    def walk(self, low: Tensor, state: State, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Moments are read, updated and stored a few blocks at a time."""
        if "absmax1" not in state:
            yield from super().walk(low, state, step)
            return
        grad = low.reshape(-1)
        signed, unsigned = _codebooks(low)
        kept = [
            (state["exp_avg"].view(-1), state["absmax1"], signed),
            (state["exp_avg_sq"].view(-1), state["absmax2"], unsigned),
        ]
        for here in pieces(low, self.block):
            blocks = slice(here.start // self.block, -(-here.stop // self.block))
            m, v = (dequantize_blockwise(codes[here], scale[blocks], book, self.block) for codes, scale, book in kept)
            yield here, self.advance(grad[here], m, v, step)
            for value, (codes, scale, book) in zip((m, v), kept):
                codes[here], scale[blocks] = quantize_blockwise(value, book, self.block)

    def _load(self, state: State) -> tuple[Tensor, Tensor]:
        signed, unsigned = _codebooks(state["exp_avg"])
        m = dequantize_blockwise(state["exp_avg"], state["absmax1"], signed, self.block)
        v = dequantize_blockwise(state["exp_avg_sq"], state["absmax2"], unsigned, self.block)
        return m, v

    def _store(self, state: State, m: Tensor, v: Tensor) -> None:
        signed, unsigned = _codebooks(m)
        state["exp_avg"], state["absmax1"] = quantize_blockwise(m, signed, self.block)
        state["exp_avg_sq"], state["absmax2"] = quantize_blockwise(v, unsigned, self.block)

    def layout(self, low_shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Bytes and scales, or float32 moments where the tensor is small."""
        total = math.prod(low_shape)
        if total < self.min_size:
            return super().layout(low_shape, dtype)
        blocks = ((-(-total // self.block),), torch.float32)
        codes = (low_shape, torch.uint8)
        return {"exp_avg": codes, "absmax1": blocks, "exp_avg_sq": codes, "absmax2": blocks}


def joined(low: Tensor, walk: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """D of the low gradient's shape, in float32, from its pieces."""
    D = torch.empty(low.shape, dtype=torch.float32, device=low.device)
    for here, piece in walk:
        D.view(-1)[here] = piece
    return D


def _codebooks(like: Tensor) -> tuple[Tensor, Tensor]:
    """Signed and unsigned, cached per device; a forecast's fake tensors are not cached."""
    if not has_numbers(like):
        return dynamic_codebook(True).to(like.device), dynamic_codebook(False).to(like.device)
    return _codebooks_on(like.device)


@cache
def _codebooks_on(device: torch.device) -> tuple[Tensor, Tensor]:
    return dynamic_codebook(True).to(device), dynamic_codebook(False).to(device)


def rotated(moment: Tensor, R: Tensor, side: Side) -> Tensor:
    """`M R` (right) or `Rᵀ M` (left)."""
    R = R.to(moment.dtype)
    return moment @ R if side == "right" else R.mT @ moment
