"""A net of Maestro layers, its optimizer, companion and data, for the tests of Maestro's training."""

import torch
from torch import nn

from lowdim.layers import MaestroLinear, MaestroTraining


def net(*, dtype=torch.float64):
    """Ranks 5, 5, 3."""
    return nn.Sequential(
        MaestroLinear(7, 5, dtype=dtype, seed=0),
        nn.Tanh(),
        MaestroLinear(5, 6, dtype=dtype, seed=1),
        nn.Tanh(),
        MaestroLinear(6, 3, dtype=dtype, seed=2),
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def training(model, optimizer, **changes):
    return MaestroTraining(model, optimizer, **{"lasso": 0.02, "threshold": 0.35, "shrink_interval": 3, **changes})


def data(step, count=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 7, dtype=torch.float64, generator=generator)
    return x, x[:, :3].argmax(1)
