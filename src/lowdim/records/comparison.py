"""The record of a comparison: `comparison.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowdim.records.base import Record
from lowdim.records.rates import RatesRecord

__all__ = [
    "ComparisonRecord",
    "JudgementRecord",
    "LossCurve",
    "MethodRecord",
    "MetricRecord",
    "ModelRecord",
    "RankPair",
    "RanksRecord",
    "SampleRecord",
    "SearchRecord",
    "Trial",
    "VisitRecord",
    "WinnerRecord",
    "metric_title",
]


#: Metrics whose name alone does not say how classes are averaged.
_TITLES = {"f1": "f1 (macro)", "f1-micro": "f1 (micro)", "f1-weighted": "f1 (weighted)", "f1-binary": "f1 (binary)"}
_TITLES |= {"index-accuracy": "accuracy in the old index"}


def metric_title(name: str) -> str:
    """The name of a metric as it is printed: which average an F1 is.

    Example:
        >>> from lowdim.records import metric_title
        >>> metric_title("f1"), metric_title("accuracy")
        ('f1 (macro)', 'accuracy')
    """
    return _TITLES.get(name, name)


@dataclass(frozen=True)
class Trial(Record):
    """One learning rate (and size) that was tried, and its score on the validation part (None: it failed).

    Attributes:
        size: rank, or what takes its place; None for methods without one.
        steps: trained when it was scored last; None: to the end.
        origin: of the rate: `"curvature"` if it was measured, empty for the usual ones.
    """

    lr: float
    score: float | None = None
    size: int | None = None
    steps: int | None = None
    origin: str = ""

    def left_out(self) -> set[str]:
        """A size and steps that are not known, and no origin."""
        unknown = {name for name in ("size", "steps") if getattr(self, name) is None}
        return unknown if self.origin else unknown | {"origin"}


@dataclass(frozen=True)
class VisitRecord(Record):
    """A candidate of the search at a rung: its score on the validation part, and whether and why it went on or left.

    Attributes:
        origin: of the rate: `"curvature"` if it was measured, empty for the usual ones.
    """

    method: str
    lr: float
    size: int | None
    rung: int
    steps: int
    score: float | None
    goes_on: bool
    reason: str = ""
    origin: str = ""

    def left_out(self) -> set[str]:
        """No origin."""
        return set() if self.origin else {"origin"}


@dataclass(frozen=True)
class SearchRecord(Record):
    """The search tree.

    Attributes:
        kind: `"halving"` or `"grid"`.
        visits: every candidate at every rung that it reached, in order.
        steps, exhaustive_steps: trained in all, and what training every candidate to its end takes.
    """

    kind: str
    visits: list[VisitRecord]
    steps: int
    exhaustive_steps: int


@dataclass(frozen=True, kw_only=True)
class JudgementRecord(Record):
    """What the comparison shows, by the rule of `lowdim.comparison.judge`.

    Attributes:
        level: confidence of the set.
        judged: what is judged: a metric, or `"loss"` for perplexity.
        seeds, examples: in the table of scores.
        half_width: of the 95 % interval of a difference between two methods, in the unit of `judged`; None with one seed.
        may_be_best: names of the rows that no other is shown to be better than, trivial ones included.
        best: the row that is shown to be better than every other; None.
        apart: rows that vary so much more than the others that they are judged by their own variance.
        headline: the verdict in one sentence, and `reasons` the sentences that follow.
        needed: what would show a smaller difference, in one sentence.
    """

    level: float
    judged: str
    seeds: int
    examples: int
    half_width: float | None
    may_be_best: list[str]
    best: str | None
    apart: list[str] = field(default_factory=list)
    headline: str = ""
    reasons: list[str] = field(default_factory=list)
    needed: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Record):
    """What a model wrote for one prompt of the test part.

    Attributes:
        prompt, expected: as in the data.
        answers: name of the row (`"untouched"`, a method) -> its answer.
    """

    prompt: str
    expected: str
    answers: dict[str, str]


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
        lr_origin: `"curvature"` if that rate was measured, empty for a usual one.
        scores, mean, interval: of the seeds on the test part, their mean, and the two ends of its 95 % interval.
        forecast_peak_bytes, measured_peak_bytes: peak memory of a step.
        hits: of each seed, right or wrong text by text.
        curves: the losses of each seed.
        pareto: whether no other method is better in score and memory.
        within_noise: whether it differs from the best by no more than noise (None: not known); of a trivial row: whether the
            best is not clearly better than it.
        file_bytes: size of the weights that are handed over if the method is chosen: a PEFT adapter, or the merged model.
        size: rank, or what takes its place, that was chosen among `trials`; None for methods without one.
        difference, half_width: its mean less that of the row with the best mean, as judged (higher is better), and the
            half-width of the interval around it.
        may_be_best: whether no other row is shown to be better.
        by_class: `{"class", "precision", "recall", "f1", "count"}` on the test part, of its first seed.
        by_size: scores at smaller sizes of an embedding, of its first seed: `{"layers", "dimensions", "score"}`.
        kept: loss on the text that must not be forgotten, before and after.
        flops_per_token: operations of its layers for one token, forward; from random weights.
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
    size: int | None = None
    difference: float | None = None
    half_width: float | None = None
    may_be_best: bool | None = None
    by_class: list[dict[str, Any]] = field(default_factory=list)
    kept: list[float] | None = None
    flops_per_token: int | None = None
    lr_origin: str = ""
    by_size: list[dict[str, Any]] = field(default_factory=list)

    def left_out(self) -> set[str]:
        """What versions without it did not write: rows of theirs are written as they were."""
        later = ("size", "difference", "half_width", "may_be_best", "kept", "flops_per_token")
        unset = {name for name in later if getattr(self, name) is None}
        return unset | {name for name in ("trivial", "by_class", "by_size", "lr_origin") if not getattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class RankPair(Record):
    """A method with ranks by layer against the same with one rank.

    Attributes:
        method, label: of the row with one rank.
        sizes: the rank that was chosen, of the row with one rank and of the other (there: before it was spread).
        difference, half_width: mean with ranks by layer less that with one rank, as judged (higher is better), and the
            half-width of the interval around it; None: not judged.
        verdict: `"better"`, `"worse"` or `"not distinguishable"`; empty where it was not judged.
    """

    method: str
    label: str
    sizes: list[int | None]
    difference: float | None = None
    half_width: float | None = None
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class RanksRecord(Record):
    """Ranks by layer from tail exponents, and whether they helped.

    Attributes:
        exponents: layer of the base -> exponent.
        layers: method -> layer -> rank, of those that reached the final.
        pairs: each method with ranks by layer against the same with one rank.
        plain: labels of the methods without ranks by layer, which have one row.
        sentence: the verdict.
    """

    exponents: dict[str, float]
    layers: dict[str, dict[str, int]]
    pairs: list[RankPair]
    plain: list[str]
    sentence: str


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
        format: "PEFT adapter", "merged model", or "state dict" for a module of one's own.
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
        settings: those of `lowdim.comparison.CompareSettings`.
        winner: None where nothing finished.
        notes: remarks on the table, in sentences.
        seconds: the whole comparison took.
        judgement: what it shows (None: nothing finished, or a version without the rule).
        search: the search tree.
        samples: what models wrote for prompts of the test part.
        rates: the measured rates and whether they helped, where they were asked for.
        ranks: ranks by layer; None where no row has them.
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
    judgement: JudgementRecord | None = None
    search: SearchRecord | None = None
    samples: list[SampleRecord] = field(default_factory=list)
    rates: RatesRecord | None = None
    ranks: RanksRecord | None = None

    def left_out(self) -> set[str]:
        """What versions without it did not write."""
        return {name for name in ("judgement", "search", "samples", "rates", "ranks") if not getattr(self, name)}
