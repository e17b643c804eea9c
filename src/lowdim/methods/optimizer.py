"""Projected optimizers: every parameter is trained, gradients and optimizer state are low-dimensional."""

from __future__ import annotations

import functools
import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from lowdim.methods.applied import Applied
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, hyperparameters, names_subclass
from lowdim.modules import quantized_scheme
from lowdim.optim import ProjectedOptimizer, param_groups
from lowdim.optim.core.groups import ParamGroups, too_small

__all__ = ["OptimizerStrategy"]

_REFRESH = "update_interval"
#: Keywords of every optimizer that are hyperparameters; its other shared keywords come from the training options (`Setup`).
_SHARED = ["stagger", "foreach"]


class OptimizerStrategy(Strategy):
    """Trains all parameters with a `lowdim.optim` optimizer."""

    kind: ClassVar[str] = "optimizer"
    target: ClassVar[str] = "a lowdim.optim ProjectedOptimizer"
    trains_base: ClassVar[bool] = True

    def fits(self) -> bool:
        """A subclass of `ProjectedOptimizer`."""
        return names_subclass(self.variant, ProjectedOptimizer)

    def option_names(self) -> list[str]:
        """The hyperparameters of the optimizer; the learning rate is a training option."""
        return [*hyperparameters(self.variant.build()), *_SHARED]

    def check(self) -> None:
        """Make the optimizer of a small layer."""
        self._make(torch.nn.Linear(2, 2), {}, 1e-3)

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Make every parameter trainable; weights of another kind (INT8) are created first."""
        self.check_layerwise(setup.layerwise)
        self.check_quantize(quantized_scheme(model))
        model.requires_grad_(True)
        model = self.restore(model, setup)
        extras = self._extras(setup)
        self._make(model, extras, setup.lr).remove_hooks()  # invalid options raise now, not after training has begun
        make = functools.partial(self._make, model, extras)
        return Applied(model, self.variant, make, options=dict(self.variant.options), notes=self._notes(model))

    def restore(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The model with the weights that the optimizer stores (INT8 for Q-GaLore)."""
        return self.variant.build().prepare_model(model, rank=self.variant.options["rank"])

    def clips_itself(self, layerwise: bool = False) -> bool:
        """True if gradients are freed in the backward pass, or are not in `.grad` (INT8)."""
        return layerwise or self.variant.build().hides_gradients

    def check_layerwise(self, layerwise: bool) -> None:
        """Every optimizer can update layer by layer."""

    def check_optimizer(self, optimizer: str) -> None:
        """The method is an optimizer itself.

        Raises:
            ValueError: another one is requested.
        """
        if optimizer != "adamw":
            label = self.variant.label
            raise ValueError(
                f"{label} has its own optimizer, so {optimizer} cannot take its place; leave out --optimizer {optimizer}"
            )

    @property
    def refresh_interval(self) -> str | None:
        """`"update_interval"`, if the optimizer recomputes its subspaces at intervals."""
        return _REFRESH if _REFRESH in self.option_names() else None

    def _extras(self, setup: Setup) -> dict[str, Any]:
        """The training options that the optimizer needs."""
        extras: dict[str, Any] = {"layerwise": True, "accumulate": setup.accumulate} if setup.layerwise else {}
        extras["master_weights"] = setup.master_weights
        if "seed" in self.option_names() and self.variant.options.get("seed") is None:
            extras["seed"] = setup.seed
        if setup.max_norm and self.clips_itself(setup.layerwise):
            extras["max_norm"] = setup.max_norm
        return extras

    def _notes(self, model: nn.Module) -> tuple[str, ...]:
        """Which matrices are too small to be projected: no error, but the method does nothing there."""
        rank = self.variant.options["rank"]
        groups = self._groups(model, rank)
        small = [f"{name} {shape}" for name, shape, reason in groups.rows if reason == too_small(rank)]
        if not any(group["rank"] for group in groups):
            return (f"no matrix has a smaller side above rank {rank}: all of the model is trained without projection",)
        if not small:
            return ()
        shown = ", ".join(small[:4]) + (f" and {len(small) - 4} more" if len(small) > 4 else "")
        return (f"trained without projection, since their smaller side is not above rank {rank}: {shown}",)

    @staticmethod
    def _groups(model: nn.Module, rank: int) -> ParamGroups:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # for a model without a matrix to project
            return param_groups(model, rank=rank)

    def _make(self, model: nn.Module, extras: dict[str, Any], lr: float) -> Any:
        options = {**self.variant.options, **extras}
        rank = options.pop("rank")
        return self.variant.build()(self._groups(model, rank), lr=lr, **options)
