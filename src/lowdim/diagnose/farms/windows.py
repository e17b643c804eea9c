"""Windows of one aspect ratio in a weight matrix, and the eigenvalues of them all."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg import compute_dtype, widest

__all__ = ["farms_eigs", "farms_windows"]

_SMALL = 2**20  # numbers of a weight: of smaller ones, as many windows are decomposed at once as of one of this size


def farms_windows(
    shape: tuple[int, int],
    *,
    rows: int = 128,
    ratio: float = 1.0,
    windows: int | None = 9,
    step: int | None = None,
) -> tuple[list[tuple[int, int]], int, int]:
    """Where the windows of a matrix start, and their size.

    Formula: `r = min(rows, m, ⌊n / ratio⌋)`, `c = ⌊r · ratio⌋`, each at least 1. With K = windows:
    `s = max(1, ⌊(m - r) / (K - 1)⌋)`, `k = min(K, ⌊(m - r) / s⌋ + 1)`, starts `min(i · s, m - r)` for `i < k`; the same for
    columns. Without `windows`, one every `step`.

    Args:
        shape: `(m, n)` of the weight.
        rows: rows of a window, >= 1; about half the layer's smaller side. Clamped to what the layer has.
        ratio: columns over rows, > 0.
        windows: how many along each dimension, >= 1; null takes one every `step`.
        step: rows and columns from one window to the next, >= 1; used only if `windows` is null.

    Returns:
        The starts `(row, column)`, every row start with every column start; r; c.

    Raises:
        ValueError: an option out of range, or neither `windows` nor `step`.

    Example:
        >>> from lowdim.diagnose import farms_windows
        >>> farms_windows((6, 4), rows=2, windows=2)
        ([(0, 0), (0, 2), (4, 0), (4, 2)], 2, 2)

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280.
    """
    check_windows(rows, ratio, windows, step)
    m, n = shape
    check_int("rows of the weight", m, 1)
    check_int("columns of the weight", n, 1)
    r = max(1, min(rows, m, int(n / ratio)))
    c = max(1, min(int(r * ratio), n))
    down, across = (_starts(size - taken, windows, step) for size, taken in ((m, r), (n, c)))
    return [(i, j) for i in down for j in across], r, c


def _starts(room: int, windows: int | None, step: int | None) -> list[int]:
    """Starts along one dimension in which a window can move by `room`."""
    if windows == 1:
        return [0]
    if windows is None:
        assert step is not None
        return list(range(0, room + 1, step))
    stride = max(1, room // (windows - 1))
    return [min(i * stride, room) for i in range(min(windows, room // stride + 1))]


def check_windows(rows: int, ratio: float, windows: int | None, step: int | None) -> None:
    """Raise ValueError unless the options are in range."""
    check_int("rows", rows, 1)
    check_float("ratio", ratio, 0.0, low_open=True)
    if windows is not None:
        check_int("windows", windows, 1)
    elif step is None:
        raise ValueError("step must be an int >= 1 where windows is None; got None")
    if step is not None:
        check_int("step", step, 1)


@torch.no_grad()
def farms_eigs(
    weight: Tensor,  # (m, n)
    *,
    rows: int = 128,
    ratio: float = 1.0,
    windows: int | None = 9,
    step: int | None = None,
) -> Tensor:
    """The squared singular values of all windows of a matrix, joined and sorted.

    Formula: `{ σ_k(W[i : i + r, j : j + c])² }` over all windows `(i, j)` of `farms_windows`.

    Args:
        weight: `(m, n)`, any floating dtype.
        rows, ratio, windows, step: as in farms_windows.

    Returns:
        `(N,)` ascending, `N` = windows · min(r, c), in float32 (float64 stays), on the weight's device. Values of
        overlapping windows depend on each other.

    Raises:
        ValueError: a weight that is not 2-D or not finite, an option out of range.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import farms_eigs
        >>> farms_eigs(torch.diag(torch.tensor([1.0, 2.0, 3.0])), rows=2, windows=2).tolist()
        [0.0, 0.0, 1.0, 4.0, 4.0, 4.0, 4.0, 9.0]

    Costs about `10/3 K² r³` operations (float64: `8/3 K² r³`, which take longer) against `8/3 m n min(m, n)` of one full SVD.
    Windows are decomposed in batches that hold no more numbers than an eighth of the weight or 131,072 (at least one window).

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a 2-D floating-point matrix; got shape {tuple(weight.shape)}, {weight.dtype}")
    check_finite(weight)
    starts, r, c = farms_windows((weight.shape[0], weight.shape[1]), rows=rows, ratio=ratio, windows=windows, step=step)
    weight = weight.detach()
    batch = max(1, max(weight.numel(), _SMALL) // (8 * r * c))
    parts = []
    for first in range(0, len(starts), batch):
        pieces = torch.stack([weight[i : i + r, j : j + c] for i, j in starts[first : first + batch]])
        parts.append(squared_singular_values(pieces).flatten())
    return torch.cat(parts).sort().values


def squared_singular_values(matrices: Tensor) -> Tensor:
    """Those of each matrix `(..., r, c)`: `(..., min(r, c))` in any order, float32 (float64 stays).

    On the CPU those of float32 and less are eigenvalues of the smaller Gram matrix in float64: that is faster than singular
    values in float32 and nearer to the truth, since the error of a `σ` is about `1e-16 σ_max² / σ`. Squaring would lose digits
    of float64 matrices, so they are decomposed as they are.
    """
    if matrices.dtype == torch.float64 or matrices.device.type != "cpu":
        return torch.linalg.svdvals(matrices.to(compute_dtype(matrices.dtype))).square()
    exact = widest(matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT)
    return torch.linalg.eigvalsh(exact @ exact.mT).clamp_min(0).float()


def check_finite(weight: Tensor) -> None:
    """Raise ValueError if an entry is NaN or infinite; it needs no memory, as a mask would."""
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight.detach()))).all()):  # NaN is passed on
        raise ValueError("the weight has NaN or infinite entries")
