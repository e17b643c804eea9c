"""Compress a trained language model: measure, compress, tune if requested, measure again, write.

It is above `train` and not in `lowdim.compress`, because a family imports neither models nor training.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowdim.errors import check_float, check_int
from lowdim.jobs.budgets import Budget, Fitted, check_budget_options, fit_budget, looks_at_samples
from lowdim.jobs.ratios import check_ratios, with_ratios
from lowdim.jobs.systems import Compressor, compressor
from lowdim.jobs.tuning import train
from lowdim.outputs import new_folder
from lowdim.ranks import capped_note
from lowdim.records import CompressionRecord
from lowdim.results import Result, json_value
from lowdim.surgery import model_device

if TYPE_CHECKING:
    from torch import nn

    from lowdim.compress import CompressionReport
    from lowdim.train.tasks import Task

__all__ = ["CompressOutcome", "CompressSettings", "compress"]

#: Sequences for a method that needs samples, if `samples` is not set.
SAMPLES = 200
_BATCH = 8
_RATE = 5e-5


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """One compression.

    Attributes:
        model: a folder, a hub id, or a built-in name.
        data: text from the model's domain: files, or `lowdim:shakespeare`.
        text: name of the text column; None detects it.
        out: the folder that is written.
        method: a name of `lowdim list compress`.
        options: fields of the method's config; others have the row's or the config's defaults.
        budget: a share of the dense model such as `0.5x`, or a size such as `60MiB`, for which the method's ranks or sparsities
            are found layer by layer (`lowdim.jobs.budgets`). None: the options say them.
        ratios: `"uniform"`, or `"farms"`: the share of each layer that is left out follows its tail exponent, at the method's
            share of all together (`lowdim.jobs.ratios`).
        tune_steps: optimizer steps of tuning afterwards, for the parameters that the method leaves trainable; None: no tuning.
        stage_steps: optimizer steps in which the dense model teaches the compressed one, for a method with such a stage.
        lr: learning rate of the tuning or stage; None means 5e-5.
        samples: sequences for the method (None: 200), or for tuning (None: all).
        max_length: tokens in a sequence.
        dense: write the dense equivalent, which loads without lowdim.

    Raises:
        ValueError: a value out of range, or one that would not be used.

    Example:
        >>> from lowdim.jobs import CompressSettings
        >>> CompressSettings(model="stories260k", data=("lowdim:shakespeare",), out="small", options={"rank_ratio": 0.5}).method
        'lord'
    """

    model: str
    data: tuple[str, ...]
    out: str | Path
    text: str | None = None
    method: str = "lord"
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str | None = None
    ratios: str = "uniform"
    tune_steps: int | None = None
    stage_steps: int | None = None
    lr: float | None = None
    samples: int | None = None
    max_length: int = 128
    dense: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data must name at least one file")
        check_int("--max-length", self.max_length, 4)
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.samples is not None:
            check_int("--samples", self.samples, 1)
        if self.tune_steps is not None:
            check_int("--tune-steps", self.tune_steps, 1)
        if self.stage_steps is not None:
            check_int("--stage", self.stage_steps, 1)
        if self.lr is not None:
            check_float("--lr", self.lr, 0.0, low_open=True)
            if self.tune_steps is None and self.stage_steps is None:
                raise ValueError("--lr is only used for tuning; add --tune-steps, or --stage for a method that has one")


@dataclass(frozen=True)
class CompressOutcome(Result):
    """The result of a compression.

    Attributes:
        method: its name.
        options: every field of its config.
        parameters: of the model before and after.
        perplexity: on held-out blocks: before, after, and after tuning if there was any.
        report: layer by layer.
        tuning: steps, rate, number of trained parameters, and the losses of the tuning or stage; empty without either.
        data: the data of the measurement.
        columns: what its columns are used for.
        folder: where the model was written.
        fitted: what the budget counts, allows and could have been at the least; None without a budget.
        ratios: `"uniform"` or `"farms"`.
    """

    method: str
    options: Mapping[str, Any]
    parameters: tuple[int, int]
    perplexity: tuple[float, ...]
    report: CompressionReport
    tuning: Mapping[str, Any]
    data: tuple[str, ...]
    folder: Path
    columns: tuple[Mapping[str, Any], ...] = ()
    fitted: Mapping[str, Any] | None = None
    ratios: str = "uniform"

    @property
    def record(self) -> CompressionRecord:
        """The content of `compression.json`."""
        return CompressionRecord(
            method=self.method,
            settings=json_value(
                {
                    **self.options,
                    **self.report.details,
                    **({"columns": self.columns} if self.columns else {}),
                    **({"fitted": self.fitted} if self.fitted else {}),
                    **({"ratios": self.ratios} if self.ratios != "uniform" else {}),
                }
            ),
            ranks={layer.name: layer.rank for layer in self.report.replaced},
            **json_value(self.tuning),
            parameters=list(self.parameters),
            perplexity=json_value(self.perplexity),
            data=list(self.data),
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of `compression.json`."""
        return self.record.to_dict()

    @property
    def summary(self) -> str:
        """One line: sizes and perplexities."""
        before, after = self.parameters
        steps = " -> ".join(f"{value:.3f}" for value in self.perplexity)
        tuned = " (tuned)" if "tune_steps" in self.tuning else " (taught)" if self.tuning else ""
        return f"{before:,} -> {after:,} parameters ({after / before:.2f} x); perplexity on held-out blocks {steps}{tuned}"


