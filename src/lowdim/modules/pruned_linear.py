"""A linear layer with a fixed mask: what magnitude pruning leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_int
from lowdim.linalg import pack_bits, unpack_bits
from lowdim.modules.masked import MaskedLinear
from lowdim.surgery import dense_matrix, swap_layers

__all__ = ["PrunedLinear", "magnitude_prune", "pruned_bytes"]


class PrunedLinear(MaskedLinear):
    """A linear layer `y = (mask ⊙ W) x + bias` with a mask that does not change; a bit for each weight.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.modules import PrunedLinear
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[3.0, 1.0]])
        >>> PrunedLinear(layer, torch.tensor([[True, False]])).dense_weight().tolist()
        [[3.0, 0.0]]
    """

    bits: Tensor

    def __init__(self, layer: nn.Module, kept: Tensor | None = None):
        super().__init__(layer)
        if kept is None:  # a blank, whose bits are loaded
            kept = torch.ones(self.out_features, self.in_features, dtype=torch.bool, device=self.weight.device)
        self.register_buffer("bits", pack_bits(kept))

    def mask(self) -> Tensor:
        """1 where a weight is kept."""
        size = self.out_features * self.in_features
        return unpack_bits(self.bits, size).view(self.out_features, self.in_features).to(self.weight.dtype)

    def description(self) -> dict[str, Any]:
        """Nothing but the bits, which are a tensor."""
        return {}


def magnitude_prune(model: nn.Module, layers: Mapping[str, nn.Module], kept: int | Mapping[str, int]) -> nn.Module:
    """Keep the largest weights of these layers, by one threshold on `|w|` for all of them, or one for each, in place.

    Args:
        kept: how many weights of all layers together, or layer -> how many of its own, >= 1; of equal ones at the threshold
            none is kept.

    Raises:
        ValueError: `kept` is below 1, or above the number of weights; a layer without a number.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.modules import magnitude_prune
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> model[0].weight.data = torch.tensor([[-4.0, 1.0], [2.0, 3.0]])
        >>> magnitude_prune(model, {"0": model[0]}, 2)[0].dense_weight().tolist()
        [[-4.0, 0.0], [0.0, 3.0]]
    """
    sizes = {name: dense_matrix(layer).detach().abs() for name, layer in layers.items()}
    if isinstance(kept, Mapping):
        if missing := [name for name in sizes if name not in kept]:
            raise ValueError(f"kept must have a number for each layer; layer {missing[0]} has none")
        thresholds = {name: _threshold(f"kept[{name!r}]", size.flatten().float(), kept[name]) for name, size in sizes.items()}
    else:
        every = torch.cat([size.flatten().float() for size in sizes.values()])
        thresholds = dict.fromkeys(sizes, _threshold("kept", every, kept))
    with torch.no_grad():
        swap_layers(model, layers, lambda name, layer: PrunedLinear(layer, sizes[name] > thresholds[name]))
    return model


def _threshold(argument: str, sizes: Tensor, kept: int) -> float:
    """The largest of `sizes` that is not kept."""
    check_int(argument, kept, 1, sizes.numel())
    out = sizes.numel() - kept
    return float(sizes.kthvalue(out).values) if out else -math.inf


def pruned_bytes(weights: int, kept: int, itemsize: int) -> int:
    """Bytes of pruned weights in a file: the kept ones, and a bit for each place."""
    return kept * itemsize + math.ceil(weights / 8)
