"""Scores by name, and intervals of means over seeds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import MissingExtraError, check_choice
from lowdim.records import metric_title

__all__ = ["METRICS", "Metric", "classification_score", "difference_is_noise", "interval", "metric_for", "science"]


@dataclass(frozen=True)
class Metric:
    """A score: its name, its tasks, and which direction is better."""

    name: str
    task: str
    higher_is_better: bool
    low: float = 0.0
    high: float = 1.0

    @property
    def title(self) -> str:
        """As it is printed, with the kind of average: `f1 (macro)`."""
        return metric_title(self.name)

    def better(self, a: float, b: float) -> bool:
        """Whether `a` beats `b`; a NaN beats nothing."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.higher_is_better else a < b


METRICS = {
    m.name: m
    for m in (
        Metric("accuracy", "classify", True),
        Metric("f1", "classify", True),
        Metric("mcc", "classify", True, low=-1.0),
        Metric("perplexity", "causal-lm", False, low=1.0, high=math.inf),
        Metric("loss", "causal-lm", False, high=math.inf),
    )
}


def metric_for(task: str, name: str | None = None) -> Metric:
    """The metric of this name, or the task's first.

    Raises:
        UnknownNameError: not a metric of this task.
    """
    family = "causal-lm" if task == "pretrain" else task
    names = [m.name for m in METRICS.values() if m.task == family]
    if name is None:
        return METRICS[names[0]]
    check_choice(f"metric for {task}", name, names)
    return METRICS[name]


def classification_score(metric: str, labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Accuracy, macro F1 or Matthews correlation."""
    scores = science("sklearn.metrics", "scoring")
    if metric == "accuracy":
        return float(scores.accuracy_score(labels, predictions))
    if metric == "f1":
        return float(scores.f1_score(labels, predictions, average="macro", zero_division=0))
    if len({*labels, *predictions}) < 2:
        return 0.0  # one class alone: no correlation, and a warning from scikit-learn
    return float(scores.matthews_corrcoef(labels, predictions))


def science(module: str, purpose: str) -> Any:
    """A module of scipy or scikit-learn.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = "scikit-learn" if module.startswith("sklearn") else "scipy"
        raise MissingExtraError(package, "train", purpose) from None


def interval(
    scores: Sequence[float], level: float = 0.95, *, low: float = -math.inf, high: float = math.inf
) -> tuple[float, float] | None:
    """The t interval of the mean over seeds, clipped to the range of the score; None for fewer than two scores.

    It covers only the spread over seeds, not the size of the test set.
    """
    if len(scores) < 2:
        return None
    t = science("scipy.stats", "an interval").t
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    half = float(t.ppf(0.5 + level / 2, len(scores) - 1)) * spread / math.sqrt(len(scores))
    return max(low, mean - half), min(high, mean + half)


def difference_is_noise(best: Sequence[float], other: Sequence[float], sampling_error: float = 0.0) -> bool:
    """Whether the difference of two means is within its 95 % interval.

    The seeds are paired (same split, same order of data), so the interval is that of the paired differences; the error
    of measuring both on the same finite test set, `sampling_error` (one standard error of the difference), is added in
    quadrature. With fewer than two seeds in common everything is noise.
    """
    n = min(len(best), len(other))
    if n < 2:
        return True
    t = science("scipy.stats", "an interval").t
    gaps = [a - b for a, b in zip(best[:n], other[:n])]
    mean = sum(gaps) / n
    seeds = math.sqrt(sum((g - mean) ** 2 for g in gaps) / (n - 1) / n) * float(t.ppf(0.975, n - 1))
    return abs(mean) <= math.hypot(seeds, 1.96 * sampling_error)
