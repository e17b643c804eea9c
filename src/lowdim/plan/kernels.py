"""Memory that CPU kernels allocate and free inside one operation, which no tensor shows.

Measured by the allocator's record for torch 2.13 (`tests/plan/test_kernels.py` repeats it): a decomposition copies its
input; a convolution keeps a second, blocked layout of its output, and in the backward pass of its inputs. Attention's
buffers depend on the number of threads and not on the model; they are left out, as are bytes below a matrix's size.
"""

from __future__ import annotations

from typing import Any

import torch

import lowdim.linalg  # noqa: F401 (registers its operations)

__all__ = ["hidden_bytes"]

_aten = torch.ops.aten


def _svd(args: Any, out: Any) -> int:
    return args[0].nbytes


def _eigh(args: Any, out: Any) -> int:
    return 2 * args[0].nbytes


def _pointwise(weight: Any) -> bool:
    return all(size == 1 for size in weight.shape[2:])


def _convolution(args: Any, out: Any) -> int:
    return 0 if _pointwise(args[1]) else out.nbytes


def _convolution_backward(args: Any, out: Any) -> int:
    gradient, source, weight = args[:3]
    return 0 if _pointwise(weight) else gradient.nbytes + source.nbytes


def _fastfood(args: Any, out: Any) -> int:
    """Two vectors as long as the draws; the output reuses part of them."""
    gaussian = args[3]
    return 2 * gaussian.numel() * max(4, out.element_size()) - out.nbytes


def _reduce_scatter(args: Any, out: Any) -> int:
    """Gloo sums a copy of the whole input, of which it keeps a part."""
    return args[1].nbytes


_HIDDEN = {
    torch.ops.lowdim.fastfood: _fastfood,
    torch.ops.lowdim.fastfood_transpose: _fastfood,
    _aten._linalg_svd: _svd,
    _aten._linalg_eigh: _eigh,
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
}
if torch.distributed.is_available():
    _HIDDEN[torch.ops.c10d._reduce_scatter_base_] = _reduce_scatter


def hidden_bytes(func: Any, args: Any, out: Any) -> int:
    """The bytes that this operation allocates besides its outputs, on a CPU."""
    rule = _HIDDEN.get(func._overloadpacket)
    return 0 if rule is None else rule(args, out)