def compress(
    settings: CompressSettings,
    *,
    say: Callable[[str], None] = lambda line: None,
    tell: Callable[[str], None] = lambda line: None,
) -> CompressOutcome:
    """Compress a causal language model and write it.

    Args:
        say: called with a line about the replaced layers, before the tuning.
        tell: called with lines about the data before anything is measured: columns, what was left out, one example.

    Returns:
        Sizes, losses and the folder. `compression.json` in that folder holds the same.

    Raises:
        UnknownNameError, ValueError: see `CompressSettings` and `lowdim list METHOD`.
        BudgetError: no settings of the method meet the budget; the smallest size that some do is named.
        FileExistsError: the folder is not empty.
        InUseError: another command works on it.
        LowdimError: the loss of the tuning is not finite, or the folder does not read back; nothing is left in it.

    Example:
        >>> from lowdim.jobs import CompressSettings, compress
        >>> data = ("lowdim:shakespeare",)
        >>> done = compress(CompressSettings(model="stories260k", data=data, out="small", samples=64, max_length=32))
        >>> done.parameters[0] > done.parameters[1]
        True
    """
    method = compressor(settings.method)
    config = method.build(settings.options)
    _check_use(settings, method, config)
    with new_folder(settings.out) as out:
        return _compress(settings, method, config, out, say, tell)


def _compress(
    settings: CompressSettings,
    method: Compressor,
    config: Any,
    out: Path,
    say: Callable[[str], None],
    tell: Callable[[str], None],
) -> CompressOutcome:
    """Measure, compress, tune, measure again, and write."""
    from lowdim import models
    from lowdim.compress import last_report
    from lowdim.pretrained import save_compressed
    from lowdim.train.metrics import metric_for
    from lowdim.train.tasks import language_modelling

    tokenizer = models.load_tokenizer(settings.model)
    looks = method.needs_batches or (settings.budget is not None and looks_at_samples(method))
    limit = SAMPLES if settings.samples is None and looks else settings.samples
    longest = models.longest_text(settings.model)
    task = language_modelling(
        tokenizer, list(settings.data), text=settings.text, max_length=settings.max_length, most=longest, limit=limit
    )
    for kind, line in task.remarks():
        tell(f"{kind}: {line}")
    model = models.load_model(settings.model, "causal-lm", pad_token_id=tokenizer.pad_token_id)
    metric = metric_for("causal-lm", "perplexity")
    perplexity = [task.evaluate(model, task.test, metric)]
    size = _size(model)
    teacher = copy.deepcopy(model) if settings.stage_steps is not None else None
    fitted = _fitted(settings, method, model, task)
    config = config if fitted is None else fitted.config
    notes: list[str] = []
    if settings.ratios != "uniform":
        config, notes = with_ratios(method, config, model)
    model = method.function(model, config, *_samples(method, config, model, task))
    perplexity.append(task.evaluate(model, task.test, metric))
    kept = _size(model)
    by_layer = fitted is not None or settings.ratios != "uniform"
    say(_shares(last_report(model)) if by_layer else last_report(model).summary)
    for note in notes:
        say(f"note: {note}")
    for note in capped_note(last_report(model).details.get("capped_ranks", {})):
        say(f"note: {note}")
    for note in last_report(model).notes:
        say(f"note: {note}")
    tuning: dict[str, Any] = {}
    rate = _RATE if settings.lr is None else settings.lr
    if settings.tune_steps is not None:
        tuning = _tune(method, model, task, settings.tune_steps, rate)
    elif teacher is not None and settings.stage_steps is not None:
        objective = method.entry.build_stage()(teacher, model, config)
        tuning = _stage(objective, model, task, settings.stage_steps, rate)
    if tuning:
        perplexity.append(task.evaluate(model, task.test, metric))
    outcome = CompressOutcome(
        method=settings.method,
        options=dataclasses.asdict(config),
        parameters=(size, kept),
        perplexity=tuple(perplexity),
        report=last_report(model),
        tuning=tuning,
        data=settings.data,
        folder=out,
        columns=tuple(used.to_dict() for used in task.columns),
        fitted=None if fitted is None else {"budget": settings.budget, **fitted.to_dict()},
        ratios=settings.ratios,
    )
    save_compressed(model, out, tokenizer, record=outcome.to_dict(), dense=settings.dense)
    return outcome


