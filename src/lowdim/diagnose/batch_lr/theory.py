"""What a batch does to the extreme eigenvalues of the Hessian, and the largest stable learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import as_operator
from lowdim.results import Result

__all__ = ["BatchExtremes", "batch_extremes", "effective_batch", "hessian_variance", "max_lr", "scale_lr"]

KINDS = ("hessian", "ggn")
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class BatchExtremes(Result):
    """The extreme eigenvalues that the theory predicts for a batch.

    Attributes:
        largest, smallest: of the batch's matrix.
        spiked: whether the largest is an eigenvalue of its own, above the noise, and not the noise's edge.
    """

    largest: float
    smallest: float
    spiked: bool


def effective_batch(batch_size: int, n_data: float | None = None) -> float:
    """`b`, `1/b = 1/B − 1/N`: the size of a batch without replacement that has as much noise as `b` independent samples.

    Args:
        batch_size: `B`, >= 1.
        n_data: `N`, >= B; None or infinity: unknown, then `b = B`.

    Returns:
        `b`; infinity for a full batch, `B = N`.

    Raises:
        ValueError: a batch size below 1, or above the number of samples.

    Example:
        >>> from lowdim.diagnose import effective_batch
        >>> effective_batch(50), effective_batch(50, 100), effective_batch(100, 100)
        (50.0, 100.0, inf)

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """
    check_int("batch_size", batch_size, 1)
    if n_data is None or n_data == math.inf:
        return float(batch_size)
    check_float("n_data", n_data, 1)
    if batch_size > n_data:
        raise ValueError(f"batch_size must be at most n_data={n_data:g}, the number of samples; got {batch_size}")
    return math.inf if batch_size == n_data else 1.0 / (1.0 / batch_size - 1.0 / n_data)


def batch_extremes(
    largest: float,
    smallest: float,
    variance: float,
    n_params: int,
    batch_size: int,
    *,
    n_data: float | None = None,
    kind: str = "hessian",
) -> BatchExtremes:
    """The extreme eigenvalues of a batch's Hessian, from those of the whole data and the noise of one sample.

    Formula: `H_B = H + E`, `E` a Wigner matrix with entries of variance `s²/b`; `q = P/b`, `e = √(q s²)`.
    `largest_B = λ + q s²/λ` if `λ > e`, else `2e`; `smallest_B` the same with the sign turned. For `kind="ggn"` the noise is
    Marchenko-Pastur's: `largest_B = λ (1 + q s²/(λ − s²))` if `λ > s² (1 + √q)`, else `s² (1 + √q)²`; `smallest_B = 0`.

    Args:
        largest, smallest: eigenvalues over all data.
        variance: `s²`, of an entry of one sample's Hessian, >= 0 (`hessian_variance`).
        n_params: `P`, >= 1.
        batch_size: `B`, >= 1.
        n_data: number of samples, see `effective_batch`. Without it a full batch still shows noise.
        kind: "hessian" or "ggn" (Gauss-Newton).

    Raises:
        ValueError: a value out of range, an unknown kind.

    Example:
        >>> from lowdim.diagnose import batch_extremes
        >>> batch_extremes(6.0, -5.0, 0.4, 400, 50)
        BatchExtremes(largest=6.533333333333333, smallest=-5.64, spiked=True)

    Noise of real networks is no Wigner matrix: it is low-rank and aligned with the outliers, so at small batches the largest
    eigenvalue is above this one. `batch_spectrum` measures both.

    Source: Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural
    Network Training", JMLR 23 (173), 2022, arXiv 2006.09092; Gauss-Newton: the spiked covariance model.
    """
    check_float("largest", largest)
    check_float("smallest", smallest)
    check_float("variance", variance, 0.0)
    check_int("n_params", n_params, 1)
    check_choice("kind", kind, KINDS)
    b = effective_batch(batch_size, n_data)
    gauss_newton = kind == "ggn"
    if b == math.inf or variance == 0.0:  # no noise
        return BatchExtremes(float(largest), 0.0 if gauss_newton else float(smallest), True)
    q = n_params / b
    if gauss_newton:
        spiked = largest > variance * (1.0 + math.sqrt(q))
        top = largest * (1.0 + q * variance / (largest - variance)) if spiked else variance * (1.0 + math.sqrt(q)) ** 2
        return BatchExtremes(top, 0.0, spiked)
    e = math.sqrt(q * variance)
    top = largest + e * e / largest if largest > e else 2.0 * e
    low = smallest + e * e / smallest if smallest < -e else -2.0 * e
    return BatchExtremes(top, low, largest > e)


def max_lr(
    largest: float,
    variance: float,
    n_params: int,
    batch_size: int,
    *,
    n_data: float | None = None,
    optimizer: str = "sgd",
) -> float:
    """The largest stable learning rate for a batch size.

    Formula: SGD `2/largest_B`, with `largest_B` of `batch_extremes`; Adam `1/√(P s²/b)`, since preconditioning removes the
    outliers and leaves the noise.

    Args:
        largest, variance, n_params, batch_size, n_data: as in `batch_extremes`.
        optimizer: "sgd" or "adam".

    Returns:
        The rate; infinity where nothing limits it: Adam with a full batch, or no positive curvature.

    Raises:
        ValueError: a value out of range, an unknown optimizer.

    Example:
        >>> from lowdim.diagnose import max_lr
        >>> [round(max_lr(1.0, 0.01, 10_000, size), 4) for size in (8, 32, 128, 512)]  # flat in the end
        [0.2828, 0.5657, 1.1228, 1.6732]

    It is an upper estimate at small batches, see `batch_extremes`.

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    b = effective_batch(batch_size, n_data)
    extremes = batch_extremes(largest, 0.0, variance, n_params, batch_size, n_data=n_data)
    edge = math.sqrt(n_params * variance / b)
    limit, steepest = (1.0, edge) if optimizer == "adam" else (2.0, extremes.largest)
    return limit / steepest if steepest > 0.0 else math.inf


