"""Subvectors in a low-rank basis, and their clusters: k-means at the start, differentiable k-means in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.errors import check_float, check_int
from lowdim.linalg import canonical_signs, stream

__all__ = [
    "cluster",
    "dkm",
    "estimate_clustering_dim",
    "lowrank_subvectors",
    "nearest_codes",
    "nearest_distance",
    "subvectors",
]

_LLOYD_STEPS = 25
#: Up to so many distances between points and centres, k-means runs on all points: some seconds at most.
_FULL = 2**22
#: Above that: points for each centre from which it starts, and Lloyd steps on all points afterwards.
_POINTS, _FULL_STEPS = 256, 2
#: Distances that are held at once.
_ENTRIES = 2**18


def subvectors(weight: Tensor, subvector_size: int) -> Tensor:
    """`(out, in)` as its consecutive subvectors `(out · in / m, m)`, row by row.

    Raises:
        ValueError: m does not divide `in`.
    """
    check_int("subvector_size", subvector_size, 1)
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix (out, in); got shape {tuple(weight.shape)}")
    if weight.shape[1] % subvector_size:
        raise ValueError(
            f"subvector_size must divide the {weight.shape[1]} columns of the weight; got {subvector_size}; divisors are "
            f"{', '.join(str(d) for d in range(2, 33) if weight.shape[1] % d == 0) or 1}"
        )
    return weight.reshape(-1, subvector_size)


def lowrank_subvectors(
    weight: Tensor,  # (out, in)
    subvector_size: int,
    clustering_dim: int,
) -> tuple[Tensor, Tensor]:
    """The subvectors of a weight in the basis that holds most of their squares.

    Formula: with the n = out · in / m subvectors `w_i (m,)`, P holds the d̃ leading eigenvectors of `Σ w_i w_iᵀ` (not
    centred), and `z_i = Pᵀ w_i`; `P z_i` is the best approximation of `w_i` in d̃ dimensions.

    Returns:
        `z (n, d̃)` and `basis (m, d̃)` with orthonormal columns of canonical sign, in float64 (float32 where a device has none).

    Raises:
        ValueError: m does not divide `in`, d̃ outside [1, m], NaN or infinity in the weight.

    Example:
        >>> import torch
        >>> from lowdim.compress import lowrank_subvectors
        >>> z, basis = lowrank_subvectors(torch.tensor([[3.0, 4.0, 6.0, 8.0]]), 2, 1)
        >>> z.tolist(), (z @ basis.T).round().tolist()
        ([[5.0], [10.0]], [[3.0, 4.0], [6.0, 8.0]])

    Source: the construction is ours, after arXiv 2211.11397.
    """
    parts = _wide(subvectors(weight, subvector_size))
    check_int("clustering_dim", clustering_dim, 1, subvector_size)
    basis, _ = _eigenbasis(parts)
    basis = basis[:, :clustering_dim]
    return parts @ basis, basis


def dkm(
    z: Tensor,  # (n, d)
    codebook: Tensor,  # (k, d)
    *,
    temperature: float,
    iterations: int = 5,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable k-means: every point is the mean of the centres that it attends to.

    Formula: `iterations` times `A = softmax_j(−‖z_i − C_j‖ / τ)`, `C_j ← Σ_i A_ij z_i / Σ_i A_ij`; then A once more from the
    last C, and the result is `A C`. The distance is not squared. A centre with no attention keeps its place.

    Args:
        temperature: τ, > 0; near 0 the attention is that of k-means.
        tolerance: stop when no coordinate of a centre changes by more, >= 0.

    Returns:
        `A C (n, d)`, `C (k, d)` and `A (n, k)`, all differentiable by z and the codebook.

    Raises:
        ValueError: shapes that do not fit, τ <= 0, `iterations` below 1.

    Example:
        >>> import torch
        >>> from lowdim.compress import dkm
        >>> z = torch.tensor([[0.0], [0.2], [5.0], [5.2]])
        >>> soft, codebook, attention = dkm(z, torch.tensor([[1.0], [4.0]]), temperature=0.05)
        >>> [f"{centre.item():.2f}" for centre in codebook], attention.argmax(1).tolist()
        (['0.10', '5.10'], [0, 0, 1, 1])

    It holds n · k attentions and their graph for every iteration. Without training use k-means (`LR2VQLinear.from_linear`).

    Source: Cho et al., "DKM: Differentiable K-Means Clustering Layer for Neural Network Compression", arXiv 2108.12659.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or not len(z) or not len(codebook):
        raise ValueError(f"z must be (n, d) and codebook (k, d); got {tuple(z.shape)} and {tuple(codebook.shape)}")
    check_float("temperature", temperature, 0.0, low_open=True)
    check_int("iterations", iterations, 1)
    check_float("tolerance", tolerance, 0.0)
    tiny = torch.finfo(z.dtype).tiny
    for _ in range(iterations):
        attention = _attention(z, codebook, temperature)
        mass = attention.sum(0)[:, None]
        moved = torch.where(mass > tiny, attention.mT @ z / mass.clamp_min(tiny), codebook)
        change = (moved - codebook).detach().abs().max()
        codebook = moved
        if bool(change <= tolerance):
            break
    attention = _attention(z, codebook, temperature)
    return attention @ codebook, codebook, attention


def estimate_clustering_dim(
    weight: Tensor,  # (out, in)
    *,
    codebook_size: int,
    subvector_size: int,
    dims: Iterable[int] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What a weight loses in each clustering dimension, before any training.

    Formula: `approximation_error = Σ‖w_i − P Pᵀ w_i‖² / Σ‖w_i‖²`, which falls with d̃, and
    `clustering_error = Σ‖z_i − C[a_i]‖² / Σ‖w_i‖²`, which rises with it. Training heals the first and not the second. Take the
    smallest d̃ whose approximation error is not above its clustering error.

    Args:
        dims: the values of d̃; None: 1 to m.

    Returns:
        For each d̃ a row `{"clustering_dim", "approximation_error", "clustering_error"}`.

    Raises:
        ValueError: see `lowrank_subvectors`; k < 1.

    Example:
        >>> import torch
        >>> from lowdim.compress import estimate_clustering_dim
        >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 8).repeat(8)
        >>> rows = estimate_clustering_dim(weight, codebook_size=16, subvector_size=8, dims=(1, 2, 4))
        >>> next(row["clustering_dim"] for row in rows if row["approximation_error"] <= row["clustering_error"])
        2

    Without training the sum of both errors is least at d̃ = m, or near it: choose a smaller one only if stage 1 follows.

    Source: the estimate is ours, after arXiv 2211.11397.
    """
    parts = _wide(subvectors(weight, subvector_size))
    chosen = list(range(1, subvector_size + 1)) if dims is None else list(dims)
    for dim in chosen:
        check_int("dims", dim, 1, subvector_size)
    check_int("codebook_size", codebook_size, 1)
    basis, energy = _eigenbasis(parts)
    total = float(energy.sum())
    rows = []
    for dim in chosen:
        z = parts @ basis[:, :dim]
        codebook, codes = cluster(z, codebook_size, stream(seed, "lr2vq", "estimate", dim))
        lost = float((z - codebook[codes]).square().sum())
        errors = (float(energy[dim:].sum()) / total, lost / total) if total else (0.0, 0.0)
        rows.append({"clustering_dim": dim, "approximation_error": errors[0], "clustering_error": errors[1]})
    return rows


