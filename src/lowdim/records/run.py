"""The record of one training run: `run.json` of `lowdim run`, and that of each run of `lowdim compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowdim.records.base import Record

__all__ = ["RUN", "ComparedRun", "RunRecord", "WatchRecord"]

RUN = "run.json"


@dataclass(frozen=True, kw_only=True)
class WatchRecord(Record):
    """What a run measured of its layers while they trained (`lowdim.train.LayerWatch`).

    Attributes:
        schema: of the rows.
        interval: steps between two measurements.
        k, threshold, kept: directions that are compared, similarity of an intruder, directions of the start that are known.
        not_measured: layer -> why.
        rows: `step`; `alpha`, `intruders` and `overlap`, the means over the layers; and `layers`, the same for each layer. The
            first row is the start, an alpha that could not be fitted is None.

    Example:
        >>> from lowdim.records import WatchRecord
        >>> WatchRecord(interval=50, k=10, threshold=0.5, kept=64, not_measured={}, rows=[]).to_dict()["schema"]
        1
    """

    what: ClassVar[str] = "the record of watched layers"

    schema: int = 1
    interval: int
    k: int
    threshold: float
    kept: int
    not_measured: dict[str, str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """A finished run of a recipe. A score, loss or time that is not finite is read as None.

    Attributes:
        method, label: its name, and its name in tables.
        recipe: all keys of the recipe.
        config: the method's hyperparameters with all defaults filled in.
        trained_parameters: number of trained parameters at the start.
        metric, before, validation, test: its name, and the scores of the three.
        before_test: the score of the untrained model on the test part, where it can answer.
        by_class: a table by class on the test part.
        samples: `{"prompt", "expected", "before", "after"}` for prompts of the test part.
        kept: loss on the text that must not be forgotten, before and after.
        data: name, sizes of the parts, notes, labels.
        losses, loss_steps: of each logged step, without penalties.
        evaluations: `[step, loss]` of the validation part during training.
        subspaces, spikes: the log of a projected optimizer, and the steps whose loss jumped.
        seconds_per_step, measured_peak_bytes: the median, and the peak of one step.
        environment, lowdim: versions and hardware.
        penalties: the terms that the method added to the losses, if any.
        ranks: layer -> rank at the end, if the method chooses them.
        capped_ranks: layer -> its rank, where the method's is above what the layer allows.
        notes: what the method left out or changed, in sentences.
        fingerprint: checksums of what the run builds on: base model, tokenizer, data.
        by_size: scores on the test part at smaller sizes of an embedding: `{"layers", "dimensions", "score", "before"}`.
        replacement: what the new vectors find in an old model's index (`lowdim.represent.ReplacementReport`), and that model.
        files: checksums of the trained model's files.
        file_bytes: size of its tensors as they were written, in `adapter/` or `model/`.
        watch: what was measured of the layers during the training, if anything was.

    Example:
        >>> import dataclasses
        >>> from lowdim.records import RunRecord
        >>> [f.name for f in dataclasses.fields(RunRecord)][:3]
        ['schema', 'method', 'label']
    """

    file: ClassVar[str] = RUN
    what: ClassVar[str] = "the record of a recipe run"

    schema: int = 1
    method: str
    label: str
    recipe: dict[str, Any]
    config: dict[str, Any]
    lr: float
    seed: int
    trained_parameters: int
    metric: str
    before: float | None
    validation: float | None
    test: float | None
    data: dict[str, Any]
    losses: list[float | None]
    loss_steps: list[int]
    evaluations: list[list[float | None]]
    subspaces: list[dict[str, float | None]]
    spikes: list[int]
    seconds_per_step: float | None
    measured_peak_bytes: int | None
    environment: dict[str, Any]
    lowdim: str
    penalties: list[float | None] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    capped_ranks: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0
    before_test: float | None = None
    by_class: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    kept: list[float] | None = None
    by_size: list[dict[str, Any]] = field(default_factory=list)
    replacement: dict[str, Any] | None = None
    watch: WatchRecord | None = None

    def left_out(self) -> set[str]:
        """Penalties, ranks and notes of a method that has none, and checksums and sizes of versions that kept none."""
        names = ("penalties", "ranks", "capped_ranks", "notes", "fingerprint", "files", "file_bytes")
        names += ("by_class", "samples", "kept", "by_size", "replacement", "watch")
        unknown = {"before_test"} if self.before_test is None else set()  # a score of 0 is one
        return {name for name in names if not getattr(self, name)} | unknown


@dataclass(kw_only=True)
class ComparedRun(Record):
    """One run of a comparison. It is filled in during the run, so the fields after a failure are None.

    Attributes:
        fingerprint: of the settings and the data that decide the numbers.
        method, label: its name, and its name in tables.
        phase: "trial" (scored on the validation part) or "seed" (scored on the test part, once).
        steps, batch_size: optimizer steps, and examples in each.
        config: the method's hyperparameters with all defaults filled in.
        losses, loss_steps, penalties: of each logged step; the losses are without the penalties that the method added.
        seconds_per_step, measured_peak_bytes: the median (None: too few steps), and the peak of one step (None: not measured).
        failure: why it failed; None if it did not.
        validation, test: scores (None: not scored, or not finite).
        hits: "1" or "0" for each row of the test part, right or wrong; None where rows are not right or wrong.
        size: rank, or what takes its place; None for methods without one.
        rung: steps after which a candidate of the search was scored.
        values, validation_values: one number for each row of the part, higher is better (`lowdim.train.tasks.Score`); methods
            are judged by those of the test part, candidates by those of the validation part.
        by_class: a table by class.
        kept: loss on the text that must not be forgotten, before and after.
        samples: what the model wrote for prompts of the test part.
        file_bytes: size of the weights that would be handed over (None: the same as another seed's).
        files: checksums of the files with the trained tensors (None: only another seed's are kept).
        by_size: scores on the test part at smaller sizes of an embedding: `{"layers", "dimensions", "score"}`.
        ranks: layer -> the rank that the method chose in training.
        retry: the machine failed (memory, disk, device) and not the method, so the run is tried again.
        capped_ranks, notes: layers that got a smaller rank than the others, and what the method says of the model.
        origin: of the rate: `"curvature"` if it was measured; None for one of the usual ones.
    """

    file: ClassVar[str] = RUN
    what: ClassVar[str] = "the record of a comparison's run"

    schema: int = 1
    fingerprint: str
    method: str
    label: str
    phase: str
    seed: int
    lr: float
    steps: int
    batch_size: int
    metric: str
    environment: dict[str, Any]
    config: dict[str, Any] | None = None
    trained_parameters: int | None = None
    losses: list[float | None] | None = None
    loss_steps: list[int] | None = None
    penalties: list[float | None] | None = None
    seconds_per_step: float | None = None
    measured_peak_bytes: int | None = None
    failure: str | None = None
    validation: float | None = None
    test: float | None = None
    hits: str | None = None
    file_bytes: int | None = None
    files: dict[str, str] | None = None
    ranks: dict[str, int] | None = None
    retry: bool = False
    capped_ranks: dict[str, Any] | None = None
    notes: list[str] | None = None
    size: int | None = None
    rung: int | None = None
    values: list[float] | None = None
    validation_values: list[float] | None = None
    by_class: list[dict[str, Any]] | None = None
    kept: list[float] | None = None
    samples: list[dict[str, str]] | None = None
    origin: str | None = None
    by_size: list[dict[str, Any]] | None = None

    @property
    def score(self) -> float | None:
        """The score on the test part for a seed, on the validation part for a trial."""
        return self.test if self.phase == "seed" else self.validation

    def left_out(self) -> set[str]:
        """Fields that the run did not reach. Time and memory of a run that trained are written even if they are unknown."""
        kept = {"failure"} if self.losses is None else {"failure", "seconds_per_step", "measured_peak_bytes"}
        unset = {name for name, value in vars(self).items() if value is None and name not in kept}
        return unset if self.retry else {*unset, "retry"}
