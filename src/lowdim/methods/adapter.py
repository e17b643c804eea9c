"""Adapters: the model is frozen, and low-dimensional updates of its layers are trained."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from lowdim.adapters import LoRA, ModelMethod, adapt
from lowdim.adapters.core.attach import target_layers
from lowdim.adapters.core.layer import kind_of
from lowdim.methods.applied import Applied
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, adamw

__all__ = ["AdapterStrategy"]


class AdapterStrategy(Strategy):
    """Trains a `lowdim.adapters` method."""

    kind: ClassVar[str] = "adapter"

    def option_names(self) -> list[str]:
        """The fields of the method's dataclass."""
        return [field.name for field in dataclasses.fields(self.variant.build())]

    def check(self) -> None:
        """Build the method."""
        options = self.filled(Setup(lr=1e-3, steps=1))
        if self.variant.build().names_targets:
            options.setdefault("target_modules", ["a_layer"])  # settled when the model is there
        self.variant.build()(**options)

    def filled(self, setup: Setup) -> dict[str, Any]:
        """The options, with `lr` and `total_steps` filled in where the method has such fields and they are open."""
        names, options = self.option_names(), dict(self.variant.options)
        if "total_steps" in names and options.get("total_steps") is None:
            options["total_steps"] = setup.steps
        if "lr" in names and "lr" not in options:
            options["lr"] = setup.lr
        return options

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Attach the method to the layers that it names, or to every layer outside the head."""
        options = self.filled(setup)
        if self.variant.build().names_targets and not options.get("target_modules"):
            options["target_modules"] = self._columns(model, setup.head)
        method = _outside(self.variant.build()(**options), model, setup.head)
        samples = None if setup.batches is None else list(setup.batches)  # read twice: at attaching, and by a search
        adapted = adapt(
            model,
            method,
            batches=samples,
            loss_fn=setup.loss_fn,
            modules_to_save=setup.head,
            seed=setup.seed,
            initialise=setup.initialise,
        )
        if setup.initialise:
            adapted.before_training(samples or [], setup.loss_fn, setup.lr, setup.steps)
        return Applied(model, self.variant, lambda lr: adamw(adapted.param_groups(lr), lr), adapted, options)

    def _columns(self, model: nn.Module, head: tuple[str, ...]) -> list[str]:
        """What the layers that can be adapted are called in each block (`"query"`, `"value"`), for methods that need names."""
        chosen = target_layers(model, _outside(LoRA(), model, head))
        takes = self.variant.build().takes
        return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name, layer in chosen.items() if kind_of(layer) in takes))


def _outside(method: Any, model: nn.Module, head: tuple[str, ...]) -> Any:
    """The method, kept off the layers of a head that is trained whole (a new pooler, say) where it would take every layer."""
    if isinstance(method, ModelMethod) or method.target_modules not in (None, "all-linear"):
        return method
    found = list(target_layers(model, method))
    outside = [name for name in found if not any(name == h or name.startswith(f"{h}.") for h in head)]
    return method if outside == found else dataclasses.replace(method, target_modules=outside)
