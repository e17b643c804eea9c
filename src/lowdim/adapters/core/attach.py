"""`lowdim.adapt(model, method)`: freeze a model and put adapted layers in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.composed import is_composed
from lowdim.adapters.core.fingerprints import layer_fingerprint
from lowdim.adapters.core.guards import (
    error_context,
    plain_model,
    refuse_missing,
    saved_modules,
    tied_layers,
)
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.method import Method, ModelMethod
from lowdim.calibrate import LossFn, collect, has_statistics
from lowdim.errors import check_int, unknown, warn_caller
from lowdim.garbage import paused_gc
from lowdim.linalg import stream
from lowdim.surgery import (
    CONVOLUTIONS,
    Patterns,
    behaviour,
    find_layers,
    float_dtype,
    freeze,
    is_linear_class,
    is_quantized,
    known_dtype,
    replace_layers,
    submodule,
    unchanged_on_error,
    unreached_note,
)

__all__ = ["adapt", "put_in_place", "target_layers"]


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
    cap_rank: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> Adapted:
    """Freeze `model` and attach `method` to the layers it names, in place.

    Args:
        model: any nn.Module. What it is wrapped in (`torch.compile`, data parallelism) is looked through: names are those of
            the plain model, which is also `Adapted.model`; train with the wrapper as before.
        method: hyperparameters, e.g. `lowdim.adapters.LoRA(rank=8, target_modules=["q_proj", "v_proj"])`.
        batches: sample batches, for methods that need data first (consumed once).
        loss_fn: `loss_fn(model, batch) -> scalar`, a mean over the batch, for methods that need a gradient.
        modules_to_save: modules that are trained and saved whole, e.g. a new classification head.
        seed: every random start is drawn from (seed, layer name), so it does not depend on the order of layers.
        dtype: of the trained tensors; None uses each weight's. float32 over a bfloat16 model trains more accurately.
        initialise: False allocates only (forecasts).
        cap_rank: where the method needs a rank of at most min(out, in) and a layer's is smaller, adapt that layer at its own
            limit; `capped_ranks` of the result lists these layers. Methods that take any rank (LoRA) are not changed.
        ranks: layer -> its rank instead of the method's, of any of the layers; for methods with ranks by layer (LoRA, ALLoRA,
            SoRA, LaMDA, SVFit, LoLDU, CorDA, LoRA-SB, LoRA-XS). The scale of LoRA and SoRA stays that of the method's rank.

    Returns:
        An `Adapted`.

    Raises:
        NoMatchingModuleError: a pattern of `target_modules` or `modules_to_save` matches nothing.
        UnknownNameError: `ranks` names a layer that is not adapted.
        ValueError, TypeError: from the method, with the layer's name (a rank above its limit, unless `cap_rank`); a model
            whose weights are not in memory, that carries another library's adapter, or that is wrapped for several processes.

    Warns where weights of the model cannot be adapted (experts stacked in one parameter), with their names and share.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=1))
        >>> list(adapted.layers)
        ['0']
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a lowdim.adapters method such as LoRA(rank=8); got {method!r}")
    model = plain_model(model)
    if isinstance(method, ModelMethod):
        _checked(ranks, method, {})
        return method.attach_model(
            model,
            seed=seed,
            dtype=dtype,
            initialise=initialise,
            batches=batches,
            loss_fn=loss_fn,
            modules_to_save=modules_to_save,
        )
    if is_composed(model):
        raise ValueError("a method that acts on the whole model (SAID, aTLAS) is already attached; merge() it first")
    layers = target_layers(model, method)
    given = _checked(ranks, method, layers)
    refuse_missing(layers, values=initialise)
    note = unreached_note(model, layers, None if method.target_modules in (None, "all-linear") else method.target_modules)
    if note:
        warn_caller(note)
    kept = saved_modules(model, modules_to_save, layers)
    fingerprints = _fingerprints(method, layers) if initialise else {}
    with torch.enable_grad():
        stats = collect(model, layers, method.needs, batches, loss_fn) if initialise else {name: {} for name in layers}
    prepared = method.prepare(layers, seed=seed, initialise=initialise)
    for name, rank in given.items():
        prepared[name]["rank"] = rank
    shared = method.shared(layers, seed=seed, initialise=initialise)
    limits = {name: method.capped_rank(layer, prepared[name]) for name, layer in layers.items()} if cap_rank else {}
    capped = {name: rank for name, rank in limits.items() if rank is not None}

    def wrap() -> dict[str, AdaptedLayer]:
        attached = {}
        for name, layer in layers.items():
            with error_context(type(method).__name__, name, layer):
                attached[name] = method.attach(
                    layer,
                    # popped: a gradient or covariance is as large as the weight, so it is freed as soon as possible
                    stats={**stats.pop(name), **prepared.pop(name), **({"rank": capped[name]} if name in capped else {})},
                    generator=stream(seed, type(method).__name__, name),
                    dtype=dtype,
                    initialise=initialise,
                )
        return attached

    adapted = put_in_place(
        model, method, wrap, layers=layers, fingerprints=fingerprints, modules_to_save=kept, seed=seed, shared=shared
    )
    adapted.capped_ranks = capped
    adapted.layer_ranks = {name: rank for name, rank in given.items() if name not in capped}
    return adapted


