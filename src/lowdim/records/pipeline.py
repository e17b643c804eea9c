"""The record of a pipeline of compressions: `pipeline.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowdim.records.base import Record
from lowdim.records.study import StudyRecord

__all__ = ["PipelineRecord", "StepRecord"]


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One step, and the model after it. The first is the dense model.

    Attributes:
        step: `dense`, `decompose`, `tune`, `cache`, `sparsify`, `quantize` or `export`.
        what: the system and its result in words.
        seconds: that the step took, without measuring.
        score: of the metric on held-out rows; None if it is not finite.
        interval: its ends, at 95 %, over the rows.
        change: against the dense model on the same rows, and its ends: of perplexity a ratio, of correlations a difference.
        disk_bytes: of the weights' files. memory_bytes: of the tensors that are held.
        cache_bytes: of keys and values for a token; None for models without a cache.
        tokens_per_second: by batch size.
        block_errors: block -> `‖y − y₀‖ / ‖y₀‖` of its output against the dense model's.
        layers: what the system has made of each layer: rows of its report.
        options: of the system, with those that a budget has found; or of the training.
        notes: what to look at.
        losses: of a training.
        values: a number for each held-out row, higher is better.
        checksum: of the tensors.
    """

    step: str
    what: str
    seconds: float
    score: float | None
    interval: list[float | None]
    change: list[float | None]
    disk_bytes: int
    memory_bytes: int
    cache_bytes: int | None = None
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    block_errors: dict[str, float | None] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    checksum: str = ""


@dataclass(frozen=True, kw_only=True)
class PipelineRecord(StudyRecord):
    """A pipeline: its recipe, and the steps that are finished.

    Attributes:
        finished: whether all steps are.
        export: the folder of the model, in the folder of the record; None before the last step, and without an export.
    """

    file: ClassVar[str] = "pipeline.json"
    what: ClassVar[str] = "the record of a pipeline"

    finished: bool
    recipe: dict[str, Any]
    steps: list[StepRecord] = field(default_factory=list)
    export: str | None = None
