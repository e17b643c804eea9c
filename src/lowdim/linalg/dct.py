"""The discrete cosine transform: its matrix, selected columns, and the transform by product or by FFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_int
from lowdim.linalg.leading import has_numbers
from lowdim.linalg.svd import compute_dtype

__all__ = ["dct", "dct_columns", "dct_matrix"]

#: From this length on an FFT beats the product with the matrix: measured on one CPU core, the paper's bound on others.
_FFT_FROM = {"cpu": 256}
_FFT_FROM_ELSEWHERE = 4096

Make = Callable[[int, torch.dtype, torch.device], Tensor]


def dct_matrix(
    n: int, *, kind: int = 2, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """The orthogonal matrix of the discrete cosine transform.

    Formula: `C[i, j] = √(2/n) cos(π i (2 j + 1) / (2 n))`, row 0 times `√(1/2)`; kind 2 is `C`, kind 3 its inverse `Cᵀ`. Rows
    of `C` are cosines of increasing frequency; `dct_matrix(n) @ x` is the DCT-II of `x`.

    Args:
        n: side.
        kind: 2 or 3.
        dtype: of the result; cosines are computed in float64 and rounded once.

    Returns:
        `(n, n)`.

    Raises:
        ValueError: n < 1, or kind neither 2 nor 3.

    Example:
        >>> from lowdim.linalg import dct_matrix
        >>> C = dct_matrix(4)
        >>> bool((C @ dct_matrix(4, kind=3) - C.new_ones(4).diag()).abs().max() < 1e-15)
        True

    Not for transforming long vectors: `dct` needs no matrix.

    Source: Ahmed, Natarajan, Rao, "Discrete Cosine Transform", IEEE Transactions on Computers, 1974.
    """
    check_int("n", n, 1)
    return dct_columns(n, torch.arange(n, device=device), kind=kind, dtype=dtype)


def dct_columns(
    n: int,
    index: Tensor,  # (r,) integers in [0, n)
    *,
    kind: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`dct_matrix(n, kind=kind)[:, index]` without the matrix, on the device of `index`.

    Formula: angles are reduced as integers, `i (2 j + 1) mod 4 n`, and looked up in a table of `4 n` cosines.

    Returns:
        `(n, r)`.

    Raises:
        ValueError: n < 1, kind neither 2 nor 3, or an index that is not a vector. Indices out of range are not checked.

    Example:
        >>> import torch
        >>> from lowdim.linalg import dct_columns, dct_matrix
        >>> torch.equal(dct_columns(8, torch.tensor([1, 5]), kind=3), dct_matrix(8, kind=3)[:, [1, 5]])
        True
    """
    check_int("n", n, 1)
    _check_kind(kind)
    if index.ndim != 1 or index.is_floating_point():
        raise ValueError(f"index must be a vector of integers; got shape {tuple(index.shape)}, {index.dtype}")
    whole = torch.int32 if n < 2**15 else torch.int64  # angles stay below 2 n²
    along, chosen = torch.arange(n, device=index.device, dtype=whole)[:, None], index.to(whole)[None, :]
    frequency, place = (chosen, along) if kind == 3 else (along, chosen)
    angle = (frequency * (2 * place + 1)).remainder_(4 * n)
    angle = torch.where(frequency == 0, 4 * n, angle)  # the constant vector has a length of its own
    return _kept(_make_cosines, n, dtype, index.device).index_select(0, angle.view(-1)).view(angle.shape)


