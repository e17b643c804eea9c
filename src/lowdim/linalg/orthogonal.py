"""Orthogonal matrices from parameters that gradient steps may move anywhere: the Cayley map, and Householder reflectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg.leading import has_numbers
from lowdim.linalg.svd import compute_dtype
from lowdim.linalg.wide import without_autocast

__all__ = ["cayley", "cayley_inverse", "cayley_signs", "householder_product", "householder_vectors"]

#: Reflectors that are applied together.
_TOGETHER = 32
#: Squared lengths of reflectors outside of this and its reciprocal are brought near 1 first.
_TINY = 1e-15


def cayley(
    raw: Tensor,  # (..., d, d)
) -> Tensor:
    """The orthogonal matrix of a free one; differentiable.

    Formula: `S = X - Xᵀ`, `U = (I - S/2)⁻¹ (I + S/2)`. The determinant of U is 1, and no eigenvalue is -1. It is computed in
    float64 (float32 where the device has none) and has the dtype of `raw`.

    Returns:
        `(..., d, d)`.

    Example:
        >>> import torch
        >>> from lowdim.linalg import cayley
        >>> cayley(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))  # S = [[0, -2], [2, 0]]: a quarter turn
        tensor([[ 0., -1.],
                [ 1.,  0.]])

    Source: Cayley, "Sur quelques propriétés des déterminants gauches", J. reine angew. Math. 32, 1846.
    """
    wide = raw.to(_dtype(raw))
    half = (wide - wide.mT) / 2
    eye = torch.eye(raw.shape[-1], dtype=wide.dtype, device=raw.device)
    return torch.linalg.solve(eye - half, eye + half).to(raw.dtype)


def cayley_inverse(
    matrix: Tensor,  # (..., d, d), orthogonal
) -> Tensor:
    """The strictly lower triangular `X` with `cayley(X) = U`.

    Formula: `S = 2 (U - I)(U + I)⁻¹`, X the part of S below its diagonal.

    Returns:
        `(..., d, d)`, in the dtype of `matrix`, computed as in `cayley`.

    Raises:
        ValueError: U has an eigenvalue -1, which no X reaches. Multiply its columns by `cayley_signs(U)` first.

    Example:
        >>> import torch
        >>> from lowdim.linalg import cayley, cayley_inverse
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> cayley_inverse(turn), bool(torch.equal(cayley(cayley_inverse(turn)), turn))
        (tensor([[0., 0.],
                [2., 0.]]), True)

    Source: as `cayley`.
    """
    wide = matrix.detach().to(_dtype(matrix))
    eye = torch.eye(matrix.shape[-1], dtype=wide.dtype, device=matrix.device)
    skew, failed = torch.linalg.solve_ex((wide + eye).mT, (wide - eye).mT)  # (U - I)(U + I)⁻¹, transposed
    skew = 2 * skew.mT
    bad = failed.ne(0) | ~torch.isfinite(skew).flatten(-2).all(-1) | (skew.abs().amax((-2, -1)) > 1e12)
    if bool(bad.any()):
        raise ValueError(
            "matrix has an eigenvalue -1, which the Cayley map does not reach; multiply by cayley_signs(matrix) first"
        )
    return skew.tril(-1).to(matrix.dtype)


def cayley_signs(
    matrix: Tensor,  # (..., d, d), orthogonal
) -> Tensor:
    """Signs of columns with which an orthogonal matrix is well inside the reach of the Cayley map.

    Formula: Gaussian elimination of `U D + I` with `D = diag(signs)`, each sign chosen so that its pivot is `1 + |u|`, `u` the
    entry of U that is left on the diagonal. Thus `det(U D + I) >= 1`: no eigenvalue is -1, and the determinant of `U D` is 1.
    The span of any number of leading columns does not change.

    Returns:
        `(..., d)` of 1 and -1, in float64 (float32 where the device has none).

    Example:
        >>> import torch
        >>> from lowdim.linalg import cayley_signs
        >>> cayley_signs(torch.diag(torch.tensor([1.0, -1.0]))).tolist()
        [1.0, -1.0]

    Source: O'Dorney, "Minimizing the Cayley transform of an orthogonal matrix by multiplying by signature matrices",
    Linear Algebra and its Applications 448, 2014.
    """
    left = matrix.detach().to(_dtype(matrix)).clone()
    size = left.shape[-1]
    signs = left.new_ones(left.shape[:-1])
    for k in range(size):
        pivot = left[..., k, k]
        signs[..., k] = torch.where(pivot < 0, -1.0, 1.0)
        factors = left[..., k + 1 :, k] * (signs[..., k] / (1 + pivot.abs()))[..., None]
        left[..., k + 1 :, k + 1 :] -= factors[..., :, None] * left[..., None, k, k + 1 :]
    return signs


def householder_product(
    v: Tensor,  # (d, m)
    columns: int | None = None,
    *,
    transpose: bool = False,
) -> Tensor:
    """The first columns of a product of Householder reflectors, or of its transpose; differentiable.

    Formula: `Q = H(v_1) H(v_2) ... H(v_m)`, `H(v) = I - 2 v vᵀ / ‖v‖²`, v_j column j. Q is orthogonal. Only directions count:
    the gradient of a column is orthogonal to it. Computed in float32 or better, in groups of reflectors: with columns Y
    they are `I - Y T Yᵀ`, `T⁻¹ = diag(Yᵀ Y) / 2 + (strictly upper part of Yᵀ Y)`. Q itself is not built.

    Args:
        v: reflectors, in the order of the product.
        columns: how many columns of the product, in [0, d]; None: all d.
        transpose: of `Qᵀ` instead.

    Returns:
        `(d, columns)`, orthonormal, in float32 or better.

    Raises:
        ValueError: another shape, `columns` out of range, a column of v that is zero or not finite.

    Example:
        >>> import torch
        >>> from lowdim.linalg import householder_product
        >>> householder_product(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), 1)
        tensor([[ 0.2800],
                [-0.9600]])

    Source: Schreiber and Van Loan, "A storage-efficient WY representation for products of Householder transformations", SIAM J.
    Sci. Stat. Comput. 10, 1989.
    """
    if v.ndim != 2:
        raise ValueError(f"v must have shape (d, m), a reflector in each column; got {tuple(v.shape)}")
    size, count = v.shape
    columns = size if columns is None else columns
    check_int("columns", columns, 0, size)
    with without_autocast(v.device.type):
        wide = v.to(compute_dtype(v.dtype))
        found = torch.eye(size, columns, dtype=wide.dtype, device=v.device)
        if not count:
            return found
        together = min(_TOGETHER, count)
        spare = -count % together
        if spare:
            wide = torch.nn.functional.pad(wide, (0, spare))  # a column of zeros reflects nothing
        Y = wide.view(size, -1, together).movedim(1, 0).contiguous()  # (groups, d, together)
        gram = Y.mT @ Y
        if has_numbers(v):
            squares = gram.detach().diagonal(dim1=1, dim2=2).flatten()[:count]
            if not bool(((squares > _TINY) & (squares < 1 / _TINY)).all()):  # NaN, too
                return householder_product(_rescaled(v), columns, transpose=transpose)
        inverse = gram.triu(1) + torch.diag_embed(_halves(gram, spare))
        T = torch.linalg.solve_triangular(inverse, torch.eye(together, dtype=wide.dtype, device=v.device), upper=True)
        pairs = list(zip(Y.unbind(), (T.mT if transpose else T).unbind(), strict=True))
        for reflectors, middle in pairs if transpose else reversed(pairs):
            found = torch.addmm(found, reflectors, middle @ (reflectors.mT @ found), alpha=-1)
        return found


def _halves(gram: Tensor, spare: int) -> Tensor:
    """Half of the squared lengths, and anything but 0 for the last columns, which are there to fill a group."""
    halves = gram.diagonal(dim1=1, dim2=2) / 2
    if spare:
        filled = torch.zeros_like(halves)
        filled[-1, -spare:] = 1.0
        halves = halves + filled
    return halves


def _rescaled(v: Tensor) -> Tensor:
    """The same directions at lengths whose squares have their full precision.

    Raises:
        ValueError: a column that is zero or not finite.
    """
    largest = v.detach().abs().amax(0) if len(v) else v.detach().new_zeros(v.shape[1])
    bad = ~torch.isfinite(largest) | (largest == 0)
    if bool(bad.any()):
        column = int(bad.nonzero()[0])
        what = "is zero" if float(largest[column]) == 0 else "has NaN or infinite entries"
        raise ValueError(f"column {column} of v {what}; a reflector needs a direction")
    return v.to(compute_dtype(v.dtype)) / largest


@torch.no_grad()
def householder_vectors(
    q: Tensor,  # (d, r), orthonormal columns
) -> tuple[Tensor, Tensor]:
    """Reflectors whose product has given columns, up to signs: `q = householder_product(v)[:, :r] * signs`.

    Column j of v is 0 above row j and 1 at row j: `x + sign(x_1) ‖x‖ e_1`, which cannot cancel, for the part x that is left of
    a column, scaled.

    Returns:
        `v (d, r)` and `signs (r,)` of 1 and -1, in float32 or better.

    Raises:
        ValueError: another shape, more columns than rows, columns that are not orthonormal.

    Example:
        >>> import torch
        >>> from lowdim.linalg import householder_product, householder_vectors
        >>> q = torch.linalg.qr(torch.randn(5, 2)).Q
        >>> v, signs = householder_vectors(q)
        >>> bool(torch.allclose(householder_product(v, 2) * signs, q, atol=1e-6))
        True

    Source: Golub and Van Loan, "Matrix Computations", section 5.2.
    """
    if q.ndim != 2 or q.shape[1] > q.shape[0]:
        raise ValueError(f"q must have shape (d, r) with r <= d; got {tuple(q.shape)}")
    wide = q.detach().to(compute_dtype(q.dtype))
    eye = torch.eye(*q.shape, dtype=wide.dtype, device=q.device)
    if not has_numbers(q):
        return torch.empty_like(wide), torch.empty_like(wide[0])
    error = (wide.mT @ wide - eye[: q.shape[1]]).abs()
    if not bool((error <= 64 * torch.finfo(q.dtype).eps * max(len(q), 1) ** 0.5).all()):
        raise ValueError(f"q must have orthonormal columns; qᵀ q is up to {float(error.max()):.3g} from the identity")
    left, v, signs = wide.clone(), torch.zeros_like(wide), torch.ones_like(wide[0])
    for j in range(q.shape[1]):
        x = left[j:, j]
        sign = torch.where(x[0] < 0, -1.0, 1.0).to(x.dtype)
        column = x / (x[0] + sign * torch.linalg.vector_norm(x))
        column[0] = 1.0
        left[j:, j:] -= column[:, None] * (column[None] @ left[j:, j:]) * (2 / column.square().sum())
        v[j:, j], signs[j] = column, -sign
    return v, signs


def _dtype(tensor: Tensor) -> torch.dtype:
    return compute_dtype(tensor.dtype) if tensor.device.type == "mps" else torch.float64