def _checked(ranks: Mapping[str, int] | None, method: Method, layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The ranks of single layers."""
    if ranks and not method.ranks_by_layer:
        raise ValueError(f"ranks: {type(method).__name__} has one rank for all layers, or none; leave ranks out")
    for name, rank in (ranks or {}).items():
        if name not in layers:
            raise unknown("ranks: layer", name, layers)
        check_int(f"ranks[{name!r}]", rank, 1)
    return dict(ranks or {})


def _fingerprints(method: Method, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    found = {}
    for name, layer in layers.items():
        with error_context(type(method).__name__, name, layer):
            found[name] = layer_fingerprint(layer)
    return found


@paused_gc()
def put_in_place(
    model: nn.Module,
    method: Method,
    wrap: Callable[[], dict[str, AdaptedLayer]],
    *,
    layers: Mapping[str, nn.Module],
    fingerprints: Mapping[str, str],
    modules_to_save: Iterable[str],
    seed: int,
    shared: nn.Module | None,
) -> Adapted:
    """Freeze the model, wrap its layers with `wrap()`, swap the wrapped ones in, unfreeze the modules that are trained whole.

    The model is untouched if `wrap` fails.
    """
    tied = tied_layers(model, layers)
    first = not any(isinstance(module, AdaptedLayer) for module in model.modules())
    with unchanged_on_error(model):
        if first:  # otherwise everything that is not trained is already frozen
            freeze(model)
        wrapped = wrap()
    silent = [layer for layer in wrapped.values() if is_quantized(layer.plain) and known_dtype(layer.plain) is None]
    dtype = float_dtype(model) if silent else None
    for layer in silent:
        layer.output_dtype = dtype
    replace_layers(model, wrapped)
    for name in modules_to_save:
        for parameter in submodule(model, name).parameters():
            parameter.requires_grad_(True)
    return (method.adapted_type or Adapted)(model, method, wrapped, fingerprints, modules_to_save, seed, tied, shared)


@paused_gc()
def target_layers(model: nn.Module, method: Method) -> dict[str, nn.Module]:
    """The layers that the method's `target_modules` name in this model; an already adapted layer counts as one layer."""
    patterns: Patterns = method.target_modules
    everything = patterns is None or patterns == "all-linear"
    inside = {
        part for layer in model.modules() if isinstance(layer, AdaptedLayer) for part in layer.modules() if part is not layer
    }

    def accept(layer: nn.Module) -> bool:
        if layer in inside:
            return False
        if isinstance(layer, AdaptedLayer):
            return method.accepts(layer)
        if everything and not (is_linear_class(layer) or isinstance(layer, CONVOLUTIONS)):
            return False
        if everything and not has_statistics(layer, method.needs):
            return False
        return method.accepts(layer) and not behaviour(layer).reason

    return find_layers(model, patterns, accept=accept)
