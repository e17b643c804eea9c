"""The record of a comparison of compressions at equal bytes: `families.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lowdim.records.base import Record
from lowdim.records.study import StudyRecord

__all__ = ["FamiliesRecord", "FamilyRun", "LevelRecord"]


@dataclass(frozen=True, kw_only=True)
class FamilyRun(Record):
    """One method at one budget with one seed.

    Attributes:
        budget: as it was written; empty for a method whose size is fixed.
        lr: of the tuning; None without it.
        size: bytes of the tensors in a file; of pruned weights the kept ones and a bit for each place.
        before, score: of the metric on the held-out rows, before the tuning and after it.
        values: a number for each held-out row, higher is better.
        notes: what to look at.
        failure: why there is no score.
    """

    method: str
    budget: str
    seed: int
    lr: float | None = None
    size: int = 0
    before: float | None = None
    score: float | None = None
    values: list[float] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class LevelRecord(Record):
    """What was shown at one budget.

    Attributes:
        allowed: bytes.
        means, half_widths: method -> mean score as it is judged (higher is better), and the half-width to the leader's.
        best: shown to be better than every other; None if none is.
        may_be_best: those that no other is shown to be better than.
        not_judged: method -> why it is not judged here.
    """

    budget: str
    allowed: int
    headline: str
    means: dict[str, float] = field(default_factory=dict)
    half_widths: dict[str, float] = field(default_factory=dict)
    leader: str | None = None
    best: str | None = None
    may_be_best: list[str] = field(default_factory=list)
    not_judged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FamiliesRecord(StudyRecord):
    """A comparison of compressions: its settings, every run, and the verdict at each budget."""

    file: ClassVar[str] = "families.json"
    what: ClassVar[str] = "the record of a comparison of compressions"

    judged: str
    settings: dict[str, Any]
    dense_bytes: int
    dense_score: float | None
    runs: list[FamilyRun] = field(default_factory=list)
    levels: list[LevelRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
