"""Adapters: the model is frozen, and low-dimensional updates of its layers are trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lowdim.adapters import LoRA, Method, ModelMethod, adapt
from lowdim.adapters.core.attach import target_layers
from lowdim.adapters.core.layer import kind_of
from lowdim.adapters.core.whole import WholeMethod
from lowdim.catalogue import Variant
from lowdim.diagnose import farms_ranks
from lowdim.errors import NoMatchingModuleError
from lowdim.methods.applied import Applied
from lowdim.methods.exponents import layer_exponents
from lowdim.methods.setup import Setup
from lowdim.methods.strategy import Strategy, adamw, names_subclass
from lowdim.modules import quantized_scheme
from lowdim.ranks import capped_note
from lowdim.surgery import matrix_shape

__all__ = ["AdapterStrategy"]


class AdapterStrategy(Strategy):
    """Trains a `lowdim.adapters` method."""

    kind: ClassVar[str] = "adapter"
    target: ClassVar[str] = "a lowdim.adapters Method"

    def fits(self) -> bool:
        """A subclass of `Method`."""
        return names_subclass(self.variant, Method)

    def option_names(self) -> list[str]:
        """The fields of the method's dataclass."""
        return [field.name for field in dataclasses.fields(self.variant.build())]

    def sample_batches(self, steps: int) -> int:
        """The number that the method asks for."""
        return self.variant.build().sample_batches(steps)

    def refuses_quantized(self) -> str | None:
        """A method that composes every parameter of the model needs them as numbers."""
        if not issubclass(self.variant.build(), WholeMethod):
            return None
        return f"{self.variant.label} composes the base's weights anew in each pass, which then cannot be kept in few bits"

    def at_rank(self, rank: int) -> Variant | None:
        """As the method defines it: LaMDA++ scales its choices, FLoRA has one rank per dimension."""
        options = self.variant.build().at_rank(self.variant.options, rank)
        return None if options is None else dataclasses.replace(self.variant, options=options)

    def check(self) -> None:
        """Build the method."""
        self._trial()

    def _trial(self) -> Any:
        """The method as it is for every model."""
        options = self.filled(Setup(lr=1e-3, steps=1))
        if self.variant.build().names_targets:
            options.setdefault("target_modules", ["a_layer"])  # a placeholder until the model is known
        return self.variant.build()(**options)

    def ranks_by_layer(self) -> bool:
        """As the method says."""
        return bool(self._trial().ranks_by_layer)

    def layer_ranks(self, model: nn.Module, setup: Setup) -> dict[str, int]:
        """From the exponents of its layers, at the number of trained parameters that the method's rank gives."""
        return self._by_exponents(model, _outside(self._trial(), model, setup.head), setup)

    def _by_exponents(self, model: nn.Module, method: Any, setup: Setup) -> dict[str, int]:
        self.check_ranks()
        alphas = self._exponents(model, setup)
        shapes = {n: matrix_shape(layer) for n, layer in target_layers(model, method).items() if n in alphas}
        if len(shapes) < 2:
            only = f", {next(iter(shapes))}," if shapes else ""
            raise ValueError(
                f"{self.variant.label}: ranks by layer need at least two layers with an exponent; it adapts "
                f"{len(shapes)}{only} that has one"
            )

        @functools.cache
        def trained(out_features: int, in_features: int, rank: int) -> int:
            how: dict[str, Any] = {"stats": {"rank": rank}, "dtype": torch.float32, "device": torch.device("meta")}
            return sum(p.numel() for p in method.blank(out_features, in_features, **how).parameters() if p.requires_grad)

        if method.rank is None:
            raise ValueError(f"{self.variant.label} chooses a rank for each layer itself; its option rank gives one to vary")
        ranks = farms_ranks([alphas[name] for name in shapes], list(shapes.values()), method.rank, cost=trained)
        return dict(zip(shapes, ranks, strict=True))

    def _exponents(self, model: nn.Module, setup: Setup) -> Mapping[str, float]:
        """Those of the variant, or measured on the model."""
        if self.variant.exponents:
            return self.variant.exponents
        if not setup.initialise:
            raise ValueError(f"{self.variant.label}: ranks by layer follow from the weights, and there are shapes alone")
        found = layer_exponents(model, setup.head)
        found.refuse_few()
        return found.alphas

    def filled(self, setup: Setup) -> dict[str, Any]:
        """The options, with `lr`, `total_steps` and `warmup_steps` from the training if they are fields and not set."""
        names, options = self.option_names(), dict(self.variant.options)
        training = {"lr": setup.lr, "total_steps": setup.steps, "warmup_steps": setup.warmup_steps or None}
        return {
            **options,
            **{n: value for n, value in training.items() if n in names and value is not None and options.get(n) is None},
        }

    def apply(self, model: nn.Module, setup: Setup) -> Applied:
        """Attach the method to the layers that it names, or to every layer outside the head."""
        self.check_quantize(quantized_scheme(model))
        options = self.filled(setup)
        if self.variant.build().names_targets and not options.get("target_modules"):
            options["target_modules"] = self._columns(model, setup.head)
        method = _outside(self.variant.build()(**options), model, setup.head)
        ranks = None if self.variant.ranks == "uniform" else self._by_exponents(model, method, setup)
        samples = None if setup.batches is None else list(setup.batches)  # read twice: when attaching, and by a search
        adapted = adapt(
            model,
            method,
            batches=samples,
            loss_fn=setup.loss_fn,
            modules_to_save=setup.head,
            seed=setup.seed,
            initialise=setup.initialise,
            cap_rank=True,  # one small layer must not stop a command
            ranks=ranks,
        )
        applied = Applied(model, self.variant, lambda lr: adamw(adapted.param_groups(lr), lr, setup), adapted, options)
        applied.capped_ranks = adapted.capped_ranks
        applied.notes = capped_note(adapted.capped_ranks)
        if ranks:
            applied.layer_ranks = ranks
            applied.notes += (ranks_note(ranks, list(adapted.layers)),)
        if setup.initialise:
            applied.spent = adapted.before_training(
                samples or [], setup.loss_fn, setup.lr, setup.steps, lambda weights, lr: adamw(weights, lr, setup)
            )
        if applied.spent:
            applied.notes += (f"{applied.spent} of {setup.steps} steps go to the method's own search before the training",)
        return applied

    def _columns(self, model: nn.Module, head: tuple[str, ...]) -> list[str]:
        """The names of the adaptable layers in each block (`"query"`, `"value"`), for methods that need names."""
        chosen = target_layers(model, _outside(LoRA(), model, head))
        takes = self.variant.build().takes
        return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name, layer in chosen.items() if kind_of(layer) in takes))


