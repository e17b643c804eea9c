"""Inputs of solvers as float64 torch tensors, and results in the input's kind of array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import MissingExtraError
from lowdim.linalg import Operator, as_operator

__all__ = [
    "as_given",
    "as_tensor",
    "read_indices",
    "read_matrix",
    "read_operator",
    "read_right_hand_sides",
    "read_vector",
    "stored_entries",
]


def as_tensor(array: Any) -> Tensor:
    """A tensor of a numpy array, a list or a tensor; without a copy if torch can share the memory (no negative strides)."""
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def as_given(answer: Tensor, like: Any) -> Any:
    """The result as a tensor if the argument `like` was one, else as a numpy array."""
    return answer if isinstance(like, Tensor) else answer.numpy()


def read_vector(
    name: str,
    array: Any,  # (n,)
    *,
    on_cpu: bool = True,
) -> Tensor:
    """A vector of finite numbers in float64.

    Args:
        name: of the argument, for the errors.
        on_cpu: whether it must be on the CPU.

    Raises:
        ValueError: not 1-D, not on the CPU, NaN or infinite entries. TypeError: complex numbers.
    """
    return _read(name, array, 1, on_cpu)


def read_matrix(
    name: str,
    array: Any,  # (m, n)
) -> Tensor:
    """A dense matrix of finite numbers in float64. See `read_vector`."""
    return _read(name, array, 2)


def read_indices(
    name: str,
    index: Any,  # (n,) integers
    size: int,
) -> Tensor:
    """A vector of integers in `[0, size)`, as int64.

    Raises:
        TypeError: not integers. ValueError: not 1-D, outside the range, not on the CPU.
    """
    tensor = _shaped(name, index, 1)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be integers; got {tensor.dtype}")
    tensor = tensor.to(torch.int64)
    if tensor.numel() and not (int(tensor.min()) >= 0 and int(tensor.max()) < size):
        raise ValueError(f"{name} must be in [0, {size}); got {int(tensor.min())} to {int(tensor.max())}")
    return tensor


def read_right_hand_sides(
    name: str,
    array: Any,  # (n,) or (n, k)
) -> Tensor:
    """One vector, or several in columns, as `(n, k)` of finite numbers in float64. See `read_vector`."""
    return _read(name, array, 1)[:, None] if np.ndim(array) == 1 else _read(name, array, 2)


def read_operator(
    name: str,
    source: Any,  # (n, n)
    n: int | None = None,
) -> Operator:
    """A square matrix by its products, in float64 where it holds numbers. See `lowdim.linalg.as_operator`.

    Args:
        name: of the argument, for the errors.
        n: rows and columns, if they are known.

    Raises:
        ValueError: not square, another size, NaN or infinite entries in a dense matrix. TypeError: complex numbers, something
            that multiplies no vectors.
    """
    if "complex" in str(getattr(source, "dtype", "")):
        raise TypeError(f"{name} must be real; got {source.dtype}")
    if isinstance(source, (list, tuple)):
        source = np.asarray(source)
    if isinstance(source, Tensor):
        source = source.to(torch.float64)
    elif hasattr(source, "astype"):  # numpy's and scipy's sparse arrays
        source = source.astype(np.float64, copy=False)
    try:
        operator = as_operator(source, n)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    dense = isinstance(source, np.ndarray) or (isinstance(source, Tensor) and source.layout == torch.strided)
    if dense and not bool(torch.isfinite(as_tensor(source)).all()):
        raise ValueError(f"{name} has NaN or infinite entries")
    return operator


def stored_entries(matrix: Any, purpose: str) -> tuple[Any, Any, Any, tuple[int, int]]:
    """Rows, columns and values that a scipy.sparse matrix stores (zeros among them too), and its shape.

    Args:
        purpose: what needs scipy, for the error.

    Raises:
        TypeError: not a 2-D scipy.sparse matrix. MissingExtraError: scipy is not installed.
    """
    try:
        from scipy import sparse
    except ImportError as error:
        raise MissingExtraError("scipy", "science", purpose) from error
    if not sparse.issparse(matrix) or matrix.ndim != 2:
        raise TypeError(f"matrix must be a 2-D scipy.sparse matrix; got {type(matrix).__name__}")
    coo = matrix.tocoo()
    return coo.row, coo.col, coo.data, coo.shape


def _read(name: str, array: Any, dimensions: int, on_cpu: bool = True) -> Tensor:
    tensor = _shaped(name, array, dimensions, on_cpu)
    if tensor.is_complex():
        raise TypeError(f"{name} must be real; got {tensor.dtype}")
    tensor = tensor.to(torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has NaN or infinite entries")
    return tensor


def _shaped(name: str, array: Any, dimensions: int, on_cpu: bool = True) -> Tensor:
    if on_cpu and isinstance(array, Tensor) and array.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU; got {array.device}")
    tensor = as_tensor(array)
    if tensor.ndim != dimensions:
        raise ValueError(f"{name} must be {dimensions}-D; got shape {tuple(tensor.shape)}")
    return tensor
