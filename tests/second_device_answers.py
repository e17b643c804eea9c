"""A small network and its input, for functions that must answer on the second device as on the CPU."""

import torch
from torch import nn

from second_device import numbers, second_device, to_lazy


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))


def rows():
    return torch.randn(80, 12, generator=torch.Generator().manual_seed(5))


def answers_there_as_on_the_cpu(function):
    """`function(model, x)` gives the same numbers on both devices; each time with a fresh model."""
    want = function(net(), rows())
    with second_device():
        got = function(to_lazy(net()), to_lazy(rows()))
    torch.testing.assert_close(numbers(got), want, rtol=1e-4, atol=1e-5)
