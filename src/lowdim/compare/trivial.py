"""The rows that always stand in a comparison: a constant answer, and the model as it was before training."""

from __future__ import annotations

from lowdim.records import MethodRecord
from lowdim.train.baselines import Majority
from lowdim.train.metrics import Metric
from lowdim.train.tasks import Score

__all__ = ["MAJORITY", "UNTOUCHED", "trivial_rows"]

MAJORITY, UNTOUCHED = "majority-class", "untouched"


def trivial_rows(metric: Metric, constant: Majority | None, untouched: Score | None) -> list[MethodRecord]:
    """The rows of what was never trained, with their scores on the test part; `reason` says what they are."""
    rows = []
    if constant is not None:
        what = f"always answering the majority class, {constant.name!r}"
        rows.append(_row(MAJORITY, "Majority class", what, constant.scores[metric.name], constant.hits))
    if untouched is not None:
        rows.append(_row(UNTOUCHED, "Untouched model", "the untouched model", untouched.value, untouched.hits))
    return rows


def _row(name: str, label: str, what: str, score: float, hits: tuple[int, ...]) -> MethodRecord:
    return MethodRecord(
        name=name,
        label=label,
        family="baseline",
        baseline=True,
        trivial=True,
        reason=what,
        scores=[score],
        mean=score,
        hits=["".join(map(str, hits))],
        trained_parameters=0,
    )
