"""The attributes and methods of an adapter's test class, and helpers of the shared tests."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowdim
from lowdim.adapters import AdaptedLayer, Method
from lowdim.surgery import dense_matrix, matrix_shape, replace_layer, with_matrix
from lowdim.testing.sample_layers import LAYERS, moved_output
from lowdim.testing.small_model import sample_input, small_model

__all__ = ["DTYPES", "AdapterHooks"]

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


class AdapterHooks(ABC):
    """The first group is for a subclass to define; override an attribute only with a comment that says why."""

    #: The rank of `method()`. A test that needs the smallest sets it, so formulas read it.
    rank: int = 2
    #: The smallest rank that fits a layer with a side of 1.
    smallest_rank: ClassVar[int] = 1
    #: Whether the output is unchanged at attach.
    starts_unchanged: ClassVar[bool] = True
    #: Largest relative error of the output at attach, by dtype of weight and update.
    start_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
    #: Largest relative error of the output against the formula in float64, by dtype of weight and update.
    forward_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
    gradient_tolerance: ClassVar[float] = 1e-11  # float64
    #: Of ΔW, relative to the largest entry of W₀.
    merge_tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
    #: Whether the update gives factors of ΔW.
    has_factors: ClassVar[bool] = True
    #: Whether a PEFT checkpoint of linear layers is exact.
    exact_in_peft: ClassVar[bool] = True
    #: Whether the numbers at attach depend on the seed.
    random_start: ClassVar[bool] = True
    #: Rate of the training tests, whose target is a disturbed model's output.
    lr: ClassVar[float] = 0.02

    @abstractmethod
    def method(self, **changes: Any) -> Method:
        """A method of rank `self.rank` with these fields changed."""

    @abstractmethod
    def dense(self, update: Any) -> Tensor:
        """ΔW = W_eff − W₀ `(out, in)` as a formula of the update's parameters and buffers, differentiable.

        Written from the paper, with the hyperparameters that the test class states: not by `dense`, `delta`, `forward` or any
        other method of the update, so that a wrong scale, sign or index in it is found.
        """

    def start(self, weight: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
        """Name -> value at attach, of those parameters and buffers that are constant or follow from W₀ `(out, in)`."""
        return {}

    def taken(self, weight: Tensor, stats: Mapping[str, Tensor]) -> Tensor | None:
        """The part of W₀ that the update replaces at attach, so that the base keeps `W₀ − taken`; None if the base keeps W₀."""
        return None

    def stats(self, layer: nn.Module) -> dict[str, Tensor]:
        """Statistics for a single attach, for what the method `needs`."""
        out, n = matrix_shape(layer)
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
        every = {
            "gradient": torch.randn(out, n, generator=generator, dtype=torch.float64),
            "covariance": x.T @ x,
            "norms": x.square().sum(0).sqrt(),
        }
        return {need: every[need] for need in self.method().needs}

    def max_delta_rank(self, out_features: int, in_features: int) -> int:
        """The largest rank that ΔW can have at the rank of `method()`."""
        return min(out_features, in_features)

    def disturb(self, update: nn.Module, seed: int = 11) -> None:
        """Move every trained number, as training would."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in update.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.2 * noise).to(parameter.dtype))

    # What the tests use

    def attach(self, layer: nn.Module, *, disturbed: bool = True, seed: int = 0, **kwargs: Any) -> AdaptedLayer:
        """The method on one layer, away from its start."""
        generator = torch.Generator().manual_seed(seed)
        adapted = self.method().attach(layer, stats=self.stats(layer), generator=generator, **kwargs)
        if disturbed:
            self.disturb(adapted.update)
        return adapted

    def adapt(self, model: nn.Module, *, disturbed: bool = True, method: Method | None = None, **kwargs: Any) -> Any:
        """The method on a model, away from its start."""
        if (method or self.method()).needs:
            dtype = next(model.parameters()).dtype
            kwargs = {"batches": [sample_input(16, seed=2, dtype=dtype)], "loss_fn": mean_square, **kwargs}
        adapted = lowdim.adapt(model, method or self.method(), **kwargs)
        if disturbed:
            for layer in adapted.layers.values():
                self.disturb(layer.update)
        return adapted

    @torch.no_grad()
    def change(self, adapted: AdaptedLayer) -> Tensor:
        """The formula in float64 at the numbers that the update holds in its own dtype."""
        return self.dense(copy.deepcopy(adapted.update).double())

    def wanted(self, layer: nn.Module, adapted: AdaptedLayer, x: Tensor) -> Tensor:
        """The output of `layer` at `W₀ + dense(update)`, in float64."""
        return moved_output(layer, self.change(adapted), x)

    def wanted_model(self, plain: nn.Module, adapted: Any) -> nn.Module:
        """`plain`, a copy from before adapting, in float64 with `W₀ + dense(update)` in each adapted layer."""
        model = copy.deepcopy(plain).double()
        for name, layer in adapted.layers.items():
            target = model.get_submodule(name)
            replace_layer(model, name, with_matrix(target, dense_matrix(target) + self.change(layer)))
        return model

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests that ask for a `layer_name` run for each kind of layer that the method adapts."""
        if "layer_name" in metafunc.fixturenames:
            takes = self.method().takes
            metafunc.parametrize("layer_name", [name for name, kind in LAYERS.items() if kind in takes])

    def begin(self) -> tuple[Any, torch.optim.Optimizer]:
        """A small model at the start of its training, and the optimizer."""
        adapted = self.adapt(small_model(), disturbed=False)
        return adapted, torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)

    def run_steps(self, adapted: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
        """Steps `first` to `last` of a run whose batches depend on the step alone; gives the losses."""
        losses = []
        for step in range(first, last):
            x = sample_input(16, seed=100 + step)
            loss = (adapted.model(x) - x[:, :3].sin()).square().mean() + adapted.regularizer()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses

    def train(self, adapted: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
        """Train towards the output of a disturbed model; gives the losses."""
        x = sample_input(32, seed=4, dtype=dtype)
        other = self.adapt(small_model(), disturbed=False)
        for layer in other.layers.values():
            self.disturb(layer.update, seed=12)
        target = other.model(x.float()).detach()
        optimizer = torch.optim.AdamW(adapted.param_groups(self.lr), weight_decay=0.0)
        losses = []
        for _ in range(steps):
            loss = (adapted.model(x).float() - target).square().mean() + adapted.regularizer()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
        return losses


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss for methods that need gradients."""
    return model(batch).square().mean()
