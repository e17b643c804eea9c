"""The protocol of a task: rows in three parts, how they become batches, the loss, and the score of a model on a part.

A task of one's own is a subclass, or made of functions by `lowdim.train.own_task`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowdim.calibrate import to_device
from lowdim.errors import check_choice, shown
from lowdim.surgery import model_device
from lowdim.train.data import Used
from lowdim.train.metrics import METRICS, Metric

if TYPE_CHECKING:
    from lowdim.calibrate import LossFn
    from lowdim.catalogue import Variant
    from lowdim.train.tasks.replace import Replacement

__all__ = [
    "Baseline",
    "Score",
    "Task",
    "check_finite",
    "data_name",
    "example_text",
    "to_device",
]


class Score(NamedTuple):
    """A model's score on one part.

    Attributes:
        value: of the metric.
        values: one number for each row of the part, in its order, **higher is better**: hits, negative losses, negative
            squared errors, or jackknife values of a metric that is no mean. Their mean over rows is what methods are judged by.
            Empty where the model's output is not finite.
        details: what a page shows besides, as JSON: `{"by_class": [...]}`.
    """

    value: float
    values: tuple[float, ...] = ()
    details: dict[str, Any] | None = None


@dataclass(frozen=True)
class Baseline:
    """A constant answer, which no training should fall short of.

    Attributes:
        name, label: for records and tables, such as `"majority-class"` and `"Majority class"`.
        what: in words, such as `"always answering the majority class, 'yes'"`.
        score: on the part.
        scores: metric -> score, for every metric of the task.
        sentence: what it scores, in one sentence.
        degenerate: whether no score on this part says anything, since all rows have one answer.
    """

    name: str
    label: str
    what: str
    score: Score
    scores: dict[str, float]
    sentence: str
    degenerate: bool = False


@dataclass(kw_only=True)
class Task:
    """Rows in three parts, and the loss and score of a model on them.

    A subclass gives `kind` and `metrics`, and implements `outcomes` and `score_of`; the others have defaults for models of
    transformers, whose output has `loss` and `logits`.

    Attributes:
        train, validation, test: rows, with `len` and integer indices (`datasets.Dataset`, a list); `train` may be a stream.
        collate: rows -> batch: tensors in a dict (with `labels`, for models of transformers), a tuple or a list.
        max_length: tokens in a row at most; 0 where rows have none.
        classes: names of the classes; empty where there are none.
        notes: columns that are not used, and rows that were left out or cut.
        name: of the data.
        evaluation_batch: rows at once when scoring.
        columns: what the columns of each file or stream are used for.
        example: the first training row as the model sees it, in one line.
        joint: what stands between the texts of a pair; `""` if the tokenizer puts it there, None for single texts.
        processor: what makes inputs from raw rows: a tokenizer or an image processor. It is saved with the model.
    """

    kind: ClassVar[str] = ""

    train: Any
    validation: Any
    test: Any
    collate: Callable[[list[Any]], Any]
    max_length: int = 0
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""
    evaluation_batch: int = 50
    columns: tuple[Used, ...] = ()
    example: str = ""
    joint: str | None = None
    processor: Any = field(default=None, repr=False)

    # What a task is.

    def metrics(self) -> list[Metric]:
        """The metrics of the task; the first is the usual one."""
        return [metric for metric in METRICS.values() if self.kind in metric.tasks]

    @property
    def subject(self) -> str:
        """What the rows are, in words, for messages."""
        return f"{self.kind} with {len(self.classes)} classes" if len(self.classes) > 2 else self.kind

    def metric(self, name: str | None = None) -> Metric:
        """The task's metric of this name, or its first.

        Raises:
            UnknownNameError: it has no such metric.
        """
        metrics = {metric.name: metric for metric in self.metrics()}
        if name is None:
            return next(iter(metrics.values()))
        check_choice(f"metric for {self.subject}", name, metrics)
        return metrics[name]

    @property
    def num_labels(self) -> int:
        """The number of outputs of the head."""
        return max(2, len(self.classes))

    @property
    def problem(self) -> str | None:
        """The model's `problem_type`, if it is not the form's usual one."""
        return None

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        output = model(**batch)
        return output["loss"] if isinstance(output, Mapping) else output.loss

    def loss_for(self, variant: Variant) -> LossFn:
        """The loss with which a method trains.

        Raises:
            ValueError: the method makes no sense for the task.
        """
        if variant.nested:
            raise ValueError(
                f"method {variant.name}: {variant.unfit(self.kind) or 'this task has no embeddings of several sizes'}"
            )
        return self.loss_fn

    def smaller(self, model: nn.Module, variants: Iterable[Variant]) -> tuple[tuple[int, int], ...]:
        """The `(layers, dimensions)` that these methods train besides the whole."""
        return ()

    def at_sizes(self, model: nn.Module, sizes: Sequence[tuple[int, int]], metric: Metric) -> list[dict[str, Any]]:
        """A model's score on the test part, cut to each of the sizes: `{"layers", "dimensions", "score"}`."""
        return []

    def count_items(self, batch: Any) -> int:
        """The number over which the loss of a batch is a mean: rows with a label, or tokens that count."""
        return int(batch["labels"].ne(-100).sum())

    def outcomes(self, model: nn.Module, batch: Any, metric: Metric) -> Sequence[Any]:
        """What the model makes of each row of a batch, such as `(label, prediction)`; it runs in evaluation mode.

        Raises:
            FloatingPointError: an output is not finite.
        """
        raise NotImplementedError(f"{type(self).__name__} must define outcomes(model, batch, metric)")

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The score of a part, from the outcomes of its rows in their order."""
        raise NotImplementedError(f"{type(self).__name__} must define score_of(outcomes, metric)")

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """A constant answer on a part; None where there is none."""
        return None

    def samples(self, model: nn.Module, count: int = 5) -> list[dict[str, str]]:
        """What the model writes for the first rows of the test part: `{"prompt", "answer", "expected"}`."""
        return []

    def finish(self, model: nn.Module, head: tuple[str, ...]) -> str | None:
        """Change a trained and scored model, in place, into the one that is written.

        Args:
            head: names of the modules that are new for the task.

        Returns:
            What to know of the written model's answers.
        """
        return None

    def replacement(self, model: nn.Module) -> Replacement | None:
        """Whether a trained model's vectors can be searched in an old model's index; None where it replaces none."""
        return None

    def row_length(self, row: Any) -> int:
        """A length by which rows are sorted before they are batched for scoring."""
        return len(row["input_ids"]) if isinstance(row, dict) and "input_ids" in row else 0

    def lengths(self) -> list[int]:
        """The `row_length` of each training row, by which rows are grouped into batches.

        Raises:
            ValueError: all rows have one length, or are read as a stream.
        """
        if not isinstance(self.train, Sized):
            raise ValueError("group_by_length needs all rows at once; a stream gives them one by one")
        rows: Any = self.train
        found = [self.row_length(row) for row in rows]
        if len(set(found)) < 2:
            raise ValueError(
                f"group_by_length groups texts by their length; rows of {self.kind or 'this task'} are all of one size: "
                "leave it out"
            )
        return found

    def longest(self) -> int:
        """The largest `row_length` of the training and validation parts, at least 1: the length that a forecast counts on."""
        return max((self.row_length(row) for part in (self.train, self.validation) for row in part), default=1) or 1

    def fit_config(self, config: Any) -> None:
        """Write what the data decides into a model's configuration before a forecast, such as the size of images."""

    def order(self, part: Any) -> list[int]:
        """The places of a part's rows in the order in which they are batched for scoring: those of like length together."""
        return sorted(range(len(part)), key=lambda i: self.row_length(part[i]))

    def data_checksum(self, name: str) -> str | None:
        """The checksum of a data file where its bytes are not the whole data, such as a table of paths; None elsewhere."""
        return None

    # What follows from it.

    def evaluate(self, model: nn.Module, part: Any, metric: Metric) -> float:
        """The value of `score`."""
        return self.score(model, part, metric).value

    def score(self, model: nn.Module, part: Any, metric: Metric) -> Score:
        """The score of a model on one part, in evaluation mode; NaN if an output is not finite."""
        try:
            found = self.all_outcomes(model, part, metric)
        except FloatingPointError:
            return Score(math.nan)
        return self.score_of(found, metric)

    @torch.no_grad()
    def all_outcomes(self, model: nn.Module, part: Any, metric: Metric) -> list[Any]:
        """The `outcomes` of a part's rows, in their order, in evaluation mode.

        Raises:
            FloatingPointError: an output is not finite.
        """
        device, was_training = model_device(model), model.training
        model.eval()
        order = self.order(part)
        found: list[Any] = [None] * len(order)
        try:
            for start in range(0, len(order), self.evaluation_batch):
                places = order[start : start + self.evaluation_batch]
                batch = to_device(self.collate([part[i] for i in places]), device)
                for place, outcome in zip(places, self.outcomes(model, batch, metric), strict=True):
                    found[place] = outcome
        finally:
            model.train(was_training)
        return found

    def sample_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[Any]:
        """The first training rows, for methods that need data before training."""
        rows = list(itertools.islice(iter(self.train), count * batch_size))
        for start in range(0, len(rows), batch_size):
            yield to_device(self.collate(rows[start : start + batch_size]), device)

    def data_record(self) -> dict[str, Any]:
        """What records hold about the data."""
        return {
            "name": self.name,
            **self.sizes(),
            "labels": list(self.classes),
            "columns": [used.to_dict() for used in self.columns],
            "example": self.example,
            "notes": list(self.notes),
            **({} if self.joint is None else {"joint": self.joint}),
            **({} if self.num_labels == max(2, len(self.classes)) else {"outputs": self.num_labels}),
            **({} if self.problem is None else {"problem": self.problem}),
        }

    def remarks(self) -> list[tuple[str, str]]:
        """What the user should read before training, each line with its kind: the columns, the notes, one example."""
        told = [("data", used.sentence) for used in self.columns if used.sentence not in self.notes]
        example = [("example", self.example)] if self.example else []
        return [*told, *(("note", note) for note in self.notes), *example]

    def sizes(self) -> dict[str, int]:
        """Rows in each part; a stream is not counted."""
        train = {"train": len(self.train)} if isinstance(self.train, Sized) else {}
        return {**train, "validation": len(self.validation), "test": len(self.test)}


def check_finite(logits: Tensor) -> None:
    """Raise FloatingPointError if an output is not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("an output of the model is not finite")


def example_text(tokenizer: Any, part: Any) -> str:
    """The first row of a part as the model sees it, cut to a line."""
    return shown(tokenizer.decode(part[0]["input_ids"], clean_up_tokenization_spaces=False), 160)


def data_name(files: Sequence[Any]) -> str:
    """The files of a data set, for titles."""
    names = [Path(file).name for file in files]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
