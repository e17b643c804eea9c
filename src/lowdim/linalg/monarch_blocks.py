"""The second factor of a Monarch product on a CPU: blocks of rows, sorted in the cache by torch's channel shuffle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowdim.linalg.eager import is_eager

__all__ = ["in_blocks", "second", "second_backward"]

#: Entries of a block: it is sorted in the cache of one core.
_ENTRIES = 2**17
#: Rows of a block in the backward pass, at least: products of fewer are slow.
_ROWS = 256
#: Entries of a result from which blocks are faster in the forward pass, and rows from which they are in the backward pass.
_LARGE, _MANY = 2**20, 512
#: Sums over blocks would be rounded too often in 16 bits.
_DTYPES = (torch.float32, torch.float64)
#: The last one stands for a plain tensor in forecasts, which count what is done here.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def in_blocks(rows: int, columns: int, *tensors: Tensor | None, backward: bool = False) -> bool:
    """Whether a result of this size is worth it, these are plain tensors of a CPU, and nothing records what is done."""
    least = max(_ENTRIES, _MANY * columns) if backward else _LARGE
    if rows * columns < least or torch.is_grad_enabled():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in _PLAIN for tensor in given)
        and given[0].device.type == "cpu"
        and given[0].dtype in _DTYPES
        and all(tensor.dtype == given[0].dtype for tensor in given)
        and is_eager()
    )


def second(
    hidden: Tensor,  # (l, r, T)
    w2: Tensor,  # (l, s, r)
    bias: Tensor | None,  # (s l,)
) -> Tensor:
    """`(T, s l)`, in the memory of the products themselves: a second matrix of that size costs more time than they do."""
    (l, s, _), rows = w2.shape, hidden.shape[2]
    y = w2.new_empty(rows, l * s)
    torch.bmm(hidden.mT, w2.mT, out=y.view(rows, l, s).transpose(0, 1))
    for part in y.split(max(1, _ENTRIES // (l * s))):
        mixed = _shuffled(part, l)
        part.copy_(mixed) if bias is None else torch.add(mixed, bias, out=part)
    return y


def second_backward(
    grad: Tensor,  # (T, s l)
    hidden: Tensor | None,  # (l, r, T)
    w2: Tensor | None,  # (l, s, r)
    classes: int,
    wants_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `hidden` (where there is `w2`), of `w2` (where there is `hidden`), and of the bias."""
    rows, s = grad.shape[0], grad.shape[1] // classes
    size = max(_ROWS, 2 * _ENTRIES // grad.shape[1])
    grad_hidden = None if w2 is None else grad.new_empty(w2.shape[2], classes, rows).transpose(0, 1)
    grad_w2 = grad_bias = None
    for start in range(0, rows, size):
        part = grad[start : start + size].contiguous()
        by_class = _shuffled(part, s).view(-1, classes, s).transpose(0, 1)  # (l, T, s)
        if w2 is not None and grad_hidden is not None:
            torch.bmm(w2.mT, by_class.mT, out=grad_hidden[:, :, start : start + size])
        if hidden is not None:
            some = hidden[:, :, start : start + size]
            grad_w2 = torch.bmm(some, by_class) if grad_w2 is None else grad_w2.baddbmm_(some, by_class)
        if wants_bias:
            one = part.sum(0)
            grad_bias = one if grad_bias is None else grad_bias.add_(one)
    return grad_hidden, None if grad_w2 is None else grad_w2.mT.contiguous(), grad_bias


def _shuffled(
    x: Tensor,  # (T, groups c), contiguous
    groups: int,
) -> Tensor:
    """The transpose `(T, c groups)` of each row's matrix `(groups, c)`, by a kernel that is made for it."""
    rows, columns = x.shape
    images = x.view(rows, 1, 1, columns).permute(0, 3, 1, 2)  # channels last
    return torch.channel_shuffle(images, groups).permute(0, 2, 3, 1).reshape(rows, columns)
