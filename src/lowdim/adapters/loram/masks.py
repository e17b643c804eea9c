"""Pruned weights: unstructured masks, and layers reduced to the channels that stay."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import CheckpointError
from lowdim.linalg import smallest_mask
from lowdim.surgery import make_linear, weight_matrix, with_matrix

__all__ = ["Masks", "magnitude_mask", "pruned_layer"]


class Masks(Mapping[str, Tensor]):
    """Layer name -> bool matrix `(out, in)`, True where a weight stays; comparable, and JSON-able as packed bits."""

    def __init__(self, masks: Mapping[str, Any]):
        self._masks = {name: _unpack(value) if isinstance(value, Mapping) else value for name, value in masks.items()}
        for name, mask in self._masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
                raise ValueError(f"masks[{name!r}] must be a bool matrix (out, in); got {mask!r}")

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Shape and bits of each mask, eight to the byte, in base64."""
        return {name: _pack(mask) for name, mask in self._masks.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masks) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(tuple((name, tuple(mask.shape)) for name, mask in self._masks.items()))


def _pack(mask: Tensor) -> dict[str, Any]:
    bits = F.pad(mask.detach().cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    data = (bits << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)
    return {"shape": list(mask.shape), "bits": base64.b64encode(data.numpy().tobytes()).decode()}


def _unpack(packed: Mapping[str, Any]) -> Tensor:
    try:
        out, n = packed["shape"]
        data = torch.frombuffer(bytearray(base64.b64decode(packed["bits"], validate=True)), dtype=torch.uint8)
        return (data[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: out * n].view(out, n).bool()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"a packed mask must have a shape and as many bits; got {packed!r:.80}") from error


def magnitude_mask(
    weight: Tensor,  # (out, in)
    ratio: float,
) -> Tensor:
    """True where a weight stays when the `round(ratio · numel)` smallest magnitudes go, of equal ones the lower index first."""
    gone = round(ratio * weight.numel())
    size = weight.detach().abs()
    if not gone or size.is_meta:
        return torch.ones_like(weight, dtype=torch.bool)
    if not bool(size.max() < torch.inf):  # false for NaN too
        raise ValueError("the weight has NaN or infinite entries; its smallest ones are not defined")
    return ~smallest_mask(size, gone)


@torch.no_grad()
def pruned_layer(name: str, layer: nn.Module, mask: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> nn.Module:
    """A masked copy of a layer, reduced to the rows and columns that stay; it shares no tensor with the original.

    Raises:
        ValueError: a mask or channels that do not fit the layer's size.
    """
    weight, bias = weight_matrix(layer), getattr(layer, "bias", None)
    if mask is not None:
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of layer {name} has shape {tuple(mask.shape)}; its weight {tuple(weight.shape)}")
        weight = weight * mask.to(weight)
    if rows is None and columns is None:
        copied = with_matrix(layer, weight)
        if bias is not None:
            copied.bias = nn.Parameter(bias.clone(), bias.requires_grad)
        return copied
    for side, index, size in (("output", rows, len(weight)), ("input", columns, weight.shape[1])):
        if index is not None and int(index[-1]) >= size:
            raise ValueError(f"layer {name} has {size} {side} channels; the group keeps channel {int(index[-1])}")
    if rows is not None:
        index = rows.to(weight.device)
        weight, bias = weight[index], None if bias is None else bias[index]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    linear = make_linear(weight.contiguous(), bias, requires_grad=layer.weight.requires_grad)  # type: ignore[union-attr]
    return linear.train(layer.training)
