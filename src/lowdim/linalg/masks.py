"""Masks that keep the largest entries: N of every M, a given number in a matrix, or a given number in each row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.linalg.leading import has_numbers

__all__ = ["largest_mask", "nm_mask", "smallest_mask"]

#: Groups of up to this many entries are ordered by counting.
_COUNTED = 16


@torch.no_grad()
def nm_mask(
    weight: Tensor,  # (..., k · m, ...)
    n: int,
    m: int,
    dim: int = -1,
) -> Tensor:
    """Ones at the `n` largest magnitudes of every `m` consecutive entries along `dim`, zeros elsewhere.

    Of equal magnitudes in a group the one of lower index is dropped first.

    Returns:
        A tensor of 0 and 1 in the shape, dtype and device of `weight`.

    Raises:
        ValueError: `n` or `m` below 1, `n` above `m`, or a dimension that `m` does not divide.

    Example:
        >>> import torch
        >>> from lowdim.linalg import nm_mask
        >>> nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, 0.0, 2.0]]), 2, 4).tolist()
        [[0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]]

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", arXiv 2402.04744.
    """
    check_int("m", m, 1)
    check_int("n", n, 1, m)
    size = weight.shape[dim]
    if size % m:
        raise ValueError(
            f"dimension {dim} of a weight {tuple(weight.shape)} has {size} entries, which is not a multiple of m={m}"
        )
    groups = weight.detach().movedim(dim, -1).unflatten(-1, (size // m, m)).abs()
    if m <= _COUNTED:
        kept = (_larger(groups) < n).to(weight.dtype)
    else:
        order = groups.argsort(dim=-1, stable=True)
        kept = torch.ones_like(groups).scatter(-1, order[..., : m - n], 0.0)
    return kept.flatten(-2).movedim(-1, dim).contiguous()


def _larger(groups: Tensor) -> Tensor:
    """How many entries of its group stand before each one by size; of equal ones the higher index does. Faster than a sort."""
    entries = groups.movedim(-1, 0).contiguous()
    count = torch.zeros(entries.shape, dtype=torch.int8, device=groups.device)
    for i in range(len(entries) - 1):
        before = entries[i + 1 :] >= entries[i]
        count[i] += before.sum(0, dtype=torch.int8)
        count[i + 1 :] += ~before
    return count.movedim(0, -1)


@torch.no_grad()
def smallest_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` smallest entries of the whole tensor; of equal ones the lower index comes first.

    A selection, not a sort: its time grows linearly with the number of entries.

    Raises:
        ValueError: `count` outside [0, number of entries], or a score that is NaN.

    Example:
        >>> import torch
        >>> from lowdim.linalg import smallest_mask
        >>> smallest_mask(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), 2).tolist()
        [[False, True], [True, False]]

    Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", arXiv 2205.11005.
    """
    check_int("count", count, 0, scores.numel())
    flat = scores.detach().flatten()
    if not count or not has_numbers(flat):
        return torch.zeros_like(scores, dtype=torch.bool)
    if bool(flat.isnan().any()):
        raise ValueError("scores has NaN entries; its smallest ones are not defined")
    edge = _smallest(flat.float() if flat.dtype.itemsize < 4 else flat, count)
    taken = flat < edge
    ties = torch.nonzero(flat == edge).flatten()
    taken[ties[: count - int(torch.count_nonzero(taken))]] = True
    return taken.view(scores.shape)


@torch.no_grad()
def largest_mask(
    scores: Tensor,  # (..., k)
    count: int,
) -> Tensor:
    """True at the `count` largest entries of each row, the last dimension; of equal ones any may be chosen.

    Raises:
        ValueError: `count` outside [0, k].

    Example:
        >>> import torch
        >>> from lowdim.linalg import largest_mask
        >>> largest_mask(torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), 2).tolist()
        [[True, False, True], [False, True, True]]

    Source: "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", arXiv 2505.19427.
    """
    check_int("count", count, 0, scores.shape[-1])
    index = scores.detach().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)


def _smallest(values: Tensor, count: int) -> float:
    """The `count`-th smallest value."""
    if values.device.type == "cpu":  # numpy selects ten times faster
        return float(np.partition(values.numpy(), count - 1)[count - 1])
    return float(torch.kthvalue(values, count).values)