def scale_lr(lr: float, old_batch: int, new_batch: int, *, optimizer: str = "sgd") -> float:
    """The learning rate for another batch size: `lr · B'/B` for SGD, `lr · √(B'/B)` for Adam.

    Args:
        lr: rate at the old batch size, > 0.
        old_batch, new_batch: batch sizes, >= 1.
        optimizer: "sgd" or "adam".

    Raises:
        ValueError: a value out of range, an unknown optimizer.

    Example:
        >>> from lowdim.diagnose import scale_lr
        >>> scale_lr(0.1, 32, 128), scale_lr(0.001, 32, 128, optimizer="adam")
        (0.4, 0.002)

    The rule holds while noise dominates; SGD's rate stops growing where the curvature of the whole data does (`max_lr`).

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """
    check_float("lr", lr, 0.0, low_open=True)
    check_int("old_batch", old_batch, 1)
    check_int("new_batch", new_batch, 1)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    ratio = new_batch / old_batch
    return lr * (ratio if optimizer == "sgd" else math.sqrt(ratio))


def hessian_variance(
    full_matvec: object,
    batch_matvecs: Sequence[object],
    n_params: int,
    batch_size: int,
    *,
    n_data: float | None = None,
    probes: Tensor,  # (k, n_params)
) -> float:
    """`s²`, the variance of an entry of one sample's Hessian, from products with random vectors.

    Formula: `s² = b/P² · mean over batches and probes of ‖(H_B − H) v‖²`, `v` with independent entries ±1, so that the mean
    over probes is the squared Frobenius norm.

    Args:
        full_matvec: the Hessian over all data, whatever `lowdim.linalg.as_operator` accepts.
        batch_matvecs: those of batches.
        n_params: `P`, >= 1.
        batch_size, n_data: see `effective_batch`.
        probes: vectors, one a row.

    Returns:
        The variance; 0 for a full batch, whose noise is none.

    Raises:
        ValueError: no batch, probes of another length than `n_params`, a value out of range.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import hessian_variance
        >>> noise = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> hessian_variance(torch.eye(2), [torch.eye(2) + noise], 2, 3, probes=torch.ones(1, 2))
        6.0

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """
    check_int("n_params", n_params, 1)
    b = effective_batch(batch_size, n_data)
    if not isinstance(probes, Tensor) or probes.ndim != 2 or probes.shape[1] != n_params or not len(probes):
        shape = tuple(probes.shape) if isinstance(probes, Tensor) else type(probes).__name__
        raise ValueError(f"probes must be (k, {n_params}), a vector of n_params numbers in each row; got {shape}")
    if not batch_matvecs:
        raise ValueError("batch_matvecs must hold at least one batch; got none")
    if b == math.inf:
        return 0.0
    full, batches = as_operator(full_matvec, n_params), [as_operator(each, n_params) for each in batch_matvecs]
    total = torch.zeros((), dtype=torch.float64)
    for probe in probes.to(torch.promote_types(probes.dtype, full.dtype or probes.dtype)):
        mean = full(probe)
        for batch in batches:
            total += (batch(probe) - mean).double().square().sum().cpu()
    return float(total) * b / n_params**2 / (len(batches) * len(probes))
