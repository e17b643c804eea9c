"""Methods that act on the whole model: shared code for attaching, training, merging and saving."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.composed import Composition, Places, compose, is_composed, places_of, refuse_spread, release
from lowdim.adapters.core.fingerprints import fingerprint
from lowdim.adapters.core.guards import refuse_missing, saved_modules, whole_parameters
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.merging import MergeReport, allow_training, change_of, held_zeros, warn_of_lost_zeros
from lowdim.adapters.core.method import ModelMethod
from lowdim.adapters.core.shared import SHARED, free_name
from lowdim.calibrate import LossFn
from lowdim.errors import NoGradientError
from lowdim.linalg import wide
from lowdim.surgery import freeze, freeze_statistics, named_layers, release_statistics, submodule, unchanged_on_error

__all__ = ["WholeAdapted", "WholeMethod", "merge_parameters", "refuse_adapted"]


class WholeMethod(ModelMethod, abstract=True):
    """A method whose trained numbers determine many parameters of the model: `θ_i = θ_i⁰ + offset_i(numbers)`.

    Subclass as a frozen dataclass and define `select` and `composition`; see `SAID` for an example.
    """

    target_modules: Any = None

    def select(self, model: nn.Module, kept: Iterable[str]) -> dict[str, nn.Parameter]:
        """The parameters that are composed, in the model's order; `kept` names modules that are trained whole."""
        raise NotImplementedError(f"{type(self).__name__} must define select(...)")

    def composition(
        self, parameters: Mapping[str, Tensor], model: nn.Module, *, seed: int, dtype: torch.dtype | None, initialise: bool
    ) -> Composition:
        """The module with the trained numbers for these parameters; `initialise=False` allocates only."""
        raise NotImplementedError(f"{type(self).__name__} must define composition(...)")

    def attach(self, model: nn.Module, **options: Any) -> Any:  # type: ignore[override]
        """`lowdim.adapt(model, self, **options)`: there is no form for one layer."""
        return self.attach_model(model, **options)

    def attach_model(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        initialise: bool = True,
        batches: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        modules_to_save: Iterable[str] = (),
    ) -> Any:
        """Freeze `model` and compose its parameters, in place; `lowdim.adapt` calls this."""
        refuse_adapted(model)
        refuse_missing(named_layers(model), values=initialise)
        kept = saved_modules(model, modules_to_save, {})
        chosen = self.select(model, kept)
        shared = self.composition(chosen, model, seed=seed, dtype=dtype, initialise=initialise)
        prints = {name: fingerprint(p) for name, p in chosen.items()} if initialise else {}
        return self.put(model, shared, prints, kept, seed)

    def put(self, model: nn.Module, shared: Composition, prints: Mapping[str, str], kept: Iterable[str], seed: int) -> Any:
        """Make the `Adapted` for a finished composition."""
        with unchanged_on_error(model):
            freeze(model)
            for name in kept:
                submodule(model, name).requires_grad_(True)
            return (self.adapted_type or WholeAdapted)(model, self, shared, prints, kept, seed)

    @classmethod
    def restored(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> WholeMethod:
        """The inverse of `config` and `saved`."""
        return cls.from_config(config)  # type: ignore[return-value]


class WholeAdapted(Adapted):
    """A model whose parameters are composed. Made by `lowdim.adapt` and `lowdim.load_adapter`.

    It adds `names` and `offsets()` to `Adapted`, and can be called. `layers` is empty.
    """

    method: WholeMethod

    def __init__(
        self,
        model: nn.Module,
        method: WholeMethod,
        shared: Composition,
        fingerprints: Mapping[str, str],
        modules_to_save: Iterable[str],
        seed: int,
    ):
        self.composition = shared
        self.places = places_of(model, shared.names)
        compose(model, shared, self.places)
        super().__init__(model, method, {}, fingerprints, modules_to_save, seed, (), shared)
        make_for_itself(model, [f"{SHARED}.{name}" for name in shared.unsaved()])
        self._before: dict[str, nn.Parameter] = {}
        self._flags: dict[nn.Parameter, bool] = {}

    @property
    def names(self) -> list[str]:
        """The composed parameters, in the model's order."""
        return self.composition.names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the composed model."""
        return self.model(*args, **kwargs)

    def offsets(self) -> dict[str, Tensor]:
        """`θ_i − θ_i⁰` of each composed parameter by name, float32 or better, differentiable in the trained numbers."""
        with whole_parameters(self.composition):
            return {name: self.composition.offset(i) for i, name in enumerate(self.names)}

    def check_gradients(self) -> None:
        """After the first backward pass: the trained numbers must have a gradient.

        Raises:
            NoGradientError: they have none.
        """
        self._awaits_gradient = False
        own = [p for p in self.composition.parameters() if p.requires_grad]
        if not self.allow_unused and own and all(p.grad is None for p in own):
            raise NoGradientError(
                f"the trained numbers of {type(self.method).__name__} got no gradient from the first backward pass. Does the "
                "loss come from adapted.model (not another copy)? With reentrant gradient checkpointing call "
                "model.enable_input_require_grads(), or use use_reentrant=False. Set allow_unused=True on the Adapted if "
                "this is intended"
            )

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """`‖θ_i − θ_i⁰‖` of each composed parameter; warns of those that are zero: they have learnt nothing."""
        norms = {name: float(torch.linalg.vector_norm(offset)) for name, offset in self._each()}
        zero = [name for name, norm in norms.items() if norm == 0.0]
        if zero:
            shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
            warnings.warn(f"the offset is zero in {len(zero)} of {len(norms)} composed parameters: {shown}", stacklevel=2)
        return norms

    def description(self) -> dict[str, Any]:
        """The description in a checkpoint; here of each composed parameter."""
        shapes = zip(self.names, self.composition.shapes)
        return {
            **super().description(),
            "parameters": {n: {"shape": list(shape), "fingerprint": self.fingerprints.get(n)} for n, shape in shapes},
            "shared": self.composition.about(),
        }

    def _attached(self) -> bool:
        return self.shared is not None

    def export(self, folder: str | Path, format: str = "peft", **options: Any) -> Any:
        """Always an error: PEFT has no adapter that changes all parameters together."""
        raise ValueError(
            f"{type(self.method).__name__} changes {len(self.names)} parameters, vectors among them, and not by a low rank: "
            "PEFT has no such adapter. merge() it and save the model"
        )

    @torch.no_grad()
    def merge(self, *, keep_mask: bool = False) -> nn.Module:
        """Give the model plain parameters `θ_i`, and return it. `merge_report` lists the changes.

        The sum is computed in float32 or better and rounded once; tied parameters stay tied. The pre-trained ones are kept for
        `unmerge()` as long as this object lives.

        Args:
            keep_mask: leave 0 what was exactly 0 in a matrix or kernel before attaching.

        Raises:
            ValueError: it is already merged, the parameters are sharded, or a merged parameter has entries that its dtype
                cannot hold. The model is then unchanged.
        """
        if self.shared is None:
            raise ValueError("the model has been merged already")
        refuse_spread([*self.composition.parameters(), *self._plain().values()])
        flags, before = {p: p.requires_grad for p in self.model.parameters()}, self._plain()
        self.merge_report = merge_parameters(self.model, self.composition, self.places, keep_mask=keep_mask)
        self._flags, self._before = flags, before
        self.drop_shared()
        release_statistics(self.model, self._statistics)
        warn_of_lost_zeros(self.merge_report.layers)
        return self.model

    def unmerge(self) -> nn.Module:
        """Undo the last `merge()`: the pre-trained parameters bit for bit, and training can continue.

        Raises:
            ValueError: nothing has been merged.
        """
        if self.shared is not None:
            raise ValueError("there is nothing to unmerge: merge() was not called, or was undone already")
        for name, parameter in self._before.items():
            for module, attribute in self.places[name]:
                module._parameters[attribute] = parameter
        self.shared = self.composition
        self.model.add_module(free_name(self.model), self.shared)
        compose(self.model, self.shared, self.places)
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._before, self._flags, self.merge_report = {}, {}, None
        self._statistics = freeze_statistics(self.model)
        return self.model

    def _plain(self) -> dict[str, nn.Parameter]:
        """The parameters as the modules hold them."""
        return {name: places[0][0]._parameters[places[0][1]] for name, places in self.places.items()}  # type: ignore[misc]

    def _each(self) -> Iterable[tuple[str, Tensor]]:
        with whole_parameters(self.composition):
            for index, name in enumerate(self.names):
                if self.composition.touches(index):
                    yield name, self.composition.offset(index)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.trainable().values())
        total = sum(p.numel() for p in self._plain().values())
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {self.method!r}, parameters={len(self.names)} of {total:,} "
            f"numbers, trained={count:,})"
        )


@torch.no_grad()
def merge_parameters(
    model: nn.Module, shared: Composition, places: Mapping[str, Places], *, keep_mask: bool = False
) -> MergeReport:
    """Replace each composed parameter by a new plain one; every parameter of the model can be trained afterwards.

    Args:
        keep_mask: leave 0 what was exactly 0 in a matrix or kernel; vectors, such as new biases, are 0 without a pattern.
    """
    changes, merged = [], {}
    for index, name in enumerate(shared.names):
        if not shared.touches(index):
            continue
        module, attribute = places[name][0]
        base = module._parameters[attribute]
        assert base is not None
        exact = wide(base) + shared.offset(index).to(base.device)
        exact, dropped = held_zeros(base, exact) if keep_mask and base.ndim > 1 else (exact, 0.0)
        merged[name] = nn.Parameter(torch.empty_like(base).copy_(exact))
        changes.append(replace(change_of(f"parameter {name}", name, base, exact, merged[name]), dropped=dropped))
    for name, parameter in merged.items():
        for holder, place in places[name]:
            holder._parameters[place] = parameter
    release(model)
    allow_training(model)
    return MergeReport(tuple(changes))


def refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model already has an adapter, or is composed."""
    if is_composed(model) or any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ValueError("model is already adapted, and a method that acts on the whole model cannot share it: merge() first")


def make_for_itself(model: nn.Module, names: Iterable[str]) -> None:
    """Keep DDP from broadcasting these buffers before every step: all processes have computed the same ones."""
    known = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(known | set(names))  # type: ignore[assignment]
