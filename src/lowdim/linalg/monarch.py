"""Products with Monarch matrices: two block-diagonal factors with a fixed permutation between them and after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.linalg.monarch_blocks import in_blocks, second, second_backward
from lowdim.linalg.svd import svd

__all__ = ["monarch_dense", "monarch_multiply", "monarch_project"]

_FEW = 16


def monarch_multiply(
    x: Tensor,  # (..., k p)
    w1: Tensor,  # (k, q, p)
    w2: Tensor,  # (l, s, r) with l r = k q
    bias: Tensor | None = None,  # (l s,)
) -> Tensor:
    """`W x + bias` for the Monarch matrix `W (l s, k p)` of two factors, without building it.

    Formula: `h[a q + c] = w1[a, c] · x[a p : (a + 1) p]`, `y[e l + b] = Σ_j w2[b, e, j] h[j l + b] + bias[e l + b]`.

    Args:
        x: real or complex rows; any leading dimensions.
        w1: one block for each consecutive piece of the input.
        w2: one block for each class of channels that are equal modulo `l`.
        bias: None adds nothing.

    Returns:
        `(..., l s)`, contiguous. The backward pass keeps `x`, the factors and `h`, nothing else.

    Raises:
        ValueError: the factors do not chain, `x` has another number of features, or `bias` another number of entries.

    Example:
        >>> import torch
        >>> from lowdim.linalg import monarch_multiply
        >>> monarch_multiply(torch.ones(5, 6), torch.ones(2, 4, 3), torch.ones(4, 2, 2)).shape
        torch.Size([5, 8])

    Source: Dao et al., "Monarch", ICML 2022, arXiv 2204.00595.
    """
    _check_chain(w1.shape, w2.shape)
    features = w1.shape[0] * w1.shape[2]
    if x.shape[-1] != features:
        raise ValueError(
            f"x must have {features} features in its last dimension for w1 {tuple(w1.shape)}; got {tuple(x.shape)}"
        )
    out_features = w2.shape[0] * w2.shape[1]
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},) for w2 {tuple(w2.shape)}; got {tuple(bias.shape)}")
    x, w1, w2 = _autocast(x, w1, w2)
    bias = None if bias is None else bias.to(w2.dtype)
    return _multiply(x.reshape(-1, features), w1, w2, bias).view(*x.shape[:-1], out_features)


def monarch_dense(
    w1: Tensor,  # (k, q, p)
    w2: Tensor,  # (l, s, r)
) -> Tensor:
    """The dense equivalent `(l s, k p)` of two factors, differentiable.

    Example:
        >>> import torch
        >>> from lowdim.linalg import monarch_dense
        >>> monarch_dense(torch.ones(2, 2, 3), torch.ones(2, 4, 2)).shape
        torch.Size([8, 6])

    Source: Dao et al., "Monarch", ICML 2022, arXiv 2204.00595.
    """
    _check_chain(w1.shape, w2.shape)
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    hidden = torch.block_diag(*w1)  # (k q, k p): the first factor applied to the unit vectors
    classes = torch.bmm(w2, hidden.view(r, l, k * p).transpose(0, 1))  # (l, s, k p)
    return classes.transpose(0, 1).reshape(l * s, k * p)


def monarch_project(
    m: Tensor,  # (l s, k p)
    w1_shape: tuple[int, int, int],  # (k, q, p)
    w2_shape: tuple[int, int, int],  # (l, s, r)
) -> tuple[Tensor, Tensor]:
    """The Monarch matrix nearest to `m` in the Frobenius norm.

    Formula: the rows `b::l` and the columns of piece `a` form a block whose channels `t` with `t // q = a`,
    `t mod l = b` belong to no other block; its truncated SVD goes half (`√S`) into each factor.

    Returns:
        `w1`, `w2` in the dtype of `m` (the SVDs run in float32 or better). They are unique only up to scale and sign within
        a channel: compare `monarch_dense(w1, w2)`.

    Raises:
        ValueError: shapes that do not chain or do not fit `m`, NaN or infinity in `m`.

    Example:
        >>> import torch
        >>> from lowdim.linalg import monarch_dense, monarch_project
        >>> m = monarch_dense(torch.randn(2, 4, 3), torch.randn(4, 2, 2))
        >>> bool(torch.allclose(monarch_dense(*monarch_project(m, (2, 4, 3), (4, 2, 2))), m, atol=1e-5))
        True

    Source: Dao et al., "Monarch", ICML 2022, arXiv 2204.00595.
    """
    _check_chain(w1_shape, w2_shape)
    (k, q, p), (l, s, r) = w1_shape, w2_shape
    if tuple(m.shape) != (l * s, k * p):
        raise ValueError(
            f"m must have shape {(l * s, k * p)} for factors {tuple(w1_shape)}, {tuple(w2_shape)}; got {tuple(m.shape)}"
        )
    u, singular, vh = svd(m.view(s, l, k, p).permute(2, 1, 0, 3))  # (k, l, s, d), (k, l, d), (k, l, d, p)
    channel = torch.arange(k * q, device=m.device)
    piece, row_class, place = channel // q, channel % l, (channel % q) // l
    held = place < singular.shape[-1]  # channels beyond the rank of their block stay zero
    a, b, i = piece[held], row_class[held], place[held]
    root = singular[a, b, i].sqrt()[:, None]
    w1 = vh.new_zeros(k * q, p)
    w1[held] = root * vh[a, b, i]
    w2 = u.new_zeros(l, r, s)
    w2[b, channel[held] // l] = root * u[a, b, :, i]
    return w1.view(k, q, p).to(m.dtype), w2.mT.contiguous().to(m.dtype)


def _multiply(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
    # The channels are kept outermost and the rows innermost, so that the permutation between the factors is a view that
    # BLAS accepts; only interleaving the output needs a copy.
    (l, _, r), rows = w2.shape, x.shape[0]
    if not torch.is_grad_enabled():  # an autograd.Function takes as long as a small product
        return _Second.forward(_First.forward(x, w1).view(r, l, rows).transpose(0, 1), w2, bias)
    return _Second.apply(_First.apply(x, w1).view(r, l, rows).transpose(0, 1), w2, bias)


class _First(torch.autograd.Function):
    """`(T, k p), (k, q, p) -> (k, q, T)`. Written out because autograd's own backward would leave the gradient transposed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w1: Tensor) -> Tensor:
        return torch.bmm(w1, _pieces(x, w1).mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, w1 = inputs
        wants_x, wants_w1 = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_w1 else None, w1 if wants_x else None)
        ctx.shape = x.shape, w1.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, w1) = grads, ctx.saved_tensors
        k, _, p = ctx.shape[1]
        grad_x = grad_w1 = None
        if w1 is not None and in_blocks(grad.shape[2], k * p, grad, w1, backward=True):
            grad_x = grad.new_empty(ctx.shape[0])
            torch.bmm(grad.mT, w1, out=grad_x.view(-1, k, p).transpose(0, 1))
        elif w1 is not None:
            grad_x = torch.bmm(grad.mT, w1.conj()).transpose(0, 1).reshape(ctx.shape[0])
        if x is not None:
            grad_w1 = torch.bmm(grad, x.reshape(-1, k, p).transpose(0, 1).conj())
        return grad_x, grad_w1