def cluster(z: Tensor, codebook_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means: k-means++ seeding, then Lloyd steps; an empty cluster keeps its centre.

    All points take part where there are at most 256 for each centre, or 2²² distances between points and centres. Above both it
    runs on a random sample of as many points as that allows, and ends with two Lloyd steps on all.

    Returns:
        The centres `(min(k, n), d)` and the code of each point, its nearest centre `(n,)` int64.
    """
    k = min(codebook_size, len(z))
    sample = z
    most = max(_POINTS * k, _FULL // k)
    if len(z) > most:
        sample = z[torch.randperm(len(z), generator=generator)[:most].to(z.device)]
    codebook = sample[_spread(sample, k, generator)]
    codes = nearest_codes(sample, codebook)
    for _ in range(_LLOYD_STEPS):
        codebook = _means(sample, codes, codebook)
        before, codes = codes, nearest_codes(sample, codebook)
        if bool((codes == before).all()):
            break
    if sample is z:
        return codebook, codes
    for _ in range(_FULL_STEPS):
        codebook = _means(z, nearest_codes(z, codebook), codebook)
    return codebook, nearest_codes(z, codebook)


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """`argmin_j ‖z_i − C_j‖` for each point, `(n,)` int64."""
    squares = codebook.square().sum(1)
    rows = max(1, _ENTRIES // len(codebook))
    return torch.cat([torch.addmm(squares, part, codebook.mT, alpha=-2).min(1).indices for part in z.split(rows)])


def nearest_distance(z: Tensor, codebook: Tensor) -> float:
    """The mean distance of a point to its nearest centre."""
    return float((z - codebook[nearest_codes(z, codebook)]).square().sum(1).sqrt().mean())


def _spread(z: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of k points, each drawn with a probability that grows with the squared distance to the nearest one before."""
    draws = torch.rand(k, dtype=torch.float64, generator=generator).to(z.device, z.dtype)
    chosen = (draws[:1] * len(z)).long().clamp_max(len(z) - 1)
    distance = (z - z[chosen]).square().sum(1)
    for draw in draws[1:]:
        sums = distance.cumsum(0)
        place = torch.searchsorted(sums, draw * sums[-1:], right=True)
        place = torch.where(place < len(z), place, distance.argmax()[None])  # a draw that rounding puts at the end
        chosen = torch.cat([chosen, place])
        distance = torch.minimum(distance, (z - z[place]).square().sum(1))
    return chosen


def _means(z: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """The mean of each cluster; an empty one keeps its centre."""
    count = torch.bincount(codes, minlength=len(codebook))
    if z.device.type == "cpu":
        sums = torch.zeros_like(codebook).index_add_(0, codes, z)
    else:  # sums in a fixed order, which index_add_ has only there
        sums = sum(
            F.one_hot(ids, len(codebook)).to(z.dtype).mT @ part for ids, part in zip(codes.split(_ENTRIES), z.split(_ENTRIES))
        )
    return torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], codebook)


def _attention(z: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    squares = z.square().sum(1)[:, None] + codebook.square().sum(1) - 2 * z @ codebook.mT
    return (-(squares.clamp_min(0) + 1e-12).sqrt() / temperature).softmax(1)  # a root has no gradient at 0


def _eigenbasis(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of `Σ w wᵀ` as columns, the leading one first, and their eigenvalues."""
    energy, vectors = torch.linalg.eigh(parts.mT @ parts)
    basis, _ = canonical_signs(vectors.flip(1))
    return basis, energy.flip(0).clamp_min(0)


def _wide(parts: Tensor) -> Tensor:
    dtype = torch.float32 if parts.device.type == "mps" else torch.float64  # which has no float64
    parts = parts.detach().to(dtype)
    if not bool(torch.isfinite(parts).all()):
        raise ValueError("the weight has NaN or infinite entries; they belong to no cluster")
    return parts
