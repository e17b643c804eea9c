"""Weights of flash-linear-attention's `GatedDeltaProduct` under our names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lowdim.errors import listed

__all__ = ["from_fla"]


def from_fla(
    state_dict: Mapping[str, Tensor],
    prefix: str,
    own: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors at `prefix` as a state dict with the names and shapes of `own`: `q_conv1d (C, 1, W)` is `q_conv (C, W)`.

    Raises:
        ValueError: a bias of a convolution, tensors missing or left over, or of another shape (named).
    """
    given = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    biases = [prefix + name for name in given if name.endswith("_conv1d.bias")]
    if biases:
        raise ValueError(f"{listed(biases)}: convolutions have no bias here")
    renamed = {}
    for name, tensor in given.items():
        short = name.endswith("_conv1d.weight") and tensor.ndim == 3
        renamed[name.replace("_conv1d.", "_conv.")] = tensor.squeeze(1) if short else tensor
    missing, strange = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or strange:
        raise ValueError(
            f"the tensors at {prefix!r} are not those of this layer: missing {listed(missing) or 'none'}, "
            f"left over {listed(strange) or 'none'}; check the options of the layer"
        )
    for name, tensor in renamed.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{prefix}{name} must be {tuple(own[name].shape)}; got shape {tuple(tensor.shape)}")
    return renamed
