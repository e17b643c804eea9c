"""Singular values of trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowdim.linalg import compute_dtype
from lowdim.surgery import dense_matrix

__all__ = ["weight_spectra", "wide_weight"]

#: Weights of up to this many entries are decomposed in float64.
_SMALL = 2**20


def weight_spectra(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Singular values of each layer, descending, float64 on the CPU; a weight shared by several layers is decomposed once.

    Raises:
        ValueError: a weight with NaN or infinity.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress.core.spectra import weight_spectra
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([1.0, 3.0]))
        >>> weight_spectra({"0": layer})["0"].tolist()
        [3.0, 1.0]
    """
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, layer in layers.items():
        twin = first.setdefault(id(getattr(layer, "weight", layer)), name)
        if twin != name:
            found[name] = found[twin]
            continue
        weight = wide_weight(layer)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"layer {name}: the weight has NaN or infinite entries; a decomposition of it would be meaningless"
            )
        found[name] = torch.linalg.svdvals(weight).to("cpu", torch.float64)
    return found


def wide_weight(layer: nn.Module) -> Tensor:
    """The weight `(out, in)` in the dtype of the decomposition."""
    weight = dense_matrix(layer).detach()
    dtype = compute_dtype(weight.dtype)
    if weight.numel() <= _SMALL and weight.device.type != "mps":  # which has no float64
        dtype = torch.float64
    return weight.to(dtype)
