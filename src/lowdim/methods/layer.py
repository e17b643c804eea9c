"""Structured layers: linear layers are swapped for low-dimensional ones, and all of the model is trained."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import nn

from lowdim.companion import Companion
from lowdim.layers import swap_linear
from lowdim.methods.applied import Applied
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, adamw, hyperparameters, names_subclass
from lowdim.surgery import find_layers, is_linear, matrix_shape, without_tied

__all__ = ["LayerStrategy"]

_TRIAL = 2**14  # sides of a trial layer on the meta device: above any rank in use


class LayerStrategy(Strategy):
    """Trains a model whose linear layers are `lowdim.layers` ones, with the layers' companion if they have one."""

    kind: ClassVar[str] = "layer"
    target: ClassVar[str] = "an nn.Module with from_linear"

    def fits(self) -> bool:
        """A module that can be made from a linear layer."""
        return names_subclass(self.variant, nn.Module) and callable(getattr(self.variant.build(), "from_linear", None))

    def option_names(self) -> list[str]:
        """Which layers, the layer's hyperparameters, and the companion's."""
        return ["target_modules", *hyperparameters(self.variant.build()), *self._companion_names()]

    def check(self) -> None:
        """Make the companion of a trial model, which needs no memory."""
        if not self.variant.companion:
            return
        own, companion_options = self._split(Setup(lr=1e-3, steps=1000))
        own.pop("target_modules", None)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(_TRIAL, _TRIAL), nn.Linear(_TRIAL, _TRIAL))
        swap_linear(model, self.variant.build(), fresh=True, **own)
        self._companion(model, companion_options, torch.optim.SGD(model.parameters(), lr=1e-3))

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Swap the selected layers; by default those that become smaller at the rank."""
        model.requires_grad_(True)
        own, companion_options = self._split(setup)
        left = self._swap(model, own, setup)
        notes = ()
        if left:
            notes = (f"{len(left)} layers stay dense, as their smaller side is not above the rank: {', '.join(left[:4])}",)
        return Applied(
            model,
            self.variant,
            lambda lr: adamw(model.parameters(), lr),
            options=dict(self.variant.options),
            make_companion=functools.partial(self._companion, model, companion_options) if self.variant.companion else None,
            notes=notes,
        )

    def restore(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The model with its layers swapped."""
        self._swap(model, self._split(setup)[0], setup)
        return model

    def _companion_names(self) -> list[str]:
        return hyperparameters(self.variant.build_companion()) if self.variant.companion else []

    def _split(self, setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
        """The layer's own options, and its companion's, with `total_steps` and the run's seed if they are not set."""
        names = self._companion_names()
        companion_options = {name: value for name, value in self.variant.options.items() if name in names}
        training = {"total_steps": setup.steps, "seed": setup.seed}
        companion_options |= {
            name: value for name, value in training.items() if name in names and companion_options.get(name) is None
        }
        return {name: value for name, value in self.variant.options.items() if name not in names}, companion_options

    def _companion(self, model: nn.Module, options: dict[str, Any], optimizer: torch.optim.Optimizer) -> Companion:
        return self.variant.build_companion()(model=model, optimizer=optimizer, **options)

    def _swap(self, model: nn.Module, options: dict[str, Any], setup: Setup) -> list[str]:
        """Returns the names of layers that stay dense, because the rank would not make them smaller."""
        cls, targets = self.variant.build(), options.pop("target_modules", None)
        fresh = setup.scratch or not setup.initialise
        if fresh and "seed" in hyperparameters(cls):
            options.setdefault("seed", setup.seed)
        left: list[str] = []
        if targets is None and "rank" in options:
            targets, left = _above_rank(model, options["rank"])
        swap_linear(model, cls, targets, fresh=fresh, **options)
        return left


def _above_rank(model: nn.Module, rank: int) -> tuple[list[str] | None, list[str]]:
    """The layers whose smaller side is above the rank, and the others, which a factorization would not make smaller.

    `(None, [])` if all are above it, or none: the layer's own error then reports the possible ranks.
    """
    layers, _ = without_tied(model, find_layers(model, accept=is_linear), named=False)
    large = [name for name, layer in layers.items() if min(matrix_shape(layer)) > rank]
    if not large or len(large) == len(layers):
        return None, []
    return large, [name for name in layers if name not in set(large)]
