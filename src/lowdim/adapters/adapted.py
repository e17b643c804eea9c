"""`lowdim.adapt(model, method)`: freeze a model, put adapted layers in place, and hold what belongs to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.base import AdaptedLayer, Method, ModelMethod
from lowdim.adapters.guards import fingerprint, leave_fused_paths, naming, tied_layers, unchanged_on_error
from lowdim.calibrate import LossFn, collect
from lowdim.errors import NoMatchingModuleError, nearest
from lowdim.linalg import stream
from lowdim.surgery import (
    Patterns,
    find_layers,
    freeze,
    is_matrix_layer,
    replace_layer,
    weight_matrix,
)

__all__ = ["SHARED", "Adapted", "LayerChange", "MergeReport", "adapt"]

#: Under which name a method's shared module stands in the model.
SHARED = "lowdim_shared"


@dataclass(frozen=True)
class LayerChange:
    """What merging changed in one layer: `‖ΔW‖_F / ‖W₀‖_F`, and the largest error of rounding once to the weight's dtype."""

    layer: str
    relative_change: float
    largest_change: float
    rounding_error: float


@dataclass(frozen=True)
class MergeReport:
    """The layers that a merge changed, and which tied weights it had to separate."""

    layers: tuple[LayerChange, ...]
    untied: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        return {"layers": [vars(change) for change in self.layers], "untied": list(self.untied)}

    def __str__(self) -> str:
        lines = [f"{'layer':<48} {'|dW|/|W|':>10} {'max':>10} {'rounding':>10}"]
        lines += [
            f"{c.layer:<48} {c.relative_change:10.3e} {c.largest_change:10.3e} {c.rounding_error:10.3e}" for c in self.layers
        ]
        return "\n".join([*lines, *(f"untied: {name}" for name in self.untied)])


