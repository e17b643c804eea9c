"""The attributes and methods of the test class of a whole-model method, and helpers of the shared tests."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lowdim
from lowdim.testing.small_model import sample_input, small_model

__all__ = ["DTYPES", "WholeHooks"]

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


class WholeHooks(ABC):
    """Subclass `WholeModelCase`; override an attribute only with a comment that says why."""

    #: Rate of the training tests, whose target is a disturbed model's output.
    lr: ClassVar[float] = 0.05
    #: Whether what is computed depends on the seed of `lowdim.adapt`.
    random: ClassVar[bool] = True
    #: Largest relative error of the output against the plain model at the same parameters, by dtype.
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}

    @abstractmethod
    def method(self, model: nn.Module, **changes: Any) -> Any:
        """The method for this model with these fields changed."""

    @abstractmethod
    def dense(self, adapted: Any) -> dict[str, Tensor]:
        """`θ_i − θ_i⁰` of each composed parameter by name, as a formula of the trained numbers and the buffers, differentiable.

        Written from the paper: not by `offsets`, `delta` or another method of what is tested.
        """

    def disturb(self, adapted: Any, seed: int = 11) -> None:
        """Move every trained number, as training would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.composition.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))

    # Helpers of the tests

    def adapt(self, model: nn.Module, *, disturbed: bool = True, **options: Any) -> Any:
        """The method on a model, away from its start."""
        adapted = lowdim.adapt(model, self.method(model), **options)
        if disturbed:
            self.disturb(adapted)
        return adapted

    def wanted(self, plain: nn.Module, adapted: Any, *args: Any) -> Any:
        """The output of `plain`, a copy from before adapting, in float64 at `θ⁰ + dense(adapted)`."""
        model = copy.deepcopy(plain).double()
        changes = self.dense(adapted)
        assert set(changes) <= set(adapted.names)
        moved = {name: p.detach() + changes[name] for name, p in model.named_parameters() if name in changes}
        inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        return functional_call(model, moved, tuple(inputs))

    def begin(self) -> tuple[Any, torch.optim.Optimizer]:
        """A small model at the start of its training, and the optimizer."""
        adapted = self.adapt(small_model(), disturbed=False)
        return adapted, torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)

    def run_steps(self, adapted: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        """Steps `first` to `last` of a run whose batches depend only on the step; returns the losses."""
        losses = []
        for step in range(first, last):
            x = sample_input(16, seed=100 + step)
            loss = (adapted.model(x) - x[:, :3].sin()).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses

    def train(self, adapted: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
        """Train towards the output of a disturbed model; returns the losses."""
        x = sample_input(32, seed=4, dtype=dtype)
        other = self.adapt(small_model(), disturbed=False)
        self.disturb(other, seed=12)
        target = other.model(x.float()).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)
        losses = []
        for _ in range(steps):
            loss = (adapted.model(x).float() - target).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses
