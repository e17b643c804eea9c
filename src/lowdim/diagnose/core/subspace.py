"""A generalization bound for training in few dimensions, from the length of the description."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg import widest

__all__ = ["compression_bound", "quantize_subspace"]


def compression_bound(train_error: float, dimension: int, n_samples: int, *, bits: int = 32, delta: float = 0.05) -> float:
    """An upper bound on the true error of a network described by `dimension` numbers of `bits` bits.

    Formula: `error ≤ train_error + √((d·b·ln 2 + ln(1/δ)) / (2n))` with probability at least `1 − δ`, at most 1. Such a network
    is one of `2^(d·b)` functions, since the random projection comes from a seed that was fixed before the data were seen.

    Args:
        train_error: share of wrong answers on the training samples, of the *quantized* numbers (`quantize_subspace`).
        dimension: trained numbers, scales included. If the quantizer's range is computed from the trained vector, it is part
            of the description: add `⌈32·vectors/bits⌉`.
        n_samples: independent training samples; pre-trained weights and seed must not depend on them.
        bits: for each number.
        delta: probability with which the bound may fail.

    Returns:
        The bound; 1 is vacuous, as for most networks at 32 bits.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from lowdim.diagnose import compression_bound
        >>> round(compression_bound(0.14, 40, 2000, bits=8), 3)
        0.377
        >>> compression_bound(0.0, 20_000, 3_668)
        1.0

    Loose by design: it holds for any training algorithm and does not see how flat the solution is. To compare models
    use a validation set.

    Source: the statement is that of Aghajanyan, Gupta, Zettlemoyer, arXiv 2012.13255 (after Arora et al., arXiv 1802.05296);
    the constants are those of the finite hypothesis class.
    """
    check_float("train_error", train_error, 0.0, 1.0)
    check_int("dimension", dimension, 1)
    check_int("n_samples", n_samples, 1)
    check_int("bits", bits, 1, 64)
    check_float("delta", delta, 0.0, 1.0, low_open=True, high_open=True)
    return min(1.0, train_error + math.sqrt((dimension * bits * math.log(2.0) - math.log(delta)) / (2 * n_samples)))


def quantize_subspace(
    theta: Tensor,  # (d,), or any shape
    bits: int,
) -> Tensor:
    """The nearest of `2^bits` evenly spaced levels on `[−s, s]`, `s = max|θ|`, in the dtype of `theta`.

    Formula: `q = round((θ/s + 1)/2 · (2^b − 1)) / (2^b − 1) · 2s − s`, in float64 where the device has it. Zero is no level.

    Raises:
        ValueError: bits outside 1..16, nothing to quantize, or numbers that are not finite.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import quantize_subspace
        >>> quantize_subspace(torch.tensor([-1.0, 0.1, 0.5, 1.0]), 2)
        tensor([-1.0000,  0.3333,  0.3333,  1.0000])

    Source: ours, for `compression_bound`.
    """
    check_int("bits", bits, 1, 16)
    if not theta.is_floating_point() or not theta.numel() or not bool(torch.isfinite(theta).all()):
        raise ValueError(f"theta must hold finite floating point numbers; got {theta.dtype} of shape {tuple(theta.shape)}")
    wide = widest(theta)
    size, top = wide.abs().max(), float(2**bits - 1)
    if not bool(size):
        return wide.to(theta.dtype)
    levels = torch.round((wide / size + 1.0) / 2.0 * top)
    return (levels / top * (2.0 * size) - size).to(theta.dtype)
