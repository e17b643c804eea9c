"""How a model is trained under one name: what is swapped in, what is trained, and by which optimizer.

`compare`, `plan` and `run` all go through `apply`, so what is forecast is what is trained.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lowdim.catalogue import Variant
from lowdim.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lowdim.adapters import Adapted
    from lowdim.calibrate import LossFn

__all__ = ["Applied", "apply", "kind_of", "total_loss", "training_extras", "with_options"]


@dataclass
class Applied:
    """A model made ready to be trained one way.

    Attributes:
        kind: `"probe"`, `"full"`, `"adapter"`, `"optimizer"` or `"layer"`.
        make_optimizer: `lr -> torch.optim.Optimizer` over the trained parameters, weight decay 0 unless the options say so.
        adapted: for adapters; its `step()` must run after each optimizer step, its `regularizer()` be added to the loss.
        make_companion: `optimizer -> companion`, or None where the method needs none. Its `step()` must run after each
            optimizer step; its `extra_loss(forward, logits)`, if it has one, be added to the loss; its `state_dict()` go into
            checkpoints.
        notes: what was left as it was, in words.
    """

    model: nn.Module
    kind: str
    variant: Variant
    make_optimizer: Callable[[float], torch.optim.Optimizer]
    adapted: Adapted | None = None
    options: dict[str, Any] = field(default_factory=dict)
    make_companion: Callable[[torch.optim.Optimizer], Any] | None = None
    notes: tuple[str, ...] = ()

    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad or getattr(p, "trainable", False))


def kind_of(variant: Variant) -> str:
    """Which of the five ways to train this is, from where its class lives."""
    if not variant.target:
        return "probe" if variant.name == "linear-probe" else "full"
    family = variant.target.partition(":")[0].split(".")[1]
    return {"adapters": "adapter", "optim": "optimizer", "layers": "layer"}[family]


def with_options(variant: Variant, options: Mapping[str, Any]) -> Variant:
    """The variant with further hyperparameters.

    Raises:
        UnknownNameError: the method has no such hyperparameter.
        ValueError, TypeError: a value that it refuses whatever the model.
    """
    if not options:
        return variant
    known = option_names(variant)
    for name in options:
        if name not in known:
            close = f"; nearest: {', '.join(nearest(str(name), known))}" if known else " (it has none)"
            raise UnknownNameError(f"method {variant.name} has no option {name!r}{close}")
    changed = dataclasses.replace(variant, options={**variant.options, **options})
    kind = kind_of(changed)
    if kind == "adapter":
        made = fill(changed, lr=1e-3, steps=1)
        if changed.build().names_targets:
            made.setdefault("target_modules", ["a_layer"])  # settled when the model is there
        changed.build()(**made)
    elif kind == "optimizer":
        import torch

        _make_optimizer(changed, torch.nn.Linear(2, 2), 1e-3)
    elif changed.companion:
        _try_companion(changed)
    return changed


def apply(
    variant: Variant,
    model: nn.Module,
    *,
    lr: float,
    steps: int,
    head: Iterable[str] = (),
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    initialise: bool = True,
    scratch: bool = False,
    extras: Mapping[str, Any] | None = None,
) -> Applied:
    """Make `model` ready to be trained by `variant`, in place.

    Args:
        lr: the rate that it will be trained with (some methods start from it).
        steps: optimizer steps in all (some methods have schedules).
        head: modules of the model that are new and always trained, e.g. `("classifier",)`.
        batches, loss_fn: sample data for methods that look at it first.
        initialise: False allocates only, for forecasts.
        scratch: training starts from random weights: structured layers draw their own.
        extras: for optimizers: `layerwise`, `accumulate`, `max_norm`, which come from how one trains and not from the method.

    Raises:
        ValueError, TypeError: from the method, naming the layer.
    """
    kind = kind_of(variant)
    if kind == "adapter":
        return _adapter(variant, model, lr, steps, tuple(head), batches, loss_fn, seed, initialise)
    if kind == "probe":
        return _probe(variant, model, tuple(head))
    if kind == "optimizer":
        return _optimizer(variant, model, lr, extras or {})
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    make_companion, notes = None, ()
    if kind == "layer":
        own, beside = split_options(variant, steps)
        left = _swap_layers(variant, model, own, fresh=scratch or not initialise, seed=seed)
        if left:
            notes = (f"{len(left)} layers stay dense, as their smaller side is not above the rank: {', '.join(left[:4])}",)
        if variant.companion:
            make_companion = functools.partial(_companion, variant, model, beside)
    options = dict(variant.options)
    return Applied(
        model,
        kind,
        variant,
        lambda rate: _adamw(model.parameters(), rate),
        options=options,
        make_companion=make_companion,
        notes=notes,
    )


def split_options(variant: Variant, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A layer variant's options: the layer's own, and its companion's (with `total_steps` filled in where it is open)."""
    if not variant.companion:
        return dict(variant.options), {}
    names = _companion_names(variant)
    beside = {name: value for name, value in variant.options.items() if name in names}
    if "total_steps" in names and beside.get("total_steps") is None:
        beside["total_steps"] = steps
    return {name: value for name, value in variant.options.items() if name not in names}, beside


