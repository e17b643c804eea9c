"""Compress a trained language model: measure, compress, tune if requested, measure again, write.

It is above `train` and not in `lowdim.compress`, because a family imports neither models nor training.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.errors import LowdimError, check_float, check_int
from lowdim.jobs.systems import Compressor, compressor
from lowdim.outputs import new_folder
from lowdim.ranks import capped_note
from lowdim.records import CompressionRecord
from lowdim.results import Result, json_value

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
        tune_steps: optimizer steps of tuning afterwards, for the parameters that the method leaves trainable; None: no tuning.
        lr: learning rate of the tuning; None means 5e-5.
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
    tune_steps: int | None = None
    lr: float | None = None
    samples: int | None = None
    max_length: int = 128
    dense: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data must name at least one file")
        check_int("--max-length", self.max_length, 4)
        if self.samples is not None:
            check_int("--samples", self.samples, 1)
        if self.tune_steps is not None:
            check_int("--tune-steps", self.tune_steps, 1)
        if self.lr is not None:
            check_float("--lr", self.lr, 0.0, low_open=True)
            if self.tune_steps is None:
                raise ValueError("--lr is only used for tuning; add --tune-steps")


@dataclass(frozen=True)
class CompressOutcome(Result):
    """The result of a compression.

    Attributes:
        method: its name.
        options: every field of its config.
        parameters: of the model before and after.
        perplexity: on held-out blocks: before, after, and after tuning if there was any.
        report: layer by layer.
        tuning: steps, rate, number of trained parameters, and the losses; empty without tuning.
        data: the data of the measurement.
        columns: what its columns are used for.
        folder: where the model was written.
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

    @property
    def record(self) -> CompressionRecord:
        """The content of `compression.json`."""
        return CompressionRecord(
            method=self.method,
            settings=json_value({**self.options, **self.report.details, **({"columns": self.columns} if self.columns else {})}),
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
        tuned = " (tuned)" if self.tuning else ""
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
    _check_use(settings, method)
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
    limit = SAMPLES if settings.samples is None and method.needs_batches else settings.samples
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
    model = method.function(model, config, *_samples(method, model, task))
    perplexity.append(task.evaluate(model, task.test, metric))
    kept = _size(model)
    say(last_report(model).summary)
    for note in capped_note(last_report(model).details.get("capped_ranks", {})):
        say(f"note: {note}")
    tuning: dict[str, Any] = {}
    if settings.tune_steps is not None:
        tuning = _tune(method, model, task, settings.tune_steps, _RATE if settings.lr is None else settings.lr)
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
    )
    save_compressed(model, out, tokenizer, record=outcome.to_dict(), dense=settings.dense)
    return outcome


def _check_use(settings: CompressSettings, method: Compressor) -> None:
    """Reject settings that would be ignored."""
    name = settings.method
    if settings.tune_steps is not None and not method.entry.tuned:
        raise ValueError(f"--tune-steps: {name} leaves no parameters to tune; fine-tune the model that it writes")
    if settings.samples is not None and settings.tune_steps is None and not method.needs_batches:
        raise ValueError(f"--samples is only used for tuning, since {name} needs no samples; add --tune-steps")


def _samples(method: Compressor, model: nn.Module, task: Task) -> tuple[Any, ...]:
    if not method.needs_batches:
        return ()
    batches = task.sample_batches(math.ceil(len(task.train) / _BATCH), _BATCH, next(model.parameters()).device)
    return ([{"input_ids": batch["input_ids"]} for batch in batches],)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _tune(method: Compressor, model: nn.Module, task: Task, steps: int, lr: float) -> dict[str, Any]:
    """Train only the parameters that the method leaves trainable."""
    from lowdim.catalogue import variant
    from lowdim.methods import Applied, Setup
    from lowdim.methods.strategy import adamw
    from lowdim.train.loop import FitSettings, fit

    parameters = method.entry.build_tuned()(model)
    setup = Setup(lr=lr, steps=steps)
    applied = Applied(model, variant("full"), lambda rate: adamw(parameters, rate, setup))
    with tempfile.TemporaryDirectory() as folder:
        result = fit(applied, task, FitSettings(steps=steps, lr=lr, schedule="cosine"), Path(folder))
    if result.failure:
        raise LowdimError(f"{result.failure}; try a smaller --lr than {lr:g}. Nothing was written")
    return {"tune_steps": steps, "lr": lr, "trained": applied.trained(), "losses": result.losses}
