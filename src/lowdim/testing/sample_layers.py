"""One layer of each kind that `lowdim.surgery` supports, an input for it, and its output with another weight."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowdim.surgery import dense_matrix, is_conv1d, matrix_shape

__all__ = ["LAYERS", "make_input", "make_layer", "moved_output"]

#: Name for `make_layer` -> kind in `Method.takes`.
LAYERS = {
    "linear": "linear",
    "tall": "linear",
    "conv1d": "linear",
    "conv2d": "conv2d",
    "conv2d_1x1": "conv2d",
    "conv2d_grouped": "conv2d",
    "embedding": "embedding",
}


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The layer of this name; its weights are the same in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return _build(name).to(dtype)


def _build(name: str) -> nn.Module:
    match name:
        case "linear":
            return nn.Linear(12, 9)
        case "tall":
            return nn.Linear(7, 11, bias=False)
        case "conv1d":
            from transformers.pytorch_utils import Conv1D

            layer = Conv1D(9, 12)
            nn.init.normal_(layer.weight)  # type: ignore[arg-type]
            return layer
        case "conv2d":
            return nn.Conv2d(4, 6, 3, stride=2, padding=1)
        case "conv2d_1x1":
            return nn.Conv2d(8, 10, 1, stride=2)
        case "conv2d_grouped":
            return nn.Conv2d(8, 12, 3, groups=2, padding="same")
        case "embedding":
            return nn.Embedding(13, 10)
    raise ValueError(f"no sample layer {name!r}; there are {', '.join(LAYERS)}")


def make_input(layer: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """A valid input of `layer`."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (2, 6), generator=generator)
    shape = (2, layer.in_channels, 7, 6) if isinstance(layer, nn.Conv2d) else (2, 5, matrix_shape(layer)[1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def moved_output(
    layer: nn.Module,
    change: Tensor,  # (out, in), added to the weight
    x: Tensor,
) -> Tensor:
    """The output of a copy of `layer` with the weight `W + change`, in float64, differentiable in `change` and `x`."""
    matrix = dense_matrix(layer).detach().double() + change
    plain = copy.deepcopy(layer).double()
    flipped = matrix.T if is_conv1d(layer) or isinstance(layer, nn.Embedding) else matrix
    weight: Tensor = plain.weight  # type: ignore[assignment]
    return functional_call(plain, {"weight": flipped.reshape(weight.shape)}, (x.double() if x.is_floating_point() else x,))
