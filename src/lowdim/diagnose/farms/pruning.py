"""Pruning ratios by layer from tail exponents, and pruning by magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from lowdim.diagnose.core.weights import plain_model
from lowdim.errors import UnknownNameError, check_float, check_int, nearest
from lowdim.linalg import smallest_mask

__all__ = ["layer_factors", "prune", "pruning_ratios"]

M = TypeVar("M", bound=nn.Module)


def pruning_ratios(
    alphas: Sequence[float] | np.ndarray,  # (L,)
    sizes: Sequence[float] | np.ndarray,  # (L,)
    sparsity: float,
    *,
    epsilon: float = 0.2,
    block: int = 1,
    cap: float = 0.998,
) -> list[float]:
    """The share of each layer to prune: layers with heavier tails (smaller exponents) keep more.

    Formula: a = mean of alpha over each run of `block` layers, given to all of them;
    `q = 1 - epsilon + 2 epsilon (a - min a) / (max a - min a)`; `q ← q · sparsity · Σ sizes / Σ sizes q`, so that the share of
    all layers is `sparsity`; values above 1 become `cap`. Equal exponents: `sparsity` for all.

    Args:
        alphas: exponents in the model's order.
        sizes: numbers in each layer, > 0.
        sparsity: of all layers together, in (0, 1).
        epsilon: how far the shares may differ, in [0, 1).
        block: layers that share one value, >= 1; those of a transformer block.
        cap: what becomes of a share above 1, in (0, 1]. The total is then below `sparsity`.

    Returns:
        One share for each layer.

    Raises:
        ValueError: an argument out of range, lengths that differ, a block that does not divide them, numbers not finite.

    Example:
        >>> from lowdim.diagnose import pruning_ratios
        >>> [round(share, 2) for share in pruning_ratios([2.0, 3.0, 4.0], [10, 10, 10], 0.5)]
        [0.4, 0.5, 0.6]

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280; Lu et al., "AlphaPruning", arXiv 2410.10912.
    """
    check_float("sparsity", sparsity, 0.0, 1.0, low_open=True, high_open=True)
    check_float("cap", cap, 0.0, 1.0, low_open=True)
    q = layer_factors(alphas, sizes, epsilon=epsilon, block=block) * sparsity
    return [float(cap) if share > 1 else float(share) for share in q]


def layer_factors(
    alphas: Sequence[float] | np.ndarray,  # (L,)
    sizes: Sequence[float] | np.ndarray,  # (L,)
    *,
    epsilon: float,
    block: int = 1,
) -> np.ndarray:
    """How much more or less than the mean each layer gets: `(L,)`, rising with alpha, with the mean 1 over `sizes`.

    Formula: the `q` of `pruning_ratios`, divided by `Σ sizes q / Σ sizes`. It serves shares to prune and ranks.

    Raises:
        ValueError: as in `pruning_ratios`.
    """
    check_float("epsilon", epsilon, 0.0, 1.0, high_open=True)
    check_int("block", block, 1)
    a, n = np.asarray(alphas, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if a.ndim != 1 or a.shape != n.shape or not len(a):
        raise ValueError(f"alphas and sizes must have one number for each layer; got {a.shape} and {n.shape}")
    if not np.isfinite(a).all() or not np.isfinite(n).all() or not (n > 0).all():
        raise ValueError("alphas must be finite, sizes finite and above 0")
    if len(a) % block:
        raise ValueError(f"block must divide the {len(a)} layers; got {block}")
    a = np.repeat(a.reshape(-1, block).mean(1), block)
    spread = a.max() - a.min()
    q = 1 - epsilon + 2 * epsilon * (a - a.min()) / spread if spread > 0 else np.ones(len(a))
    return q * n.sum() / (n * q).sum()


@torch.no_grad()
def prune(model: M, ratios: Mapping[str, float]) -> M:
    """Set the smallest entries of weights to 0, in place.

    Formula: of a weight with n entries the `int(n · ratio)` of least magnitude become 0 (of equal ones the earlier).

    Args:
        model: a plain model; merge adapters first.
        ratios: weight's name in `state_dict` -> share, in [0, 1].

    Returns:
        The model.

    Raises:
        ValueError: a share outside [0, 1]. UnknownNameError: no parameter of this name. Both are found before anything changes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.diagnose import prune
        >>> model = nn.Linear(4, 2)
        >>> int((prune(model, {"weight": 0.5}).weight == 0).sum())
        4

    Source: Lu et al., arXiv 2410.10912 (their simplest criterion).
    """
    parameters = dict(plain_model(model).named_parameters())
    for name, ratio in ratios.items():
        check_float(f"the ratio of {name}", ratio, 0.0, 1.0)
        if name not in parameters:
            close = ", ".join(nearest(name, parameters))
            raise UnknownNameError(f"the model has no parameter {name!r}; nearest: {close} (merge adapters first)")
    for name, ratio in ratios.items():
        weight = parameters[name]
        weight[smallest_mask(weight.abs(), int(weight.numel() * ratio))] = 0.0
    return model
