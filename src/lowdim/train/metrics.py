"""Metrics by name, and intervals of means over seeds."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

from lowdim.errors import MissingExtraError, check_choice
from lowdim.records import metric_title

__all__ = ["METRICS", "Metric", "metric_for", "science"]


@dataclass(frozen=True)
class Metric:
    """A score: its name, its tasks, and which direction is better.

    Attributes:
        low, high: the ends of its range.
        judged: what methods are judged by, in words, where it is not the metric itself: the loss for perplexity.
    """

    name: str
    tasks: tuple[str, ...]
    higher_is_better: bool
    low: float = 0.0
    high: float = 1.0
    judged: str = ""

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
        *(Metric(name, ("classify", "image"), True) for name in ("accuracy", "f1", "f1-micro", "f1-weighted", "f1-binary")),
        Metric("mcc", ("classify", "image"), True, low=-1.0),
        Metric("auc", ("classify", "image"), True),
        Metric("spearman", ("regress", "embed"), True, low=-1.0),
        Metric("pearson", ("regress",), True, low=-1.0),
        Metric("rmse", ("regress",), False, high=math.inf, judged="squared error"),
        Metric("perplexity", ("causal-lm", "pretrain", "instruct"), False, low=1.0, high=math.inf, judged="loss"),
        Metric("loss", ("causal-lm", "pretrain", "instruct"), False, high=math.inf),
        Metric("bits-per-byte", ("causal-lm", "pretrain"), False, high=math.inf),
        Metric("exact-match", ("instruct",), True),
        Metric("ndcg@10", ("embed",), True),
        Metric("index-accuracy", ("embed",), True),
        Metric("entity-f1", ("tokens",), True),
        Metric("token-accuracy", ("tokens",), True),
    )
}


def metric_for(task: str, name: str | None = None) -> Metric:
    """The metric of this name, or the task's first.

    Raises:
        UnknownNameError: not a metric of this task.
    """
    names = [m.name for m in METRICS.values() if task in m.tasks]
    if name is None:
        return METRICS[names[0]]
    check_choice(f"metric for {task}", name, names)
    return METRICS[name]


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
