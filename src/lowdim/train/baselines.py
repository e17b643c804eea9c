"""What a score is worth: what a constant answer scores on the same rows, for every metric."""

from __future__ import annotations

from lowdim.train.metrics import Metric
from lowdim.train.tasks.base import Baseline

__all__ = ["baseline_record", "worth"]


def baseline_record(constant: Baseline) -> dict[str, object]:
    """For records, without the answers."""
    return {"name": constant.name, "what": constant.what, "scores": constant.scores}


def worth(constant: Baseline, score: float, metric: Metric) -> str | None:
    """A sentence where a score is not above that of the constant answer, or where no score can say anything."""
    if constant.degenerate:
        return f"all rows have one answer ({constant.what} is always right): no score on them says anything"
    least = constant.scores[metric.name]
    beats = score > least + 1e-12 if metric.higher_is_better else score < least - 1e-12
    if beats:
        return None
    tell = "; compare by --metric f1 or mcc, which give it no credit" if metric.name == "accuracy" else ""
    return f"{metric.title} {score:.3f} is not better than {constant.what} ({least:.3f}){tell}"
