"""SLTrain layers with the authors' numbers, and how many rows build the weight, for the tests of SLTrain."""

import torch

import vectors
from lowdim.layers import SLTrainLinear

ROWS = 100  # more than enough that W itself is built


def official(case, **more):
    """One of the authors' cases, and the layer with its numbers."""
    v = vectors.load("sltrain", case)
    how = {name: v.hyperparameters[name] for name in ("in_features", "out_features", "rank", "alpha", "density", "bias")}
    layer = SLTrainLinear(**how, indices=v["indices"], dtype=torch.float64, **more)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(v[name])
    return v, layer
