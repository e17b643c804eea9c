"""The rows that always stand in a comparison: a constant answer, and the model as it was before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowdim.records import MethodRecord
from lowdim.train.metrics import Metric
from lowdim.train.tasks.base import Baseline, Score

__all__ = ["MAJORITY", "UNTOUCHED", "hits_of", "trivial_rows", "trivial_values"]

MAJORITY, UNTOUCHED = "majority-class", "untouched"


def hits_of(score: Score) -> str:
    """Right or wrong for each row as `"1"` and `"0"`; empty for values that are no hits."""
    whole = all(value in (0.0, 1.0) for value in score.values)
    return "".join("1" if value else "0" for value in score.values) if whole else ""


def trivial_rows(
    metric: Metric, constant: Baseline | None, untouched: Score | None, by_size: Sequence[dict[str, Any]] = ()
) -> list[MethodRecord]:
    """The rows of what was never trained, with their scores on the test part; `reason` says what they are.

    Args:
        by_size: the untouched model's scores at smaller sizes.
    """
    rows = []
    if constant is not None:
        rows.append(_row(constant.name, constant.label, constant.what, constant.score))
    if untouched is not None:
        rows.append(_row(UNTOUCHED, "Untouched model", "the untouched model", untouched))
        rows[-1].by_size = list(by_size)
    return rows


def trivial_values(constant: Baseline | None, untouched: Score | None) -> dict[str, Sequence[float]]:
    """Name of the row -> its score for each row of the test part, for the judge."""
    scores = {} if constant is None else {constant.name: constant.score}
    return {name: score.values for name, score in (scores | ({UNTOUCHED: untouched} if untouched else {})).items()}


def _row(name: str, label: str, what: str, score: Score) -> MethodRecord:
    return MethodRecord(
        name=name,
        label=label,
        family="baseline",
        baseline=True,
        trivial=True,
        reason=what,
        scores=[score.value],
        mean=score.value,
        hits=[hits_of(score)],
        trained_parameters=0,
    )