class _Second(torch.autograd.Function):
    """`(l, r, T), (l, s, r), (s l,) -> (T, s l)`. Written out so that the output's gradient is sorted by class once only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
        rows, features = hidden.shape[2], w2.shape[0] * w2.shape[1]
        if in_blocks(rows, features, hidden, w2, bias):
            return second(hidden, w2, bias)
        # BLAS is slow where the first matrix has few rows.
        by_class = torch.bmm(w2, hidden).mT if rows <= _FEW else torch.bmm(hidden.mT, w2.mT)  # (l, T, s)
        y = by_class.permute(1, 2, 0).reshape(rows, features).contiguous()
        return y if bias is None else y.add_(bias)  # y is new, or a view of what is

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        hidden, w2, _ = inputs
        wants_hidden, wants_w2, ctx.wants_bias = ctx.needs_input_grad
        ctx.save_for_backward(hidden if wants_w2 else None, w2 if wants_hidden else None)
        ctx.shape = hidden.shape[2], w2.shape[1], w2.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (hidden, w2) = grads, ctx.saved_tensors
        if in_blocks(len(grad), grad.shape[1], grad, hidden, w2, backward=True):
            return second_backward(grad, hidden, w2, ctx.shape[2], ctx.wants_bias)
        by_class = grad.reshape(ctx.shape).mT.contiguous().transpose(0, 1)  # (l, T, s), sorted within each row
        grad_hidden = None if w2 is None else torch.bmm(w2.mT.conj(), by_class.mT)
        grad_w2 = None if hidden is None else torch.bmm(by_class.mT, hidden.mT.conj())
        return grad_hidden, grad_w2, grad.sum(0) if ctx.wants_bias else None


def _pieces(x: Tensor, w1: Tensor) -> Tensor:
    k, _, p = w1.shape
    return x.reshape(-1, k, p).transpose(0, 1)  # (k, T, p)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The casts that autocast applies to a plain product; inside an autograd.Function it does nothing."""
    first = tensors[0]
    kind = first.device.type
    wanted = first.is_floating_point() and first.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
    if not wanted or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _check_chain(w1_shape: Any, w2_shape: Any) -> None:
    good = len(w1_shape) == 3 and len(w2_shape) == 3 and min(*w1_shape, *w2_shape) >= 1
    if not good or w1_shape[0] * w1_shape[1] != w2_shape[0] * w2_shape[2]:
        raise ValueError(
            "factors must have shapes w1 (k, q, p) and w2 (l, s, r) with k q = l r, all at least 1; "
            f"got w1 {tuple(w1_shape)} and w2 {tuple(w2_shape)}"
        )
