"""Compression during training: layers follow a schedule, and become plain ones with the final mask at the end."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import Any, ClassVar

from torch import nn

from lowdim.compress import SparseTraining
from lowdim.methods.applied import Applied
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, adamw
from lowdim.modules import quantized_scheme
from lowdim.surgery import find_layers

__all__ = ["CompressionStrategy"]


class CompressionStrategy(Strategy):
    """Trains a model that a scheduled function of `lowdim.compress` has prepared, with `SparseTraining` as companion."""

    kind: ClassVar[str] = "compress"
    trains_base: ClassVar[bool] = True
    target: ClassVar[str] = "a function of lowdim.compress whose argument config is annotated with its dataclass"

    def fits(self) -> bool:
        """A function with a config."""
        function = self.variant.build() if self.variant.target else None
        return inspect.isfunction(function) and dataclasses.is_dataclass(typing.get_type_hints(function).get("config"))

    @property
    def config_class(self) -> Any:
        """The dataclass of the function's hyperparameters."""
        return typing.get_type_hints(self.variant.build())["config"]

    def option_names(self) -> list[str]:
        """The fields of the config."""
        return [field.name for field in dataclasses.fields(self.config_class)]

    def option_sources(self) -> list[Any]:
        """The config."""
        return [self.config_class]

    def check(self) -> None:
        """Build the config."""
        self.config_class(**self.filled(Setup(lr=1e-3, steps=1000)))

    def refuses_quantized(self) -> str | None:
        """A mask is over single entries of the weight."""
        return f"{self.variant.label} masks single entries of the base's weights, which then cannot be kept in few bits"

    def filled(self, setup: Setup) -> dict[str, Any]:
        """The options, with `total_steps` and `seed` from the training if they are fields and not set."""
        names, options = self.option_names(), dict(self.variant.options)
        training = {"total_steps": setup.steps, "seed": setup.seed}
        return options | {n: value for n, value in training.items() if n in names and options.get(n) is None}

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Prepare the model; trains the parameters that the function leaves trainable, and the head.

        Raises:
            LowdimError: the function left no layer that follows a schedule.
            ValueError, TypeError: from the function, naming the layer.
        """
        self.check_quantize(quantized_scheme(model))
        options = self.filled(setup)
        config = self.config_class(**options)
        inside = [name for name in find_layers(model) if any(f"{name}.".startswith(f"{head}.") for head in setup.head)]
        if inside and "exclude" in self.option_names() and getattr(config, "target_modules", None) is None:
            config = dataclasses.replace(config, exclude=(*config.exclude, *inside))  # a new head is trained whole
        model.requires_grad_(True)
        function = self.variant.build()
        samples = None if setup.batches is None else list(setup.batches)
        data = {"batches": samples, "loss_fn": setup.loss_fn}
        taken = inspect.signature(function).parameters
        model = function(model, config, **{name: value for name, value in data.items() if name in taken})
        for name in setup.head:
            model.get_submodule(name).requires_grad_(True)
        SparseTraining(model)  # a one-shot compression raises now, not when training begins
        return Applied(
            model,
            self.variant,
            lambda lr: adamw([p for p in model.parameters() if p.requires_grad], lr, setup),
            options=options,
            make_companion=functools.partial(SparseTraining, model),
        )
