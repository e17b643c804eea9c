"""A model with two groups of channels, pruned and adapted by LoRAM, for the tests of LoRAM."""

import torch
from torch import nn

import lowdim
from lowdim.adapters import ChannelGroup


def deep(dtype=torch.float32):
    """The middle layer is a consumer in one group and a producer in the other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)


GROUPS = (ChannelGroup(["0"], ["2"], [0, 3, 4, 9, 15]), ChannelGroup(["2"], ["4"], [1, 2, 7, 11]))


def trained(model, method, seed=3):
    adapted = lowdim.adapt(method.shrink(model), method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.copy_(torch.randn(layer.update.B.shape, generator=generator))
    return adapted
