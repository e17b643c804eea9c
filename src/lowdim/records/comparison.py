"""The record of a comparison: `comparison.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowdim.records.base import Record

__all__ = [
    "ComparisonRecord",
    "LossCurve",
    "MethodRecord",
    "MetricRecord",
    "ModelRecord",
    "Trial",
    "WinnerRecord",
    "metric_title",
]


#: Metrics whose name alone does not say how classes are averaged.
_TITLES = {"f1": "f1 (macro)"}


def metric_title(name: str) -> str:
    """The name of a metric as it is printed: F1 here is the mean over the classes.

    Example:
        >>> from lowdim.records import metric_title
        >>> metric_title("f1"), metric_title("accuracy")
        ('f1 (macro)', 'accuracy')
    """
    return _TITLES.get(name, name)


@dataclass(frozen=True)
class Trial(Record):
    """One learning rate that was tried, and its score on the validation part (None: it failed)."""

    lr: float
    score: float | None = None


@dataclass(frozen=True)
class LossCurve(Record):
    """The training loss of one seed, step by step; None where it was not finite."""

    seed: int | None
    step: list[float]
    loss: list[float | None]

    @property
    def lost(self) -> bool:
        """Whether the loss was not finite somewhere."""
        return None in self.loss


@dataclass(kw_only=True)
class MethodRecord(Record):
    """One method of a comparison.

    Attributes:
        name, label, family: of the catalogue; `label` is what tables print.
        baseline: whether it is a baseline.
        trivial: whether nothing was trained: a constant answer, or the model as it was. Such a row is no candidate.
        status: "ok", "skipped" (it was never run) or "failed".
        reason: why it was skipped, failed, or lost some of its runs.
        lr: the rate that was chosen among `trials`.
        scores, mean, interval: of the seeds on the test part, their mean, and the two ends of its 95 % interval.
        forecast_peak_bytes, measured_peak_bytes: peak memory of a step.
        hits: of each seed, right or wrong text by text.
        curves: the losses of each seed.
        pareto: whether no other method is better in score and memory.
        within_noise: whether it differs from the best by no more than noise (None: not known); of a trivial row: whether the
            best is not clearly better than it.
        file_bytes: size of the run's saved weights; of the winner, that of the weights in `winner/`.
    """

    name: str
    label: str = ""
    family: str = ""
    baseline: bool = False
    trivial: bool = False
    status: str = "ok"
    reason: str | None = None
    lr: float | None = None
    trials: list[Trial] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    mean: float | None = None
    interval: list[float] | None = None
    trained_parameters: int | None = None
    forecast_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    seconds_per_step: float | None = None
    file_bytes: int | None = None
    hits: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    curves: list[LossCurve] = field(default_factory=list)
    pareto: bool = False
    within_noise: bool | None = False

    def left_out(self) -> set[str]:
        """`trivial` where it is False: rows of versions without such rows are written as they were."""
        return set() if self.trivial else {"trivial"}


@dataclass(frozen=True)
class MetricRecord(Record):
    """The metric of the scores."""

    name: str
    higher_is_better: bool


@dataclass(frozen=True)
class ModelRecord(Record):
    """The model that was adapted."""

    name: str
    parameters: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class WinnerRecord(Record):
    """The best method, as exported for other tools.

    Attributes:
        method: its name.
        why: one sentence.
        folder: where it lies, below that of the comparison.
        format: "PEFT adapter" or "merged model".
        exported: which of its seeds.
        largest_difference: between the logits of the exported and the trained model (None: not checked).
        how_to_load: Python code.
        file_bytes, folder_bytes: of its weights (`*.safetensors`), and of all its files.
    """

    method: str
    why: str
    folder: str
    format: str
    exported: str
    largest_difference: float | None
    how_to_load: str
    file_bytes: int | None = None
    folder_bytes: int | None = None

    def left_out(self) -> set[str]:
        """Sizes that were not recorded."""
        return {name for name in ("file_bytes", "folder_bytes") if getattr(self, name) is None}


@dataclass(kw_only=True)
class ComparisonRecord(Record):
    """A comparison.

    Attributes:
        created: when, as ISO 8601.
        lowdim, command, environment: version, command line, versions of others and hardware.
        data: name, sizes of the parts, labels, notes.
        settings: those of `lowdim.compare.CompareSettings`.
        winner: None where nothing finished.
        notes: remarks on the table, in sentences.
        seconds: the whole comparison took.
    """

    file: ClassVar[str] = "comparison.json"
    what: ClassVar[str] = "the record of a comparison"

    schema: int = 1
    title: str
    created: str
    lowdim: str
    command: str
    environment: dict[str, Any]
    task: str
    metric: MetricRecord
    model: ModelRecord
    data: dict[str, Any]
    settings: dict[str, Any]
    budget_bytes: int | None
    methods: list[MethodRecord]
    winner: WinnerRecord | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