def training_extras(variant: Variant, *, layerwise: bool, accumulate: int = 1, max_norm: float = 0.0) -> dict[str, Any]:
    """What an optimizer must know of how one trains: layer-wise updates, how many micro-batches, and clipping where it clips.

    An optimizer that frees gradients in the backward pass, or whose weights have none that others could see (INT8), clips by
    the norm of projected gradients itself; the trainer must then not clip.

    Raises:
        ValueError: layer-wise updates of a method that is no optimizer.
    """
    if kind_of(variant) != "optimizer":
        if layerwise:
            raise ValueError(f"layerwise updates need a lowdim.optim method such as galore; {variant.name} is none")
        return {}
    extras: dict[str, Any] = {"layerwise": True, "accumulate": accumulate} if layerwise else {}
    if max_norm and (layerwise or hasattr(variant.build(), "prepare_model")):
        extras["max_norm"] = max_norm
    return extras


def total_loss(model: nn.Module, companion: Any, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The loss of a batch with what the companion adds to it, for loops that only know a loss (`forward` runs it again).

    The logits are those of the model's output, or the output itself.
    """
    extra = getattr(companion, "extra_loss", None)
    if extra is None:
        return loss()
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(getattr(out, "logits", out)))

    def forward() -> Any:
        loss()
        return seen.pop()

    try:
        value = loss()
        return value + extra(forward, seen.pop())
    finally:
        handle.remove()


def _companion_names(variant: Variant) -> list[str]:
    import inspect

    return [name for name in inspect.signature(variant.build_companion()).parameters if name not in ("model", "optimizer")]


def _companion(variant: Variant, model: nn.Module, options: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    return variant.build_companion()(model=model, optimizer=optimizer, **options)


def _try_companion(variant: Variant) -> None:
    """What it refuses whatever the model, it refuses now."""
    import torch

    rank = {name: 1 for name in ("rank", "nblocks") if name in variant.options}
    trial = dataclasses.replace(variant, options={**variant.options, **rank, "target_modules": None})
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    applied = apply(trial, model, lr=1e-3, steps=1000, scratch=True)
    assert applied.make_companion is not None
    applied.make_companion(applied.make_optimizer(1e-3))


def fill(variant: Variant, *, lr: float, steps: int) -> dict[str, Any]:
    """The variant's options, with `lr` and `total_steps` filled in where the method has such fields and they are open."""
    names = option_names(variant)
    options = dict(variant.options)
    if "total_steps" in names and options.get("total_steps") is None:
        options["total_steps"] = steps
    if "lr" in names and "lr" not in options:
        options["lr"] = lr
    return options


def _adapter(
    variant: Variant,
    model: nn.Module,
    lr: float,
    steps: int,
    head: tuple[str, ...],
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    seed: int,
    initialise: bool,
) -> Applied:
    from lowdim.adapters import adapt

    options = fill(variant, lr=lr, steps=steps)
    if variant.build().names_targets and not options.get("target_modules"):
        options["target_modules"] = _columns(variant, model, head)
    method = _beside(variant.build()(**options), model, head)
    samples = None if batches is None else list(batches)  # read twice: at attaching, and by methods that search first
    adapted = adapt(model, method, batches=samples, loss_fn=loss_fn, modules_to_save=head, seed=seed, initialise=initialise)
    if initialise:
        adapted.before_training(samples or [], loss_fn, lr, steps)
    return Applied(model, "adapter", variant, lambda rate: _adamw(adapted.param_groups(rate), rate), adapted, options)


def _columns(variant: Variant, model: nn.Module, head: tuple[str, ...]) -> list[str]:
    """What the layers that can be adapted are called in each block (`"query"`, `"value"`), for methods that must be told."""
    from lowdim.adapters import LoRA
    from lowdim.adapters.core.attach import target_layers
    from lowdim.adapters.core.layer import kind_of as kind_of_layer

    chosen = target_layers(model, _beside(LoRA(), model, head))
    takes = variant.build().takes
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name, layer in chosen.items() if kind_of_layer(layer) in takes))


