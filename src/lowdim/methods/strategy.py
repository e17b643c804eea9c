"""The base class of all ways to train: the interface that `run`, `compare` and `plan` use."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from lowdim.catalogue import BY_FARMS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowdim.catalogue import Variant
    from lowdim.methods.applied import Applied
    from lowdim.methods.setup import Setup

__all__ = ["Strategy", "adamw", "hyperparameters", "names_subclass"]


class Strategy(ABC):
    """One way to train a model; a subclass for each `Variant.kind`.

    Args:
        variant: a row of the catalogue, with the options that it is used with.

    Attributes:
        kind: the `Variant.kind` of the rows that this class handles.
        target: what `Variant.target` must name in those rows, in words; empty if it must be empty.
        trains_base: whether the base's own weights are trained, and so must be dense.

    Raises:
        TypeError: the row's target is something else.
    """

    kind: ClassVar[str]
    target: ClassVar[str] = ""
    trains_base: ClassVar[bool] = False

    def __init__(self, variant: Variant):
        self.variant = variant
        if not self.fits():
            wanted = self.target or "empty"
            raise TypeError(
                f"target of method {variant.name} must be {wanted}, as its kind is {self.kind!r}; got {variant.target!r}"
            )

    def fits(self) -> bool:
        """Whether this class can train the row's target."""
        return not self.variant.target

    def option_names(self) -> list[str]:
        """The hyperparameters that a user may set."""
        return []

    def option_sources(self) -> list[Any]:
        """The classes whose constructors and docstrings describe the options."""
        if not self.variant.target:
            return []
        return [self.variant.build(), *([self.variant.build_companion()] if self.variant.companion else [])]

    def check(self) -> None:  # noqa: B027  (most have nothing to refuse)
        """Raise ValueError or TypeError for options that are invalid for every model."""

    def sample_batches(self, steps: int) -> int:
        """The number of sample batches that `Setup.batches` should hold for a training of `steps` steps."""
        return 4

    def at_rank(self, rank: int) -> Variant | None:
        """The method with this rank, whatever its option is called; None if it has no rank."""
        if "rank" not in self.option_names():
            return None
        return replace(self.variant, options={**self.variant.options, "rank": rank})

    def ranks_by_layer(self) -> bool:
        """Whether each layer can have a rank of its own (`Variant.ranks`)."""
        return False

    def layer_ranks(self, model: nn.Module, setup: Setup) -> dict[str, int]:
        """The rank of each layer, for a variant with ranks by layer.

        Raises:
            ValueError: the method has none, the model no weights, or too few layers that can be measured.
        """
        raise ValueError(f"{self.variant.label} has no rank by layer: one rank for all layers, or none")

    def check_ranks(self) -> None:
        """Raise ValueError if ranks by layer are requested and the method has none."""
        if self.variant.ranks != "uniform" and not self.ranks_by_layer():
            base = self.variant.name.removesuffix(BY_FARMS)
            raise ValueError(f"{base} has no rank by layer; leave out --ranks {self.variant.ranks}, or choose such as lora")

    @abstractmethod
    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Prepare `model` for training, in place.

        Raises:
            ValueError, TypeError: from the method, naming the layer.
        """

    def restore(self, model: nn.Module, setup: Setup) -> nn.Module:
        """The model with the structure of the trained weights, for loading them; unchanged if the method keeps it."""
        return model

    def refuses_quantized(self) -> str | None:
        """Why the method cannot take a base whose weights are in few bits; None if it can."""
        if not self.trains_base:
            return None
        return f"{self.variant.label} trains the base's own weights, which then cannot be kept in few bits"

    def check_quantize(self, scheme: str | None) -> None:
        """Raise ValueError if the base is, or shall be, kept in few bits and the method cannot take that."""
        reason = None if scheme is None else self.refuses_quantized()
        if reason is not None:
            raise ValueError(f"{reason}: choose an adapter such as lora, or leave out --quantize {scheme}")

    def check_optimizer(self, optimizer: str) -> None:  # noqa: B027  (most have none of their own)
        """Raise ValueError if another optimizer than plain AdamW is requested and the method has its own."""

    def clips_itself(self, layerwise: bool = False) -> bool:
        """Whether the optimizer clips gradients itself, so that a trainer must not."""
        return False

    def check_layerwise(self, layerwise: bool) -> None:
        """Raise ValueError if layer-wise updates are requested and the method does not support them."""
        if layerwise:
            raise ValueError(
                f"layerwise updates need a lowdim.optim method such as galore; {self.variant.name} trains with plain AdamW"
            )

    @property
    def refresh_interval(self) -> str | None:
        """The option for the number of steps after which the optimizer recomputes something (a projection), or None."""
        return None


def hyperparameters(cls: Any) -> list[str]:
    """The keyword-only parameters of a constructor: in lowdim these are the hyperparameters.

    Example:
        >>> from lowdim.layers import Monarch
        >>> from lowdim.methods.strategy import hyperparameters
        >>> hyperparameters(Monarch)
        ['nblocks', 'generator']
    """
    place = {"device", "dtype"}
    named = inspect.signature(cls).parameters.values()
    return [p.name for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in place]


def names_subclass(variant: Variant, base: type) -> bool:
    """Whether the row's target is a subclass of `base`."""
    target = variant.build() if variant.target else None
    return isinstance(target, type) and issubclass(target, base)


def adamw(parameters: Any, lr: float, setup: Setup) -> torch.optim.Optimizer:
    """Plain AdamW without decay, for all methods without their own optimizer.

    Where a parameter has 16 bits, it is `lowdim.optim.AdamW`, which does not lose small updates; with
    `setup.optimizer="adamw8bit"` it is `lowdim.optim.AdamW8bit`.
    """
    import torch

    from lowdim.optim import AdamW, AdamW8bit

    groups = list(parameters)
    if setup.optimizer == "adamw8bit":
        return AdamW8bit(groups, lr=lr, weight_decay=0.0, seed=setup.seed, master_weights=setup.master_weights)
    flat = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in flat):
        return AdamW(groups, lr=lr, weight_decay=0.0, seed=setup.seed, master_weights=setup.master_weights)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=True)
