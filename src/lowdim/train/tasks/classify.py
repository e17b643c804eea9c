"""Task classify: a class for each text, or pair of texts; or any number of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import listed
from lowdim.train.class_scores import Answers, area_under_curve, best_constant, by_class, class_score, positive_class
from lowdim.train.metrics import METRICS, Metric
from lowdim.train.tasks.base import Baseline, Score, Task, check_finite, data_name
from lowdim.train.tasks.labelled import Pad, Reading, labelled_parts

__all__ = ["Classification", "SeveralClasses", "classification"]

_EXACT = "a text may have several classes; accuracy counts it as right only if all of them, and no other, are answered"


@dataclass(kw_only=True)
class Classification(Task):
    """One class for each row; an outcome is the row's class, and the logarithm of each class's probability."""

    kind: ClassVar[str] = "classify"
    noun: ClassVar[str] = "texts"  # what the rows are

    def metrics(self) -> list[Metric]:
        """The metrics of the task; the F1 of one of two classes only where there are two."""
        return [each for each in super().metrics() if each.name != "f1-binary" or len(self.classes) == 2]

    @property
    def positive(self) -> int:
        """Of two classes, the one that `f1-binary` is of.

        Raises:
            ValueError: there are not two classes.
        """
        if len(self.classes) != 2:
            raise ValueError(f"f1-binary is for two classes; there are {len(self.classes)} ({listed(self.classes)})")
        counts = Counter(self.train["labels"])
        return positive_class(self.classes, [counts[0], counts[1]])

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Class and log-probabilities of each row."""
        logits = model(**batch).logits
        check_finite(logits)
        scores = torch.log_softmax(logits.double(), -1).cpu().numpy()
        return list(zip(batch["labels"].tolist(), scores))

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The metric, its value for each row (hits for accuracy), and a table by class."""
        labels, scores = (np.array(column) for column in zip(*outcomes))
        answers = Answers.single(labels, scores.argmax(1), len(self.classes))
        details: dict[str, Any] = {"by_class": by_class(answers, self.classes)}
        if metric.name == "auc":
            value, values = area_under_curve(np.eye(len(self.classes))[labels], scores)
        elif metric.name == "f1-binary":
            value, values = class_score(metric.name, answers, self.positive)
            details["positive"] = self.classes[self.positive]
        else:
            value, values = class_score(metric.name, answers)
        return Score(value, tuple(values.tolist()), details)

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """Always answering the class that is most frequent in training."""
        if not len(part):
            return None
        most = Counter(int(label) for label in self.train["labels"]).most_common(1)[0][0]
        labels = [int(label) for label in part["labels"]]
        answers = [(label, np.eye(len(self.classes))[most]) for label in labels]
        found = {each.name: self.score_of(answers, each) for each in self.metrics()}
        name = str(self.classes[most])
        told = dict.fromkeys(("accuracy", "f1", "mcc", metric.name))
        shown_scores = ", ".join(f"{METRICS[each].title} {found[each].value:.3f}" for each in told)
        share = sum(label == most for label in labels) / len(labels)
        return Baseline(
            "majority-class",
            "Majority class",
            f"always answering the majority class, {name!r}",
            found[metric.name],
            {each: score.value for each, score in found.items()},
            f"always answering {name!r} ({share:.1%} of the {self.noun}) gives {shown_scores}",
            len(set(labels)) < 2,
        )


@dataclass(kw_only=True)
class SeveralClasses(Classification):
    """Any number of classes for each row; an outcome is the row's zeros and ones, and the logit of each class.

    A class is answered where its logit is above 0. Accuracy counts a row as right only if its classes are exactly those.
    """

    def metrics(self) -> list[Metric]:
        """The metrics of the task: not those of one class alone."""
        return [each for each in super().metrics() if each.name not in ("mcc", "f1-binary")]

    @property
    def subject(self) -> str:
        """For messages."""
        return f"{self.kind} with several classes for each of the {self.noun}"

    @property
    def problem(self) -> str:
        """The model's `problem_type`."""
        return "multi_label_classification"

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean binary cross-entropy over rows and classes."""
        logits = model(**_without_labels(batch)).logits
        return F.binary_cross_entropy_with_logits(logits.float(), batch["labels"])

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """The rows."""
        return len(batch["labels"])

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Zeros and ones, and logits, of each row."""
        logits = model(**_without_labels(batch)).logits
        check_finite(logits)
        return list(zip(batch["labels"].double().cpu().numpy(), logits.double().cpu().numpy()))

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The metric, its value for each row, and a table by class."""
        truth, logits = (np.stack(column) for column in zip(*outcomes))
        answers = Answers.several(truth, (logits > 0).astype(np.float64))
        auc = metric.name == "auc"
        value, values = area_under_curve(truth, logits) if auc else class_score(metric.name, answers)
        return Score(value, tuple(values.tolist()), {"by_class": by_class(answers, self.classes)})

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """The constant answer that is best in training by the metric: some of the most frequent classes, or the usual set."""
        if not len(part):
            return None
        train, truth = (self._indicators(rows["labels"]) for rows in (self.train, part))

        best = best_constant(metric.name, train)
        answers = [(row, 2 * best - 1) for row in truth]
        name = listed(repr(self.classes[i]) for i in np.flatnonzero(best)) or "no class"
        found = {each.name: self.score_of(answers, each) for each in self.metrics()}
        told = dict.fromkeys(("accuracy", "f1", "f1-micro", metric.name))
        shown_scores = ", ".join(f"{METRICS[each].title} {found[each].value:.3f}" for each in told)
        return Baseline(
            "constant-answer",
            "Constant answer",
            f"always answering {name}, the best constant answer in training",
            found[metric.name],
            {each: value.value for each, value in found.items()},
            f"always answering {name} gives {shown_scores}",
            len(np.unique(truth, axis=0)) < 2,
        )

    def _indicators(self, labels: Sequence[Sequence[int]]) -> Any:
        """`(rows, classes)`, 1 where a row has the class."""
        found = np.zeros((len(labels), len(self.classes)))
        for row, own in zip(found, labels):
            row[own] = 1.0
        return found


def _without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def load(recipe: Any, processor: Any, **keywords: Any) -> Classification:
    """The task of a recipe."""
    from lowdim import models

    how = {"label": recipe.label, "separator": recipe.label_separator, "segments": models.reads_segments(recipe.model)}
    return classification(processor, recipe.data, **how, **keywords)


def classification(
    tokenizer: Any, files: Sequence[str | Path], *, separator: str | None = None, **reading: Unpack[Reading]
) -> Classification:
    """A classification task from labelled files; where labels are lists, each text has any number of classes.

    Pairs of texts are read as one input each (`lowdim.train.inputs`). No text is in two parts (`lowdim.train.splits`).

    Args:
        separator: what stands between several labels that are written as one string, such as `";"`.
        reading: keywords of `lowdim.train.tasks.labelled.Reading`, such as `text`, `label`, `evaluation` and `max_length`.

    Raises:
        DataError, UnknownNameError: see `lowdim.train.data`.
    """
    parts = labelled_parts(tokenizer, files, separator=separator, **reading)
    kind = SeveralClasses if parts.several else Classification
    return kind(
        train=parts.train,
        validation=parts.validation,
        test=parts.test,
        collate=Pad.of(tokenizer, len(parts.classes) if parts.several else 0),
        max_length=parts.max_length,
        classes=parts.classes,
        notes=(*parts.notes, *([_EXACT] if parts.several else [])),
        name=data_name(files),
        columns=parts.columns,
        example=parts.example,
        joint=parts.joint,
        processor=tokenizer,
    )
