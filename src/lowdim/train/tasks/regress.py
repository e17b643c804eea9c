"""Task regress: a number for each text, or pair of texts.

A model learns the numbers less their mean, over their standard deviation, both of the training part, so that one learning rate
serves prices and similarities. Scores are in the numbers' own unit, and so is what is written: at the end, mean and deviation
move into the head's weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import DataError
from lowdim.train.data import Used
from lowdim.train.metrics import Metric
from lowdim.train.number_scores import number_score
from lowdim.train.tasks.base import Baseline, Score, Task, check_finite, data_name
from lowdim.train.tasks.labelled import Pad, Reading, labelled_parts

__all__ = ["Regression", "regression"]

_FEW = 5  # different whole numbers that may be classes


@dataclass(kw_only=True)
class Regression(Task):
    """A number for each row; an outcome is `(number, answer)` in the numbers' unit.

    Attributes:
        mean, deviation: of the numbers of the training part; rows hold `(number - mean) / deviation` as their label.
    """

    kind: ClassVar[str] = "regress"

    mean: float
    deviation: float

    @property
    def num_labels(self) -> int:
        """One output."""
        return 1

    @property
    def problem(self) -> str:
        """The model's `problem_type`."""
        return "regression"

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean squared error, on standardised numbers."""
        return F.mse_loss(self._outputs(model, batch), batch["labels"])

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """The rows."""
        return len(batch["labels"])

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Number and answer of each row."""
        found = self._outputs(model, batch)
        check_finite(found)
        columns = (self.mean + self.deviation * part.double() for part in (batch["labels"], found))
        return list(zip(*(column.tolist() for column in columns)))

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The metric, and its value for each row: negative squared errors for `rmse`, else those of the jackknife."""
        truth, answers = (np.array(column) for column in zip(*outcomes))
        value, values = number_score(metric.name, truth, answers)
        return Score(value, tuple(values.tolist()))

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """Always answering the mean of the training part."""
        if not len(part):
            return None
        truth = self.mean + self.deviation * np.array(part["labels"])
        answers = [(number, self.mean) for number in truth]
        found = {each.name: self.score_of(answers, each) for each in self.metrics()}
        return Baseline(
            "mean-answer",
            "Mean",
            f"always answering the mean, {self.mean:.4g}",
            found[metric.name],
            {name: score.value for name, score in found.items()},
            f"always answering the mean, {self.mean:.4g}, gives "
            + ", ".join(f"{each.title} {found[each.name].value:.3f}" for each in self.metrics()),
            bool(np.ptp(truth) == 0),
        )

    def data_record(self) -> dict[str, Any]:
        """What records hold about the data, with mean and deviation."""
        return {**super().data_record(), "mean": self.mean, "deviation": self.deviation}

    @torch.no_grad()
    def finish(self, model: nn.Module, head: tuple[str, ...]) -> str | None:
        """Make a trained model answer in the numbers' unit: `deviation (w·h + b) + mean` is a head with other weights.

        Call it once, after scoring and before the model is written.

        Returns:
            What to know of the answers where the head has no bias to take the mean; None where they are the numbers.
        """
        layer = _last_linear(model, head)
        if layer is None or layer.bias is None:
            return (
                f"the written model answers (number - {self.mean:.6g}) / {self.deviation:.6g}, since its head has no bias that "
                f"could hold the mean: the number is {self.mean:.6g} + {self.deviation:.6g} x the answer"
            )
        weight, bias = layer.weight.double() * self.deviation, layer.bias.double() * self.deviation + self.mean
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return None

    def _outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's answers, standardised: `(rows,)`."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs).logits.float().reshape(-1)


def load(recipe: Any, processor: Any, **keywords: Any) -> Regression:
    """The task of a recipe."""
    from lowdim import models

    if recipe.label_separator is not None:
        raise DataError(f"label_separator is for --task classify; got {recipe.label_separator!r} for regress")
    return regression(processor, recipe.data, label=recipe.label, segments=models.reads_segments(recipe.model), **keywords)


def regression(tokenizer: Any, files: Sequence[str | Path], **reading: Unpack[Reading]) -> Regression:
    """A regression task from files of texts, or pairs of texts, with numbers.

    Args:
        reading: keywords of `lowdim.train.tasks.labelled.Reading`; `label` is the column of the number.

    Raises:
        DataError, UnknownNameError: see `lowdim.train.data`; all numbers of the training part are equal.
    """
    parts = labelled_parts(tokenizer, files, numbers=True, **reading)
    numbers = np.array(parts.train["labels"])
    mean, deviation = float(numbers.mean()), float(numbers.std())
    if not deviation > 1e-12 * max(1.0, abs(mean)):
        raise DataError(f"{data_name(files)}: all numbers to train on are {mean:g}; there is nothing to learn")
    train, chosen, test = (
        part.remove_columns("labels").add_column("labels", ((np.array(part["labels"]) - mean) / deviation).tolist())
        for part in (parts.train, parts.validation, parts.test)
    )
    return Regression(
        train=train,
        validation=chosen,
        test=test,
        collate=Pad.of(tokenizer),
        max_length=parts.max_length,
        notes=(*parts.notes, *_maybe_classes(numbers, parts.columns)),
        name=data_name(files),
        columns=parts.columns,
        example=parts.example,
        joint=parts.joint,
        processor=tokenizer,
        mean=mean,
        deviation=deviation,
    )


def _maybe_classes(numbers: Any, columns: Sequence[Used]) -> list[str]:
    """A note on few different whole numbers, which may be classes."""
    different = np.unique(numbers)
    if len(different) > _FEW or (different != np.round(different)).any():
        return []
    column = columns[0].roles.label
    shown_numbers = ", ".join(f"{number:g}" for number in different)
    return [f"column {column!r} holds the numbers {shown_numbers} only; if they are classes, --task classify trains on them"]


def _last_linear(model: nn.Module, head: tuple[str, ...]) -> nn.Linear | None:
    """The layer that gives the answer: the last linear layer of the head, with one output."""
    parts = [part for name in head for part in model.get_submodule(name).modules()]
    found = [part for part in parts if type(part) is nn.Linear and part.out_features == 1 and part.weight.is_floating_point()]
    return found[-1] if found else None