def _beside(method: Any, model: nn.Module, head: tuple[str, ...]) -> Any:
    """The method, kept off the layers of a head that is trained whole (a new pooler, say) where it would take every layer."""
    from lowdim.adapters import ModelMethod
    from lowdim.adapters.core.attach import target_layers

    if isinstance(method, ModelMethod) or method.target_modules not in (None, "all-linear"):
        return method
    found = list(target_layers(model, method))
    outside = [name for name in found if not any(name == h or name.startswith(f"{h}.") for h in head)]
    return method if outside == found else dataclasses.replace(method, target_modules=outside)


def _probe(variant: Variant, model: nn.Module, head: tuple[str, ...]) -> Applied:
    from lowdim.surgery import freeze

    if not head:
        raise ValueError("linear-probe needs a head: the model has no module that is trained on top of frozen features")
    freeze(model)
    for name in head:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(True)
    return Applied(model, "probe", variant, lambda rate: _adamw([p for p in model.parameters() if p.requires_grad], rate))


def _optimizer(variant: Variant, model: nn.Module, lr: float, extras: Mapping[str, Any]) -> Applied:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    prepare = getattr(variant.build(), "prepare_model", None)
    if prepare is not None:  # weights of another kind (INT8)
        model = prepare(model, rank=variant.options["rank"])
    trial = _make_optimizer(variant, model, lr, extras)  # what it refuses, it refuses now, and not when the training has begun
    getattr(trial, "remove_hooks", lambda: None)()  # those of layerwise updates would work on without it
    make = functools.partial(_make_optimizer, variant, model, extras=extras)
    return Applied(model, "optimizer", variant, make, options=dict(variant.options))


def _make_optimizer(
    variant: Variant, model: nn.Module, lr: float, extras: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    from lowdim.optim import param_groups

    options = {**variant.options, **(extras or {})}
    rank = options.pop("rank")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a model without a matrix to project
        return variant.build()(param_groups(model, rank=rank), lr=lr, **options)


def _swap_layers(variant: Variant, model: nn.Module, options: dict[str, Any], *, fresh: bool, seed: int) -> list[str]:
    """Returns the names of layers that stay dense, since no rank would make them smaller."""
    import inspect

    from lowdim.layers import swap_linear

    cls, targets = variant.build(), options.pop("target_modules", None)
    if fresh and "seed" in inspect.signature(cls).parameters:
        options.setdefault("seed", seed)
    left: list[str] = []
    if targets is None and "rank" in options:
        targets, left = _above_rank(model, options["rank"])
    swap_linear(model, cls, targets, fresh=fresh, **options)
    return left


def _above_rank(model: nn.Module, rank: int) -> tuple[list[str] | None, list[str]]:
    """The layers whose smaller side is above the rank, and the others, which a factorization would not make smaller.

    `(None, [])` where all are, or none is: the layer's own error then says what rank is possible.
    """
    from lowdim.surgery import find_layers, is_linear, matrix_shape, without_tied

    layers, _ = without_tied(model, find_layers(model, accept=is_linear), named=False)
    large = [name for name, layer in layers.items() if min(matrix_shape(layer)) > rank]
    if not large or len(large) == len(layers):
        return None, []
    return large, [name for name in layers if name not in set(large)]


def _adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def option_names(variant: Variant) -> list[str]:
    if not variant.target:
        return []
    import inspect

    kind, cls = kind_of(variant), variant.build()
    if kind == "adapter":
        return [f.name for f in dataclasses.fields(cls)]
    names = list(inspect.signature(cls).parameters)
    if kind == "layer":
        own = [n for n in names if n not in ("in_features", "out_features", "bias", "device", "dtype")]
        return ["target_modules", *own, *(_companion_names(variant) if variant.companion else ())]
    if "how" in names:  # what is said of how one trains is no hyperparameter, but for these
        names[names.index("how") :] = ["stagger", "foreach"]
    return [n for n in names if n not in ("params", "lr", "layerwise", "accumulate", "max_norm")]
