"""Symmetric or general square matrices that are known only by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import MissingExtraError, check_int

__all__ = ["Operator", "as_operator"]


class Operator:
    """A square matrix `(n, n)` as the function that multiplies it with a vector.

    Vectors may be tensors or numpy arrays, `(n,)` or `(n, k)` with a vector in each column; the answer is of the same kind,
    dtype and device. `matvec(v)`, `operator(v)` and `operator @ v` are the same.

    Args:
        product: `(n,)` tensor -> `(n,)` tensor.
        n: rows and columns, >= 1.
        dtype: the floating-point type in which `product` computes: vectors are converted to it and back. None: any.
        device: where `product` computes; None: anywhere.

    Attributes:
        n: rows and columns; shape: `(n, n)`.
        products: how many vectors have been multiplied so far.

    Raises:
        ValueError: at a product: a vector of another length, or an answer of another shape.

    Example:
        >>> import torch
        >>> from lowdim.linalg import Operator
        >>> twice = Operator(lambda v: 2 * v, 3)
        >>> twice @ torch.ones(3), twice.products
        (tensor([2., 2., 2.]), 1)
    """

    def __init__(
        self,
        product: Callable[[Tensor], Any],
        n: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        check_int("n", n, 1)
        self.n, self.shape, self.dtype = n, (n, n), dtype
        self.device = None if device is None else torch.device(device)
        self.products = 0
        self._product = product

    def matvec(self, vector: Any) -> Any:
        """The product with `vector`, `(n,)` or `(n, k)`."""
        if not isinstance(vector, Tensor):
            array = np.asarray(vector)
            given = torch.from_numpy(np.ascontiguousarray(array if array.dtype.kind == "f" else array.astype(np.float64)))
            return self.matvec(given).numpy()
        if vector.ndim not in (1, 2) or len(vector) != self.n:
            raise ValueError(f"a vector must have length {self.n}; got shape {tuple(vector.shape)}")
        if vector.ndim == 2:
            columns = [self.matvec(vector[:, i]) for i in range(vector.shape[1])]
            return torch.stack(columns, 1) if columns else vector.clone()
        self.products += 1
        found = self._product(vector.to(device=self.device, dtype=self.dtype))
        if not isinstance(found, Tensor):
            found = torch.as_tensor(np.asarray(found))
        if found.shape != vector.shape:
            raise ValueError(f"the operator must give vectors of length {self.n}; got shape {tuple(found.shape)}")
        return found.detach().to(vector)

    __call__ = matvec
    __matmul__ = matvec

    def as_linear_operator(self) -> Any:
        """The matrix, taken as symmetric, as scipy's `LinearOperator`: `eigsh` and `lobpcg` run on it.

        Raises:
            MissingExtraError: scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise MissingExtraError("scipy", "science", "Operator.as_linear_operator") from error
        dtype = np.float32 if self.dtype is not None and self.dtype.itemsize <= 4 else np.float64
        product = lambda v: self.matvec(np.asarray(v, dtype).reshape(self.n))  # noqa: E731
        options: Any = {"matvec": product, "rmatvec": product, "dtype": np.dtype(dtype)}
        return LinearOperator(self.shape, **options)


def as_operator(
    source: Any,
    n: int | None = None,
) -> Operator:
    """An `Operator` from whatever multiplies vectors.

    Args:
        source: a dense or sparse tensor, a numpy array, a scipy sparse array, a scipy `LinearOperator`, an object with
            `.matvec` (hessian-eigenthings), one with `.shape` and `@` on tensors (curvlinops), a function of tensors, or an
            `Operator`, which is returned unchanged.
        n: rows and columns, >= 1; required for a function, and compared with the source's own where it has one.

    Returns:
        The operator. Nothing is copied, and products are computed when they are asked for.

    Raises:
        ValueError: a source that is not square or of another size than `n`, a function without `n`, a sharded tensor.
        TypeError: a source that multiplies nothing.

    Example:
        >>> import numpy as np, torch
        >>> from lowdim.linalg import as_operator
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> as_operator(matrix) @ torch.tensor([1.0, 0.0]), as_operator(matrix.numpy()) @ np.array([1.0, 0.0])
        (tensor([2., 1.]), array([2., 1.]))
        >>> as_operator(lambda v: v.flip(0), 2) @ torch.tensor([1.0, 0.0])
        tensor([0., 1.])
    """
    if n is not None:
        check_int("n", n, 1)
    size = _size(source)
    if size is None and n is None:
        if not callable(source):
            raise TypeError(f"a matrix, an object with .matvec or a function is needed; got {type(source).__name__}")
        raise ValueError("n must be given for a function: it does not say how long its vectors are")
    if size is not None and n is not None and size != n:
        raise ValueError(f"the operator must be ({n}, {n}); got {(size, size)}")
    if isinstance(source, Operator):
        return source
    length = n if size is None else size
    assert length is not None
    if isinstance(source, Tensor):
        if hasattr(source, "full_tensor"):
            raise ValueError("the matrix is sharded over processes: gather it first")
        matrix = source.detach() if source.is_floating_point() else source.to(torch.float64)
        return Operator(lambda v: matrix @ v, length, dtype=matrix.dtype, device=matrix.device)
    if isinstance(source, np.ndarray):
        return as_operator(torch.from_numpy(np.ascontiguousarray(source)), n)
    own = getattr(source, "dtype", None)
    multiply = _product_of(source)
    if isinstance(own, np.dtype) or (own is None and _is_scipy(source)):  # numpy on its side
        dtype = torch.float32 if own is not None and own.itemsize <= 4 and own.kind == "f" else torch.float64
        return Operator(lambda v: multiply(v.numpy()), length, dtype=dtype, device="cpu")
    device = getattr(source, "device", None)
    return Operator(
        multiply,
        length,
        dtype=own if isinstance(own, torch.dtype) else None,
        device=device if isinstance(device, (torch.device, str)) else None,
    )


def _size(source: Any) -> int | None:
    """The side of a square source, if it says so."""
    shape = getattr(source, "shape", None)
    if shape is None:
        size = getattr(source, "size", None) if callable(getattr(source, "matvec", None)) else None
        return size if isinstance(size, int) and not isinstance(size, bool) else None
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"the operator must be a square matrix; got shape {tuple(shape)}")
    return int(shape[0])


def _product_of(source: Any) -> Callable[[Any], Any]:
    if callable(getattr(source, "matvec", None)):
        return source.matvec
    if hasattr(source, "shape") and callable(getattr(source, "__matmul__", None)):
        return source.__matmul__
    if not callable(source):
        raise TypeError(f"a matrix, an object with .matvec or a function is needed; got {type(source).__name__}")
    return source


def _is_scipy(source: Any) -> bool:
    return any(base.__module__.partition(".")[0] == "scipy" for base in type(source).__mro__)
