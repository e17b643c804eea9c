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
from lowdim.modules import quantized_scheme
from lowdim.ranks import capped_note
from lowdim.surgery import find_layers, is_linear, matrix_shape, without_tied

__all__ = ["LayerStrategy"]

#: Options of weights that are drawn: a layer that approximates trained weights has no use for them.
_OF_A_DRAW = {"init", "std"}
_TRIAL = 2**14  # sides of a trial layer on the meta device: above any rank in use


class LayerStrategy(Strategy):
    """Trains a model whose linear layers are `lowdim.layers` ones, with the layers' companion if they have one."""

    kind: ClassVar[str] = "layer"
    target: ClassVar[str] = "an nn.Module with from_linear"
    trains_base: ClassVar[bool] = True

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
        """Swap the selected layers; by default those that become smaller at the rank.

        Raises:
            ValueError: the base is kept in few bits.
        """
        self.check_quantize(quantized_scheme(model))
        model.requires_grad_(True)
        own, companion_options = self._split(setup)
        left, capped = self._swap(model, own, setup)
        notes = capped_note(capped)
        if left:
            notes = (f"{len(left)} layers stay dense, as their smaller side is not above the rank: {', '.join(left[:4])}",)
        return Applied(
            model,
            self.variant,
            lambda lr: adamw(model.parameters(), lr, setup),
            options=dict(self.variant.options),
            make_companion=functools.partial(self._companion, model, companion_options) if self.variant.companion else None,
            notes=notes,
            capped_ranks=capped,
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

    def _swap(self, model: nn.Module, options: dict[str, Any], setup: Setup) -> tuple[list[str], dict[str, int]]:
        """The layers that stay dense, because the rank would not make them smaller, and those with a rank of their own.

        Layers with a smaller side up to the rank are swapped only if they were named, or if there are no others.
        """
        cls, targets = self.variant.build(), options.pop("target_modules", None)
        fresh = setup.scratch or not setup.initialise
        if not fresh:
            for name in _OF_A_DRAW & set(options):
                del options[name]
        elif "seed" in hyperparameters(cls):
            options.setdefault("seed", setup.seed)
        left: list[str] = []
        capped: dict[str, int] = {}
        if "rank" in options:
            sides = _smaller_sides(model, targets)
            large = [name for name, side in sides.items() if side > options["rank"]]
            if targets in (None, "all-linear") and large:
                left = [name for name, side in sides.items() if side <= options["rank"]]
                targets = large if left else targets
            else:
                capped = {name: side for name, side in sides.items() if side < options["rank"]}
        swap_linear(model, cls, targets, fresh=fresh, cap_rank=True, **options)
        return left, capped


def _smaller_sides(model: nn.Module, targets: Any) -> dict[str, int]:
    """The smaller side of each layer that would be swapped."""
    layers, _ = without_tied(model, find_layers(model, targets, accept=is_linear), named=False)
    return {name: min(matrix_shape(layer)) for name, layer in layers.items()}