def ranks_note(ranks: Mapping[str, int], layers: Sequence[str]) -> str:
    """What ranks by layer came out, and which layers keep the method's.

    Example:
        >>> from lowdim.methods.adapter import ranks_note
        >>> ranks_note({"0": 4, "2": 12}, ["0", "2"])
        'ranks by layer from FARMS: 4 (0) to 12 (2)'
    """
    low, high = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
    left = [name for name in layers if name not in ranks]
    more = f" and {len(left) - 4} more" if len(left) > 4 else ""
    rest = f"; not measured, and so at the method's own rank: {', '.join(left[:4])}{more}" if left else ""
    return f"ranks by layer from FARMS: {ranks[low]} ({low}) to {ranks[high]} ({high}){rest}"


def _outside(method: Any, model: nn.Module, head: tuple[str, ...]) -> Any:
    """The method, excluding the layers of a head that is trained whole (such as a new pooler) if it selects every layer."""
    if isinstance(method, ModelMethod) or method.target_modules not in (None, "all-linear"):
        return method
    found = list(target_layers(model, method))
    outside = [name for name in found if not any(name == h or name.startswith(f"{h}.") for h in head)]
    if not outside:
        kinds = ", ".join(sorted(method.takes))
        raise NoMatchingModuleError(
            f"{type(method).__name__} adapts {kinds} layers, and {type(model).__name__} has none outside its new head; choose "
            "another method"
        )
    return method if outside == found else dataclasses.replace(method, target_modules=outside)
