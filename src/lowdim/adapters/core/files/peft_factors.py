"""An update as two factors, in PEFT's layout: exact if it is low-rank, else truncated, with its error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.linalg import compress_factors, svd, truncated_svd, wide
from lowdim.surgery import CONVOLUTIONS

__all__ = ["Cut", "cut", "factor_for_peft", "laid_out", "pad_rank", "scale_in_peft"]

#: The error up to which a rank is suggested.
GOOD = 0.01
#: Above this smaller side a full spectrum takes too long just for a suggestion.
LARGE = 1024


@dataclass(frozen=True)
class Cut:
    """`ΔW ≈ B A`.

    Attributes:
        A, B: `(r, in)` and `(out, r)`.
        error: `‖ΔW − B A‖_F / ‖ΔW‖_F`; 0 where exact.
        enough: the smallest rank with an error of at most 1 %; None if it was not computed.
        whole: the rank without a cut: that of the update's factors, or the layer's smaller side.
    """

    A: Tensor
    B: Tensor
    error: float
    enough: int | None
    whole: int


@torch.no_grad()
def cut(layer: AdaptedLayer, rank: int | None = None, max_error: float | None = None, limit: int | None = None) -> Cut:
    """The update of a layer as factors.

    Args:
        rank: the highest that is kept; None keeps an update that is low-rank whole, and a quarter of the smaller side of
            others.
        max_error: instead, the smallest rank with at most this relative error, also of updates that are low-rank.
        limit: maximum rank, whatever the error.
    """
    small = min(layer.out_features, layer.in_features)
    most = small if limit is None else min(small, limit)
    thin = layer.update.low_rank_delta()
    if thin is None:
        return _cut_dense(layer, small, most, rank, max_error)
    A, B = wide(thin[0]), wide(thin[1]) * layer.strength
    count = A.shape[0]
    top = most if rank is None else min(most, rank)
    if max_error is None and count <= top:
        return Cut(A, B, 0.0, count, count)
    # More columns than the matrix has rank, or than requested: QR of both factors, then the SVD of a small square.
    whole_A, whole_B, _ = compress_factors(A.double(), B.double(), small)
    s = whole_A.square().sum(1)  # balanced factors: each row has the square root of its singular value
    keep = top if max_error is None else min(most, _needed(s, max_error))
    keep = min(keep, len(s))
    return Cut(whole_A[:keep].to(A.dtype), whole_B[:, :keep].to(B.dtype), _error(s, keep), _needed(s, GOOD), len(s))


def _cut_dense(layer: AdaptedLayer, small: int, most: int, rank: int | None, max_error: float | None) -> Cut:
    delta, dtype = layer.delta(), layer.update_dtype()
    if small <= LARGE:
        u, s, vh = svd(delta)
        keep = min(most, rank or max(1, small // 4)) if max_error is None else min(most, _needed(s, max_error))
        error, enough = _error(s, keep), _needed(s, GOOD)
    else:
        u, s, vh, keep = _sketched(delta, most, rank or max(1, small // 4), max_error)
        size = float(torch.linalg.matrix_norm(delta))
        error = float(torch.linalg.matrix_norm(delta - (u[:, :keep] * s[:keep]) @ vh[:keep])) / size if size else 0.0
        enough = None
    root = s[:keep].sqrt()
    return Cut((root[:, None] * vh[:keep]).to(dtype), (u[:, :keep] * root).to(dtype), error, enough, small)


def _sketched(delta: Tensor, most: int, rank: int, max_error: float | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Leading triplets and the number to keep; for an error bound, the rank is doubled until the bound is met."""
    if max_error is None:
        keep = min(most, rank)
        return (*truncated_svd(delta, keep), keep)
    total, k = float(delta.double().square().sum()), min(most, 64)
    while True:
        u, s, vh = truncated_svd(delta, k)
        left = (1 - s.double().square().cumsum(0) / total).clamp_min(0).sqrt() if total else torch.zeros(k)
        met = torch.nonzero(left <= max_error)
        if len(met) or k == most:
            return u, s, vh, int(met[0]) + 1 if len(met) else k
        k = min(most, 2 * k)


def scale_in_peft(layer: nn.Module) -> float:
    """The factor by which PEFT scales an update of this layer: that of an embedding with one number called `embed_scale`."""
    scale = getattr(layer, "embed_scale", None) if isinstance(layer, nn.Embedding) else None
    if isinstance(scale, Tensor):
        return float(scale) if scale.numel() == 1 else 1.0
    return float(scale) if isinstance(scale, (int, float)) else 1.0


def factor_for_peft(layer: nn.Module, gain: float) -> float:
    """What an update's factors are multiplied by for PEFT, which does not scale it by the layer's `gain`; 1 where it does."""
    factor = gain / scale_in_peft(layer)
    return factor if abs(factor - 1.0) > 2e-3 else 1.0  # less is the rounding of a scale to 16 bits


def pad_rank(found: Cut, rank: int) -> Cut:
    """The same update at a higher rank: rows and columns of zeros."""
    more = rank - found.A.shape[0]
    A = torch.cat([found.A, found.A.new_zeros(more, found.A.shape[1])])
    B = torch.cat([found.B, found.B.new_zeros(found.B.shape[0], more)], dim=1)
    return dataclasses.replace(found, A=A, B=B)


def laid_out(prefix: str, layer: AdaptedLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """PEFT's two tensors for `ΔW = B A`, the one with the rank in front first."""
    factor = factor_for_peft(layer.plain, layer.gain)
    B = B if factor == 1.0 else B * factor
    if layer.kind == "embedding":
        return {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    plain = layer.plain
    if isinstance(plain, CONVOLUTIONS):
        if set(plain.dilation) != {1} or plain.padding_mode != "zeros":
            raise ValueError(f"{prefix}: PEFT's LoRA has no dilation and pads with zeros only; got {plain}: merge() instead")
        A = _grouped(A.view(len(A), *plain.weight.shape[1:]), plain.groups)
        B = B[(..., *[None] * len(plain.kernel_size))]
    return {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}


def _grouped(
    A: Tensor,  # (rank, in_channels / groups, *kernel)
    groups: int,
) -> Tensor:
    """PEFT's first convolution sees all channels and only its second one has groups: one copy of `A` for each group."""
    if groups == 1:
        return A
    rank, channels, *size = A.shape
    eye = torch.eye(groups, dtype=A.dtype, device=A.device)[(slice(None), None, slice(None), *[None] * (A.ndim - 1))]
    return (eye * A[None, :, None]).reshape(groups * rank, groups * channels, *size)


def _left(s: Tensor) -> Tensor:
    """The relative error of each rank from 0 up, `(len(s) + 1,)`; summed from the smallest, so that nothing cancels."""
    tails = s.double().square().flip(0).cumsum(0).flip(0)
    total = float(tails[0]) if len(tails) else 0.0
    zero = tails.new_zeros(1)
    return (torch.cat([tails, zero]) / total).sqrt() if total else torch.zeros(len(s) + 1)


def _error(s: Tensor, keep: int) -> float:
    return float(_left(s)[keep])


def _needed(s: Tensor, bound: float) -> int:
    return max(1, int(torch.nonzero(_left(s) <= bound)[0]))