class Adapted:
    """A model with adapted layers in it. Made by `lowdim.adapt` and `lowdim.load_adapter`.

    Attributes:
        model: the model that was given, layers swapped in place; train it with any loop.
        layers: name -> AdaptedLayer.
        method: the hyperparameters.
        modules_to_save: names of further modules that are trained and saved whole (a new head).
        fingerprints: name -> digest of the weight before attaching.
        tied: names of adapted layers whose weight was another module's too before attaching.
        shared: the module that all layers have in common, if the method has one; it stands in the model as `lowdim_shared`.
        merge_report: what the last `merge()` changed.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        layers: Mapping[str, AdaptedLayer],
        fingerprints: Mapping[str, str],
        modules_to_save: Iterable[str],
        seed: int,
        tied: Iterable[str] = (),
        shared: nn.Module | None = None,
    ):
        self.model, self.method, self.layers, self.seed = model, method, dict(layers), seed
        self.fingerprints, self.modules_to_save = dict(fingerprints), tuple(modules_to_save)
        self.tied, self.shared = frozenset(tied), shared
        if shared is not None:
            model.add_module(SHARED, shared)
            for name, layer in self.layers.items():
                layer.update.connect(shared, name)
        self._fused = leave_fused_paths(model, self.layers.values())
        self.merge_report: MergeReport | None = None

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Once after each optimizer step: advances schedules, allocates ranks, applies proximal steps."""
        for layer in self.layers.values():
            layer.update.step()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name in the model.

        A parameter that a schedule has frozen by now stays among them, so an optimizer made after a resume has the groups of
        the run that it continues; without a gradient it is not touched.
        """
        own = {id(p) for layer in self.layers.values() for p in layer.update.parameters()}
        own |= set() if self.shared is None else {id(p) for p in self.shared.parameters()}
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad or id(p) in own}

    def param_groups(self, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups for all trained parameters, with the rates the method asks for.

        Parameters on which decay would pull the pre-trained weight towards zero get `weight_decay=0`, and a warning if one
        was asked for.
        """
        protected = {
            id(parameter)
            for layer in self.layers.values()
            for name, parameter in layer.update.named_parameters()
            if name in layer.update.no_decay
        }
        if protected and weight_decay:
            warnings.warn(
                f"weight_decay={weight_decay} is not applied to {type(self.method).__name__}'s parameters that stand for the "
                "pre-trained weight itself; it would pull that weight towards zero",
                stacklevel=2,
            )
        groups = []
        for group in self.method.param_groups(self.trainable(), lr):
            plain = [p for p in group["params"] if id(p) not in protected]
            guarded = [p for p in group["params"] if id(p) in protected]
            if plain:
                groups.append({**group, "params": plain, **({} if weight_decay is None else {"weight_decay": weight_decay})})
            if guarded:
                groups.append({**group, "params": guarded, "weight_decay": 0.0})
        return groups

    def regularizer(self) -> Tensor | float:
        """A scalar to add to the loss, or 0."""
        terms = [term for layer in self.layers.values() if (term := layer.update.regularizer()) is not None]
        return torch.stack(terms).sum() if terms else 0.0

    def check(self) -> dict[str, float]:
        """`‖ΔW‖_F` of each layer; warns of layers whose ΔW is zero, which have learnt nothing."""
        norms = {name: layer.delta_norm() for name, layer in self.layers.items()}
        zero = [name for name, norm in norms.items() if norm == 0.0]
        if zero:
            shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
            warnings.warn(f"ΔW is zero in {len(zero)} of {len(norms)} adapted layers: {shown}", stacklevel=2)
        return norms

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: each update's, and the modules that are saved whole."""
        state = {
            f"{name}.update.{key}": value for name, layer in self.layers.items() for key, value in layer.update.saved().items()
        }
        if self.shared is not None:
            state.update({f"{SHARED}.{key}": value for key, value in self.shared.state_dict().items()})
        for module in self.modules_to_save:
            state.update({f"{module}.{key}": value for key, value in self.model.get_submodule(module).state_dict().items()})
        return state

    def save(self, folder: str | Path) -> Path:
        """Write `adapter.safetensors` and `adapter.json`, atomically; returns the folder."""
        from lowdim.adapters.checkpoint import save

        return save(self, folder)

    def export(self, folder: str | Path, format: str = "peft", **options: Any) -> Any:
        """Write the adapter for another tool; returns what was lost. See `lowdim.adapters.peft_format.to_peft`."""
        from lowdim.adapters.peft_format import to_peft
        from lowdim.errors import check_choice

        check_choice("format", format, ("peft",))
        return to_peft(self, folder, **options)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Put plain layers with `W_eff` back into the model, and return it. `merge_report` says what changed.

        Merging runs in float32 or better and rounds once. A weight that is tied to another (an output head to the
        embedding) can no longer be shared: it is separated, `config.tie_word_embeddings` is set to False, and the report
        says so.
        """
        changes: list[LayerChange] = []
        for name, layer in self.layers.items():
            before, after = layer.original_weight(), layer.effective_weight()
            plain = layer.merged()
            wide = before.to(after.dtype)
            size = float(torch.linalg.matrix_norm(wide)) or 1.0
            changes.append(
                LayerChange(
                    name,
                    float(torch.linalg.matrix_norm(after - wide)) / size,
                    float((after - wide).abs().max()),
                    float((weight_matrix(plain).to(after.dtype) - after).abs().max()),
                )
            )
            for parameter in plain.parameters():
                parameter.requires_grad_(True)
            replace_layer(self.model, name, plain)
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        if self.shared is not None:
            delattr(self.model, SHARED)
            self.shared = None
        for module, name, value in self._fused:
            setattr(module, name, value)
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "tie_word_embeddings", False) and self._head_stands_alone():
            config.tie_word_embeddings = False
        self.merge_report = MergeReport(tuple(changes), tuple(name for name in self.layers if name in self.tied))
        self.layers = {}
        return self.model

    def _head_stands_alone(self) -> bool:
        ends: list[Any] = []
        for side in ("output", "input"):
            getter = getattr(self.model, f"get_{side}_embeddings", None)
            ends.append(getter() if callable(getter) else None)
        return None not in ends and ends[0].weight is not ends[1].weight

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.trainable().values())
        return f"Adapted({type(self.model).__name__}, {self.method!r}, layers={len(self.layers)}, trained={count:,})"


def adapt(
    model: nn.Module,
    method: Method,
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    modules_to_save: Iterable[str] = (),
    seed: int = 0,
    dtype: torch.dtype | None = None,
    initialise: bool = True,
) -> Adapted:
    """Freeze `model` and attach `method` to the layers it names, in place.

    Args:
        model: any nn.Module.
        method: hyperparameters, e.g. `lowdim.adapters.LoRA(rank=8, target_modules=["q_proj", "v_proj"])`.
        batches: sample batches, for methods that look at data first (consumed once).
        loss_fn: `loss_fn(model, batch) -> scalar`, a mean over the batch, for methods that need a gradient.
        modules_to_save: modules that are trained and saved whole, e.g. a new classification head.
        seed: every random start is drawn from (seed, layer name), so it does not depend on the order of layers.
        dtype: of the trained tensors; None takes each weight's. float32 over a bfloat16 model trains more exactly.
        initialise: False allocates only (forecasts).

    Returns:
        An `Adapted`.

    Raises:
        NoMatchingModuleError: a pattern of `target_modules` or `modules_to_save` matches nothing.
        ValueError, TypeError: from the method, with the layer's name.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=1))
        >>> list(adapted.layers)
        ['0']
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a lowdim.adapters method such as LoRA(rank=8); got {method!r}")
    present = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if present:
        raise ValueError(f"model is adapted already (layer {present[0]}); merge() it first")
    if isinstance(method, ModelMethod):
        return method.attach_model(
            model,
            seed=seed,
            dtype=dtype,
            initialise=initialise,
            batches=batches,
            loss_fn=loss_fn,
            modules_to_save=modules_to_save,
        )
    layers = target_layers(model, method)
    kept = _saved_modules(model, modules_to_save, layers)
    fingerprints = {name: fingerprint(weight_matrix(layer)) for name, layer in layers.items()} if initialise else {}
    tied = tied_layers(model, layers)
    with torch.enable_grad():
        stats = collect(model, layers, method.needs, batches, loss_fn) if initialise else {name: {} for name in layers}
    prepared = method.prepare(layers, seed=seed, initialise=initialise)
    shared = method.shared(layers, seed=seed, initialise=initialise)
    attached = {}
    with unchanged_on_error(model):
        freeze(model)
        for name, layer in layers.items():
            with naming(type(method).__name__, name, layer):
                attached[name] = method.attach(
                    layer,
                    # popped: a gradient or covariance is as large as the weight, so none is held longer than needed
                    stats={**stats.pop(name), **prepared.pop(name)},
                    generator=stream(seed, type(method).__name__, name),
                    dtype=dtype,
                    initialise=initialise,
                )
    for name, layer in attached.items():
        replace_layer(model, name, layer)
    for name in kept:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(True)
    return method.adapted_type()(model, method, attached, fingerprints, kept, seed, tied, shared)


def target_layers(model: nn.Module, method: Method) -> dict[str, nn.Module]:
    """The layers that the method's `target_modules` name in this model."""
    patterns: Patterns = method.target_modules
    everything = patterns is None or patterns == "all-linear"
    return find_layers(
        model, patterns, accept=(lambda m: is_matrix_layer(m) and method.accepts(m)) if everything else method.accepts
    )


def _saved_modules(model: nn.Module, names: Iterable[str], layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    modules = [name for name, _ in model.named_modules() if name]
    kept = []
    for pattern in names:
        found = [name for name in modules if name == pattern or name.endswith("." + pattern)]
        if not found:
            raise NoMatchingModuleError(
                f"modules_to_save: {pattern!r} matches no module; nearest names: {', '.join(nearest(pattern, modules))}"
            )
        kept += found
    for name in kept:
        inside = [layer for layer in layers if layer == name or layer.startswith(name + ".")]
        if inside:
            raise ValueError(
                f"modules_to_save: {name!r} holds the adapted layer {inside[0]}; a layer is adapted or saved whole, not both"
            )
    return tuple(dict.fromkeys(kept))
