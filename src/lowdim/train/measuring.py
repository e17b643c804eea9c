"""What a model scores on the held-out parts, and what it writes: measured before and after training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import LowdimError
from lowdim.linalg import many_processes
from lowdim.train.baselines import worth
from lowdim.train.keeping import Kept
from lowdim.train.metrics import Metric
from lowdim.train.tasks.base import Baseline, Score, Task

__all__ = ["Measured", "doubts", "measure", "refuse_broken", "samples"]


@dataclass(frozen=True)
class Measured:
    """A model's scores.

    Attributes:
        validation: on the validation part.
        test: on the test part; None where the model could not answer.
        samples: what it writes, as of `Task.samples`.
        kept: its loss on the text that must not be forgotten.
    """

    validation: float
    test: Score | None = None
    samples: list[dict[str, str]] = field(default_factory=list)
    kept: float | None = None

    @property
    def by_class(self) -> list[dict[str, Any]]:
        """The table by class on the test part, if the task has one."""
        return list(((self.test and self.test.details) or {}).get("by_class", ()))


def measure(model: nn.Module, task: Task, metric: Metric, kept: Kept | None = None, *, answers: bool = True) -> Measured:
    """Score a model.

    Args:
        kept: the text that must not be forgotten.
        answers: whether the model can answer; otherwise only its validation score is taken, to compare with later.
    """
    validation = task.evaluate(model, task.validation, metric)
    if not answers or not math.isfinite(validation):
        return Measured(validation)
    test = task.score(model, task.test, metric)
    written = [] if many_processes() else task.samples(model)  # generating from shards would need all of them at each token
    return Measured(validation, test, written, None if kept is None else kept.loss(model))


def refuse_broken(model: nn.Module, name: str) -> None:
    """Called where a model has no score before training: its weights may be no numbers.

    Raises:
        LowdimError: with the name of the first such weight.
    """
    for key, weight in model.named_parameters():
        plain = type(weight.data) is Tensor and weight.is_floating_point() and weight.dtype.itemsize > 1
        if plain and not bool(torch.isfinite(weight).all()):
            raise LowdimError(f"--model {name}: {key} has NaN or infinite entries; use another copy of the model")


def samples(before: Measured, after: Measured) -> list[dict[str, str]]:
    """What the model wrote for each prompt before and after training: `{"prompt", "expected", "before", "after"}`."""
    earlier = {row["prompt"]: row["answer"] for row in before.samples}
    return [
        {"prompt": row["prompt"], "expected": row["expected"], "before": earlier.get(row["prompt"], ""), "after": row["answer"]}
        for row in after.samples
    ]


def doubts(metric: Metric, before: Measured, after: Measured, constant: Baseline | None) -> list[str]:
    """Why the scores are no success: worse than before training, or no better than a constant answer on the test part."""
    found = []
    if metric.better(before.validation, after.validation):
        found.append(
            f"the training made the model worse: validation {metric.title} {before.validation:.4g} before, "
            f"{after.validation:.4g} after; try a smaller learning rate"
        )
    if constant is not None and after.test is not None and (doubt := worth(constant, after.test.value, metric)) is not None:
        found.append(f"on the test part, {doubt}")
    return found
