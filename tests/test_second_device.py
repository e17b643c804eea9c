"""The device of `second_device` refuses what a GPU refuses, and takes what a GPU takes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from second_device import LAZY, FakeTensorDeviceMismatchError, second_device


def test_it_refuses_what_a_gpu_refuses():
    with second_device():
        there, here = torch.ones(3, 3, device=LAZY), torch.ones(3, 3)
        for mix in (
            lambda: there @ here,
            lambda: torch.cat([there, here]),
            lambda: torch.equal(there, here),
            lambda: torch.where(here > 0, there, 0.0),
            lambda: there.masked_select(here > 0),
            lambda: here.add_(there),
            lambda: torch.zeros(()).add_(there.sum()),
            lambda: F.embedding(torch.tensor([0, 1]), there),
            lambda: setattr(nn.Parameter(there), "data", here),
            lambda: torch.randn(3, device=LAZY, generator=torch.Generator()),
            lambda: here.normal_(generator=torch.Generator(LAZY)),
        ):
            with pytest.raises(FakeTensorDeviceMismatchError):
                mix()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


def test_it_takes_what_a_gpu_takes():
    with second_device():
        there, here = torch.ones(3, 3, device=LAZY), torch.arange(9.0).view(3, 3)
        assert (there * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 3, "one number on the CPU"
        assert there.copy_(here).tolist() == here.tolist(), "copies across"
        assert there[torch.tensor([2, 0])].tolist() == here[[2, 0]].tolist(), "an index on the CPU"
        assert type(there.cpu()) is torch.Tensor
        assert torch.equal(there.cpu(), here)
        there[0].zero_()  # a view
        assert there.tolist() == [[0.0] * 3, *here[1:].tolist()]
        drawn = [
            torch.randn(3, device=place, generator=torch.Generator(place).manual_seed(1)).tolist() for place in (LAZY, "cpu")
        ]
        assert drawn[0] == drawn[1]