def dct(
    x: Tensor,  # (..., n)
    *,
    kind: int = 2,
    dim: int = -1,
    method: str = "auto",
) -> Tensor:
    """The orthonormal discrete cosine transform along one dimension.

    Formula: `y = C x` for kind 2, `y = Cᵀ x` for kind 3, with `C = dct_matrix(n)`; each is the inverse of the other. By FFT:
        even places
    ascending, then odd places descending, one real FFT of length n, one twiddle.

    Args:
        x: real; half precision is transformed in float32 and rounded once.
        dim: the dimension that is transformed.
        method: `"product"` with the matrix (cached per size, dtype and device), `"fft"`, or `"auto"`: by length and device.

    Returns:
        Like x.

    Raises:
        ValueError: kind neither 2 nor 3, unknown method, no dimension or an empty one.

    Example:
        >>> import torch
        >>> from lowdim.linalg import dct
        >>> dct(torch.ones(4)).round(decimals=6).tolist()
        [2.0, 0.0, 0.0, 0.0]
        >>> x = torch.randn(3, 9, dtype=torch.float64)
        >>> bool(torch.allclose(dct(dct(x), kind=3), x))
        True

    Source: Makhoul, "A fast cosine transform in one and two dimensions", IEEE Transactions on Acoustics, Speech, and Signal
    Processing, 1980.
    """
    _check_kind(kind)
    check_choice("method", method, ("auto", "product", "fft"))
    if x.ndim < 1 or x.shape[dim] < 1:
        raise ValueError(f"x must have at least one entry along dimension {dim}; got shape {tuple(x.shape)}")
    rows = x.movedim(dim, -1).to(compute_dtype(x.dtype))
    n = rows.shape[-1]
    if method == "auto":
        method = "fft" if n >= _FFT_FROM.get(x.device.type, _FFT_FROM_ELSEWHERE) else "product"
    if method == "product":
        matrix = _kept(_make_matrix, n, rows.dtype, x.device)
        out = rows @ (matrix.mT if kind == 2 else matrix)
    else:
        out = _forward(rows) if kind == 2 else _backward(rows)
    return out.to(x.dtype).movedim(-1, dim)


def _forward(x: Tensor) -> Tensor:
    """DCT-II: one half of the coefficients are real parts, the other half imaginary parts."""
    n = x.shape[-1]
    half = n // 2 + 1
    spectrum = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    spectrum = spectrum.mul_(_kept(_make_twiddles, n, spectrum.dtype, x.device))
    return torch.cat([spectrum.real, spectrum.imag[..., 1 : n - half + 1].flip(-1).neg_()], -1)


def _backward(x: Tensor) -> Tensor:
    """DCT-III, the inverse."""
    n = x.shape[-1]
    half = n // 2 + 1
    mirrored = torch.cat([x.new_zeros((*x.shape[:-1], 1)), x[..., n - half + 1 :].flip(-1)], -1)
    spectrum = torch.complex(x[..., :half].contiguous(), mirrored.neg_())
    spectrum = spectrum.mul_(_kept(_make_twiddles_back, n, spectrum.dtype, x.device))
    ordered = torch.fft.irfft(spectrum, n=n, norm="forward")
    out = torch.empty_like(ordered)
    middle = (n + 1) // 2
    out[..., ::2] = ordered[..., :middle]
    out[..., 1::2] = ordered[..., middle:].flip(-1)
    return out


# Tables, computed in float64 on the CPU, cached per size, dtype and device; in a forecast (fake tensors) not cached.


def _kept(make: Make, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not has_numbers(torch.empty(0, device=device)):
        return make(n, dtype, device)
    return _keep(make, n, dtype, device)


@functools.lru_cache(maxsize=64)
def _keep(make: Make, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return make(n, dtype, device)


def _make_cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`√(2/n) cos(π k / (2 n))` for k < 4 n, then `√(1/n)`."""
    table = torch.arange(4 * n, dtype=torch.float64).mul_(math.pi / (2 * n)).cos_().mul_(math.sqrt(2 / n))
    return torch.cat([table, table.new_full((1,), math.sqrt(1 / n))]).to(dtype).to(device)


def _make_twiddles(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`√(2/n) exp(-iπ k / (2 n))` for the first half of the spectrum, the constant's with `√(1/n)`."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64).mul_(-math.pi / (2 * n))
    table = torch.polar(torch.full_like(angle, math.sqrt(2 / n)), angle)
    table[0] = math.sqrt(1 / n)
    return table.to(dtype).to(device)


def _make_twiddles_back(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Conjugate, with the factor that undoes the length of the first."""
    table = _make_twiddles(n, torch.complex128, torch.device("cpu")).conj().resolve_conj() / 2
    table[0] *= 2
    return table.to(dtype).to(device)


def _make_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return dct_matrix(n, dtype=dtype, device=device)


def _check_kind(kind: int) -> None:
    if kind not in (2, 3):
        raise ValueError(f"kind must be 2 (the transform) or 3 (its inverse); got {kind!r}")
