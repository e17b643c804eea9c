"""One run of a comparison: train a method at one rate and size from one seed, score it, record it."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.catalogue import Variant
from lowdim.checksums import file_checksum
from lowdim.comparison.handing_over import handed_over_bytes, state_of
from lowdim.comparison.search import Candidate
from lowdim.comparison.tracking import Tracking
from lowdim.comparison.trivial import hits_of
from lowdim.errors import CheckpointError, is_machine_failure
from lowdim.files import write_tensors
from lowdim.linalg import Memory
from lowdim.methods import Applied, Setup, Strategy, strategy_for
from lowdim.models import Source
from lowdim.records import ComparedRun
from lowdim.surgery import in_bfloat16, model_device
from lowdim.train.environment import environment
from lowdim.train.keeping import Kept
from lowdim.train.loop import FitResult, FitSettings, fit
from lowdim.train.metrics import Metric
from lowdim.train.tasks.base import Score, Task

__all__ = ["WEIGHTS", "Contest", "Run", "drop_checkpoints", "finished_record", "perform", "prepared"]

WEIGHTS = "weights.safetensors"
_ADAPTER = ("adapter.safetensors", "adapter.json")
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Run:
    """One run of the comparison: its method (at its size), rate, seed and purpose.

    Attributes:
        phase: `"trial"` (a candidate of the search, scored on the validation part) or `"seed"` (of the final, scored on the
            test part, once).
        index: of the seed; of a trial that of the rung.
        steps: where it ends; a trial goes on from the rung before.
        rows: of the validation part that a trial is scored on; 0 for all.
        origin: of the rate, as in `Candidate`.
    """

    variant: Variant
    phase: str
    index: int
    lr: float
    seed: int
    steps: int
    size: int | None = None
    rows: int = 0
    origin: str = ""

    @property
    def candidate(self) -> Candidate:
        """Its method, rate and size."""
        return Candidate(self.variant.name, self.lr, self.size, self.origin)

    @property
    def name(self) -> str:
        """Its folder below `runs/`."""
        if self.phase == "seed":
            return f"{self.variant.name}/seed-{self.index}"
        return f"{self.candidate.name}/rung-{self.steps}"


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
    optimizer: str = "adamw"  # of methods without one of their own
    bf16: bool = False  # train by autocast
    group_by_length: bool = False  # rows of like length in a batch
    untouched: Score | None = None  # of the model on the test part before any training, where it can answer
    untouched_samples: list[dict[str, str]] = field(default_factory=list)
    kept: Kept | None = None  # a text that must not be forgotten
    kept_before: float = math.nan  # the untouched model's loss on it
    source: Source | None = None  # of the model; None: a module of one's own
    label: str = ""  # of the model
    tracking: Tracking | None = None
    cuts: tuple[tuple[int, int], ...] = ()  # (layers, dimensions) at which embeddings are scored besides the whole
    memory: Memory = field(default_factory=Memory)  # of decompositions and sample statistics

    @property
    def search_metric(self) -> Metric:
        """What candidates are ranked by: the metric, or the loss where it is an exact match, which is 0 for all at first."""
        losses = [metric for metric in self.task.metrics() if metric.name == "loss"]
        return losses[0] if self.metric.name == "exact-match" and losses else self.metric


def perform(bench: Contest, run: Run, *, on_step: Callable[[], None] = lambda: None) -> ComparedRun:
    """Train, score and write `run.json`; returns its record.

    A run that diverges is recorded with its reason, not raised; so is one that lacks memory, which is tried again later.

    Raises:
        OSError: the disk is full or gone.
        CheckpointError: the checkpoint that a candidate goes on from is damaged.
    """
    folder = bench.folder / "runs" / run.name
    _clear(folder)
    record = ComparedRun(
        fingerprint=bench.fingerprint,
        method=run.variant.name,
        label=run.variant.label,
        phase=run.phase,
        seed=run.seed,
        lr=run.lr,
        steps=bench.steps,
        batch_size=bench.batch_size,
        metric=(bench.search_metric if run.phase == "trial" else bench.metric).name,
        environment=environment(),
        size=run.size,
        rung=run.steps if run.phase == "trial" else None,
        origin=run.origin or None,
    )
    try:
        strategy, applied = prepared(bench, run)
        record.config = {key: _jsonable(value) for key, value in applied.options.items()}
        record.trained_parameters = applied.trained()
        record.capped_ranks = applied.capped_ranks or None
        record.notes = list(applied.notes) or None
        _note(record, _train(bench, run, strategy, applied, on_step))
        if record.failure is None:
            record.ranks = applied.ranks() or None
            if run.steps == bench.steps and applied.adapted is not None:
                applied.adapted.compact()  # what is scored is what is written
            _score(record, applied.model, bench, run)
        if run.phase == "seed" and record.failure is None:
            if _is_first(bench, run):
                trained = applied.model if applied.adapted is None else applied.adapted
                record.file_bytes = handed_over_bytes(trained, bench.model, bench.source)
            record.files = _save(applied, run, bench)
    except (OSError, CheckpointError):  # a disk that is full or gone, or a damaged checkpoint: no fault of the method
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


def prepared(bench: Contest, run: Run) -> tuple[Strategy, Applied]:
    """The model as the method changes it before training: the same for every leg of a candidate."""
    model = copy.deepcopy(bench.model)
    torch.manual_seed(run.seed)
    strategy = strategy_for(run.variant)
    count, device = strategy.sample_batches(bench.steps), next(model.parameters()).device
    setup = Setup(
        lr=run.lr,
        steps=bench.steps,
        head=bench.head,
        batches=list(bench.task.sample_batches(count, bench.batch_size, device)),
        loss_fn=bench.task.loss_for(run.variant),
        seed=run.seed,
        scratch=bench.scratch,
        max_norm=FitSettings.max_grad_norm,
        optimizer=bench.optimizer,
    )
    with bench.memory.active():
        return strategy, strategy.apply(model, setup)


def _train(bench: Contest, run: Run, strategy: Strategy, applied: Applied, on_step: Callable[[], None]) -> FitResult:
    from lowdim.train.monitoring import Tick

    settings = FitSettings(
        steps=bench.steps,
        batch_size=bench.batch_size,
        lr=run.lr,
        seed=run.seed,
        clips_itself=strategy.clips_itself(),
        bf16=bench.bf16,
        group_by_length=bench.group_by_length,
        pause_at=run.steps if run.phase == "trial" else None,
    )
    with _place(bench, run) as place:
        return fit(
            applied,
            bench.task,
            settings,
            place,
            resume=run.phase == "trial",
            measure_memory=run.phase == "seed" and run.index == 0,
            callbacks=(Tick(on_step),),
            fingerprint={"the comparison": bench.fingerprint},
        )


@contextmanager
def _place(bench: Contest, run: Run) -> Iterator[Path]:
    """Where the checkpoints of a trial lie; a seed has none."""
    if run.phase == "trial":
        yield _checkpoints(bench, run.candidate)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def _note(record: ComparedRun, result: FitResult) -> None:
    """What training gave."""
    record.losses, record.loss_steps = list(result.losses), result.steps
    record.penalties = list(result.penalties) or None
    record.seconds_per_step, record.measured_peak_bytes = result.seconds_per_step, result.peak_bytes
    record.failure = result.failure


def _checkpoints(bench: Contest, candidate: Candidate) -> Path:
    return bench.folder / "runs" / candidate.name / _CHECKPOINTS


def drop_checkpoints(bench: Contest, candidate: Candidate) -> None:
    """Remove the checkpoints of a candidate that does not go on."""
    from lowdim.train.checkpoints import discard

    folder = _checkpoints(bench, candidate)
    for checkpoint in folder.glob("*"):
        discard(checkpoint)
    if folder.is_dir():
        folder.rmdir()


def finished_record(bench: Contest, run: Run) -> ComparedRun | None:
    """The record of a run that was finished before, or None; records of other settings and failures of the machine are ignored.

    Raises:
        CheckpointError: the file is damaged, or another kind of file.
    """
    folder = bench.folder / "runs" / run.name
    if not (folder / ComparedRun.file).is_file():
        return None
    record = ComparedRun.read(folder)
    same = (record.fingerprint, record.lr, record.seed, record.size) == (bench.fingerprint, run.lr, run.seed, run.size)
    return record if same and not record.retry else None


def _clear(folder: Path) -> None:
    """Remove what an earlier try has left: its record first, so that it never describes other files."""
    for name in (ComparedRun.file, WEIGHTS, *(f"adapter/{file}" for file in _ADAPTER)):
        (folder / name).unlink(missing_ok=True)


def _score(record: ComparedRun, model: nn.Module, bench: Contest, run: Run) -> None:
    """Score a trial on the validation part, and a seed on the test part; what is kept of a method on both."""
    task = bench.task
    if run.phase == "trial" or _is_first(bench, run):
        metric = bench.search_metric if run.phase == "trial" else bench.metric
        ranked_only = bench.bf16 and run.phase == "trial"  # what is handed over is scored in its own dtype
        with in_bfloat16(model, model_device(model).type) if ranked_only else nullcontext():
            score = task.score(model, rows_of(task.validation, run.rows), metric)
        record.validation = score.value
        if run.phase == "trial":
            record.validation_values = list(score.values) or None
    if run.phase == "seed":
        score = task.score(model, task.test, bench.metric)
        record.test, record.hits, record.values = score.value, hits_of(score), list(score.values) or None
        record.by_class = (score.details or {}).get("by_class")
        if run.index == 0:
            record.samples = task.samples(model) or None
            record.by_size = task.at_sizes(model, bench.cuts, bench.metric) or None
            record.kept = None if bench.kept is None else [bench.kept_before, bench.kept.loss(model)]
    if not math.isfinite(record.score if record.score is not None else math.nan):
        record.failure = "the trained model's outputs are not finite"


def rows_of(part: Any, count: int) -> Any:
    """So many rows of a part, spread evenly over it; the part itself for 0 or more than it has.

    Example:
        >>> from lowdim.comparison.runs import rows_of
        >>> rows_of([10, 11, 12, 13, 14, 15], 3)
        [10, 12, 14]
    """
    total = len(part)
    return part if not count or count >= total else [part[i * total // count] for i in range(count)]


def _save(applied: Applied, run: Run, bench: Contest) -> dict[str, str] | None:
    """Save the trained tensors; returns the checksums of the files.

    Whole models are saved once, from the first seed that worked.
    """
    folder = bench.folder / "runs" / run.name
    if applied.adapted is not None:
        applied.adapted.save(folder / "adapter")
        return {f"adapter/{name}": file_checksum(folder / "adapter" / name) for name in _ADAPTER}
    if applied.kind == "probe":
        trained = {name: p for name, p in applied.model.named_parameters() if p.requires_grad}
    elif _is_first(bench, run):
        trained = state_of(applied.model)
    else:
        return None
    write_tensors(folder / WEIGHTS, trained)
    return {WEIGHTS: file_checksum(folder / WEIGHTS)}


def _is_first(bench: Contest, run: Run) -> bool:
    """Whether no earlier seed of the same candidate has kept its weights."""
    return not any(_usable(bench, run, index) for index in range(run.index))


def _usable(bench: Contest, run: Run, index: int) -> bool:
    """Whether an earlier seed of the same candidate has kept its weights."""
    folder = bench.folder / "runs" / run.variant.name / f"seed-{index}"
    if not (folder / ComparedRun.file).is_file() or not ((folder / WEIGHTS).is_file() or (folder / "adapter").is_dir()):
        return False
    record = ComparedRun.read(folder)
    same = (record.fingerprint, record.lr, record.size) == (bench.fingerprint, run.lr, run.size)
    return same and record.failure is None


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, set, frozenset)) else value
