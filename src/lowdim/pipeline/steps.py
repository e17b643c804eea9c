"""What each kind of step does to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowdim.compress import CompressionReport, last_report
from lowdim.jobs import compressor
from lowdim.jobs.budgets import Budget, fit_budget
from lowdim.jobs.tuning import replaced_parameters, train
from lowdim.modules import PackedLinear, pack_linear
from lowdim.pipeline.recipe import Cache, Decompose, Quantize, Sparsify, Tune
from lowdim.pipeline.subject import Subject
from lowdim.ranks import capped_note
from lowdim.results import json_value
from lowdim.units import format_bytes

__all__ = ["Done", "take"]

_SEARCHED = 2  # sequences on which the ranks of a cache are searched


@dataclass
class Done:
    """The result of a step.

    Attributes:
        model: after it.
        what: in words.
        layers: rows of the system's report.
        options: of the system or training.
        notes: what to look at.
        losses: of a training.
    """

    model: Any
    what: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def take(step: Any, model: Any, subject: Subject) -> Done:
    """Do a step other than export.

    Raises:
        BudgetError: the step's budget is below what its system reaches.
        ValueError, TypeError: the model has nothing that the step could work on; the layer and the reason are named.
        LowdimError: a training loss is not finite.
    """
    return _KINDS[type(step)](step, model, subject)


def _compress(step: Any, model: Any, subject: Subject) -> Done:
    method = compressor(step.system)
    batches = subject.batches(model)
    if isinstance(step, Cache):
        batches = _small_first(batches)
    config = method.build(step.options)
    spent = ""
    if step.budget is not None:
        fitted = fit_budget(method, step.options, model, batches, Budget.parse(step.budget))
        config = fitted.config
        spent = f"; budget {step.budget}: {format_bytes(fitted.allowed)} of {format_bytes(fitted.dense)} {fitted.counted}"
    model = method.function(model, config, *_arguments(method, config, batches, subject))
    report = last_report(model)
    return Done(
        model,
        f"{report.summary}{spent}",
        _rows(report),
        json_value(dataclasses.asdict(config)),
        [*capped_note(report.details.get("capped_ranks", {})), *report.notes],
    )


def _arguments(method: Any, config: Any, batches: list[Any], subject: Subject) -> tuple[Any, ...]:
    if getattr(config, "trains", False):  # LR²VQ's own training
        rows = subject.task.sample_batches(len(batches), 8, next(iter(batches[0].values())).device)
        return list(rows), subject.task.loss_fn
    return (batches,) if method.needs_batches or getattr(config, "mask_by", None) == "threshold" else ()


def _small_first(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A first batch of few sequences, on which the ranks are searched; and the rest."""
    first, *others = batches
    few = {key: value[:_SEARCHED] for key, value in first.items()}
    rest = {key: value[_SEARCHED:] for key, value in first.items()}
    return [few, *([rest] if len(next(iter(rest.values()))) else []), *others]


def _tune(step: Tune, model: Any, subject: Subject) -> Done:
    if step.parameters == "replaced":
        trained = replaced_parameters(model)
    else:
        trained = [p.requires_grad_(True) for p in model.parameters() if p.is_floating_point()]
    seed = subject.recipe.seed
    found = train(model, trained, subject.task, step.steps, step.lr, batch_size=step.batch_size, seed=seed)
    model.eval()
    what = f"{step.steps} steps on {found['trained']:,} numbers, loss {found['losses'][0]:.3f} -> {found['losses'][-1]:.3f}"
    return Done(model, what, options=step.model_dump(exclude={"step"}), losses=found["losses"])


def _quantize(step: Quantize, model: Any, subject: Subject) -> Done:
    before = dict(model.named_modules())
    pack_linear(model, step.scheme)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    rows = [
        {"name": n, "what": step.scheme, "relative_error": _error(before[n], layer), "replaced": True}
        for n, layer in packed.items()
    ]
    return Done(model, f"{step.scheme}: {len(packed)} layers that were still dense", rows, {"scheme": step.scheme})


def _error(dense: nn.Module, packed: PackedLinear) -> float:
    from lowdim.surgery import dense_matrix

    weight = dense_matrix(dense).detach().float()
    return float((weight - packed.dense_weight(weight.dtype)).norm() / weight.norm().clamp_min(1e-30))


def _rows(report: CompressionReport) -> list[dict[str, Any]]:
    return [json_value(row) for row in report.rows()]


_KINDS: dict[type, Callable[[Any, Any, Subject], Done]] = {
    Decompose: _compress,
    Cache: _compress,
    Sparsify: _compress,
    Tune: _tune,
    Quantize: _quantize,
}