def _fitted(settings: CompressSettings, method: Compressor, model: nn.Module, task: Task) -> Fitted | None:
    """The settings that meet the budget, if there is one."""
    if settings.budget is None:
        return None
    batches = _batches(model, task) if looks_at_samples(method) else []
    return fit_budget(method, settings.options, model, batches, Budget.parse(settings.budget))


def _shares(report: CompressionReport) -> str:
    """The report as a table, without the notes, which follow."""
    return "\n".join(line for line in str(report).splitlines() if not line.startswith("  note: "))


def _check_use(settings: CompressSettings, method: Compressor, config: Any) -> None:
    """Reject settings that would be ignored."""
    name = settings.method
    check_ratios(settings.ratios, method, config, budget=settings.budget)
    if settings.budget is not None:
        check_budget_options(method, settings.options)
    if settings.tune_steps is not None and not method.entry.tuned:
        stage = "; --stage trains it with the dense model as teacher" if method.entry.stage else ""
        raise ValueError(f"--tune-steps: {name} leaves no parameters to tune; fine-tune the model that it writes{stage}")
    if settings.stage_steps is not None and not method.entry.stage:
        instead = "use --tune-steps, or --method pela" if method.entry.tuned else "--method pela has one"
        raise ValueError(f"--stage: {name} has no stage in which the dense model teaches; {instead}")
    trained = settings.tune_steps is not None or settings.stage_steps is not None or getattr(config, "trains", False)
    looks = method.needs_batches or (settings.budget is not None and looks_at_samples(method))
    if settings.samples is not None and not trained and not looks:
        flag = "add --stage" if method.entry.stage else "add --tune-steps" if method.entry.tuned else "leave it out"
        raise ValueError(f"--samples is only used for tuning, since {name} needs no samples; {flag}")


def _samples(method: Compressor, config: Any, model: nn.Module, task: Task) -> tuple[Any, ...]:
    """What the method is called with besides model and config: samples, and the loss for one that trains."""
    trains = getattr(config, "trains", False)
    if not method.needs_batches and not trains:
        return ()
    if trains:
        return list(task.sample_batches(math.ceil(len(task.train) / _BATCH), _BATCH, model_device(model))), task.loss_fn
    return (_batches(model, task),)


def _batches(model: nn.Module, task: Task) -> list[dict[str, Any]]:
    """The training part as inputs alone."""
    batches = task.sample_batches(math.ceil(len(task.train) / _BATCH), _BATCH, model_device(model))
    return [{"input_ids": batch["input_ids"]} for batch in batches]


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _tune(method: Compressor, model: nn.Module, task: Task, steps: int, lr: float) -> dict[str, Any]:
    """Train only the parameters that the method leaves trainable."""
    return {"tune_steps": steps, **train(model, method.entry.build_tuned()(model), task, steps, lr)}


def _stage(objective: Any, model: Any, task: Task, steps: int, lr: float) -> dict[str, Any]:
    """Train the compressed model with the dense one as teacher."""

    def loss_fn(wrapped: nn.Module, batch: Any) -> Any:
        def own(logits: Any) -> Any:
            return model.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1])

        return objective(batch, own, model=wrapped).total

    taught = copy.copy(task)
    cast(Any, taught).loss_fn = loss_fn
    return {"stage_steps": steps, **train(model, list(model.parameters()), taught, steps, lr)}
