"""One run of a comparison: train a method at one rate from one seed, score it, record it."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.catalogue import Variant
from lowdim.checksums import file_checksum
from lowdim.errors import is_machine_failure
from lowdim.files import write_tensors
from lowdim.methods import Applied, Setup, strategy_for
from lowdim.records import ComparedRun
from lowdim.train.environment import environment
from lowdim.train.loop import FitSettings, fit
from lowdim.train.metrics import Metric
from lowdim.train.tasks import Score, Task

__all__ = ["WEIGHTS", "Contest", "Run", "finished_record", "perform"]

WEIGHTS = "weights.safetensors"
_ADAPTER = ("adapter.safetensors", "adapter.json")


@dataclass(frozen=True)
class Run:
    """One run of the comparison: its method, rate, seed and purpose."""

    variant: Variant
    phase: str  # "trial" (scored on the validation part) or "seed" (scored on the test part, once)
    index: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder below `runs/`."""
        return f"{self.variant.name}/{self.phase}-{self.index}"


@dataclass(kw_only=True)
class Contest:
    """Shared by all runs: the model to copy, the data, and the length of training."""

    model: nn.Module
    task: Task
    head: tuple[str, ...]
    metric: Metric
    steps: int
    batch_size: int
    folder: Path
    fingerprint: str  # of everything that decides the numbers
    parts: dict[str, str] = field(default_factory=dict)  # of it, by name: the base model, tokenizer and data
    scratch: bool = False
    untouched: Score | None = None  # of the model on the test part before any training, where it can answer


def perform(bench: Contest, run: Run, *, on_step: Callable[[], None] = lambda: None) -> ComparedRun:
    """Train, score and write `run.json`; returns its record.

    A run that diverges is recorded with its reason, not raised; so is one that lacks memory, which is tried again later.

    Raises:
        OSError: the disk is full or gone.
    """
    from lowdim.train.trainer import Tick

    folder = bench.folder / "runs" / run.name
    _clear(folder)

    model = copy.deepcopy(bench.model)
    record = ComparedRun(
        fingerprint=bench.fingerprint,
        method=run.variant.name,
        label=run.variant.label,
        phase=run.phase,
        seed=run.seed,
        lr=run.lr,
        steps=bench.steps,
        batch_size=bench.batch_size,
        metric=bench.metric.name,
        environment=environment(),
    )
    torch.manual_seed(run.seed)
    try:
        strategy = strategy_for(run.variant)
        setup = Setup(
            lr=run.lr,
            steps=bench.steps,
            head=bench.head,
            batches=bench.task.sample_batches(
                strategy.sample_batches(bench.steps), bench.batch_size, next(model.parameters()).device
            ),
            loss_fn=bench.task.loss_fn,
            seed=run.seed,
            scratch=bench.scratch,
            max_norm=FitSettings.max_grad_norm,
        )
        applied = strategy.apply(model, setup)
        record.config = {key: _jsonable(value) for key, value in applied.options.items()}
        record.trained_parameters = applied.trained()
        record.capped_ranks = applied.capped_ranks or None
        record.notes = list(applied.notes) or None
        settings = FitSettings(
            steps=bench.steps,
            batch_size=bench.batch_size,
            lr=run.lr,
            seed=run.seed,
            clips_itself=strategy.clips_itself(),
        )
        with tempfile.TemporaryDirectory() as scratch:
            result = fit(
                applied,
                bench.task,
                settings,
                Path(scratch),
                measure_memory=run.phase == "trial" and run.index == 0,
                callbacks=(Tick(on_step),),
            )
        record.losses, record.loss_steps = list(result.losses), result.steps
        record.penalties = list(result.penalties) or None
        record.seconds_per_step, record.measured_peak_bytes = result.seconds_per_step, result.peak_bytes
        record.failure = result.failure
        if record.failure is None:
            record.ranks = applied.ranks() or None
            if applied.adapted is not None:
                applied.adapted.compact()  # what is scored is what is written
            _score(record, model, bench)
        if run.phase == "seed" and record.failure is None:
            record.file_bytes, record.files = _save(applied, run, bench)
    except OSError:  # a disk that is full or gone stops all runs
        raise
    except Exception as error:
        record.retry = is_machine_failure(error)
        if not (record.retry or isinstance(error, (ValueError, TypeError, RuntimeError))):
            raise
        reason = str(error).strip() or type(error).__name__
        record.failure = f"{reason}; --resume tries it again" if record.retry else reason
    # Use the written record, so that a resumed comparison reads the same.
    record.write(folder)
    return ComparedRun.read(folder)


def finished_record(bench: Contest, run: Run) -> ComparedRun | None:
    """The record of a run that was finished before, or None; records of other settings and failures of the machine are ignored.

    Raises:
        CheckpointError: the file is damaged, or another kind of file.
    """
    folder = bench.folder / "runs" / run.name
    if not (folder / ComparedRun.file).is_file():
        return None
    record = ComparedRun.read(folder)
    same = (record.fingerprint, record.lr, record.seed) == (bench.fingerprint, run.lr, run.seed)
    return record if same and not record.retry else None


def _clear(folder: Path) -> None:
    """Remove what an earlier try has left: its record first, so that it never describes other files."""
    for name in (ComparedRun.file, WEIGHTS, *(f"adapter/{file}" for file in _ADAPTER)):
        (folder / name).unlink(missing_ok=True)


def _score(record: ComparedRun, model: nn.Module, bench: Contest) -> None:
    """Score the model on the validation part, and that of a seed on the test part."""
    value = record.validation = bench.task.evaluate(model, bench.task.validation, bench.metric)
    if record.phase == "seed":
        score = bench.task.score(model, bench.task.test, bench.metric)
        value = record.test = score.value
        record.hits = "".join(map(str, score.hits))
    if not math.isfinite(value):
        record.failure = "the trained model's outputs are not finite"


def _save(applied: Applied, run: Run, bench: Contest) -> tuple[int, dict[str, str] | None]:
    """Save the trained tensors; returns their size, and the checksums of the files.

    Whole models are saved once, from the first seed that worked.
    """
    folder = bench.folder / "runs" / run.name
    if applied.adapted is not None:
        applied.adapted.save(folder / "adapter")
        files = {f"adapter/{name}": file_checksum(folder / "adapter" / name) for name in _ADAPTER}
        return (folder / "adapter" / "adapter.safetensors").stat().st_size, files
    trained = {name: p for name, p in applied.model.named_parameters() if p.requires_grad}
    if applied.kind != "probe":
        trained = _tensors(applied.model)
    size = sum(p.numel() * p.element_size() for p in trained.values())
    if applied.kind != "probe" and any(_kept(run, index, bench) for index in range(run.index)):
        return size, None
    write_tensors(folder / WEIGHTS, trained)
    return size, {WEIGHTS: file_checksum(folder / WEIGHTS)}


def _kept(run: Run, index: int, bench: Contest) -> bool:
    """Whether an earlier seed at the same rate has kept its weights."""
    folder = bench.folder / "runs" / run.variant.name / f"seed-{index}"
    if not (folder / ComparedRun.file).is_file() or not (folder / WEIGHTS).is_file():
        return False
    record = ComparedRun.read(folder)
    return record.failure is None and (record.fingerprint, record.lr) == (bench.fingerprint, run.lr)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of a model's state, tied tensors once: structured layers keep some of it in buffers."""
    found, seen = {}, set()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor) and (value.numel() == 0 or value.data_ptr() not in seen):
            seen.add(value.data_ptr())
            found[name] = value
    return found


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value
