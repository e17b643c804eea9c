"""Tasks: text classification or language modelling, with datasets, loss and score in one object."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowdim.errors import DataError, MissingExtraError
from lowdim.models.padding import padding_side
from lowdim.surgery import model_device
from lowdim.train.data import Examples, read_examples, read_texts, split
from lowdim.train.metrics import Metric, classification_score

__all__ = ["Score", "Task", "classification", "language_modelling", "stack_blocks"]


class Score(NamedTuple):
    """A model's score on one part.

    Attributes:
        value: of the metric.
        hits: 1 or 0 for each row, right or wrong, in the order of the part; empty for language models.
    """

    value: float
    hits: tuple[int, ...] = ()


@dataclass
class Task:
    """Tokenised parts of the data, and the scoring of a model on them.

    Attributes:
        kind: `"classify"` or `"causal-lm"`.
        train, validation, test: `datasets.Dataset` with `input_ids` (and `labels`, `attention_mask`).
        collate: rows -> batch of tensors.
        classes: names of the classes (empty for language models).
        notes: messages about texts that were left out or truncated.
    """

    kind: str
    train: Any
    validation: Any
    test: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    max_length: int
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""
    evaluation_batch: int = field(default=50)

    @property
    def num_labels(self) -> int:
        """The number of outputs of the head."""
        return max(2, len(self.classes))

    def sizes(self) -> dict[str, int]:
        """Rows in each part; a stream is not counted."""
        train = {"train": len(self.train)} if isinstance(self.train, Sized) else {}
        return {**train, "validation": len(self.validation), "test": len(self.test)}

    def sample_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The first training rows, for methods that need data before training."""
        rows = list(itertools.islice(iter(self.train), count * batch_size))
        for start in range(0, len(rows), batch_size):
            batch = self.collate(rows[start : start + batch_size])
            yield {key: value.to(device) for key, value in batch.items()}

    @staticmethod
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's own loss on a batch with labels."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, part: Any, metric: Metric) -> float:
        """The value of `score`."""
        return self.score(model, part, metric).value

    @torch.no_grad()
    def score(self, model: nn.Module, part: Any, metric: Metric) -> Score:
        """The score of a model on one part, in evaluation mode; NaN if an output is not finite."""
        device, was_training = model_device(model), model.training
        model.eval()
        order = sorted(range(len(part)), key=lambda i: len(part[i]["input_ids"]))
        labels, predictions, loss, tokens = [], [], 0.0, 0
        try:
            for start in range(0, len(order), self.evaluation_batch):
                rows = [part[i] for i in order[start : start + self.evaluation_batch]]
                batch = {key: value.to(device) for key, value in self.collate(rows).items()}
                output = model(**batch)
                if not bool(torch.isfinite(output.logits).all()):
                    return Score(math.nan)
                if self.kind == "classify":
                    labels += batch["labels"].tolist()
                    predictions += output.logits.argmax(-1).tolist()
                else:
                    count = int((batch["labels"][:, 1:] != -100).sum())
                    loss, tokens = loss + float(output.loss) * count, tokens + count
        finally:
            model.train(was_training)
        if self.kind == "classify":
            right = dict(zip(order, (int(a == b) for a, b in zip(labels, predictions))))
            hits = tuple(right[i] for i in range(len(part)))
            return Score(classification_score(metric.name, labels, predictions), hits)
        mean = loss / max(1, tokens)
        return Score(mean if metric.name == "loss" else math.exp(min(mean, 50.0)))


def classification(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Task:
    """A classification task from labelled files.

    Args:
        evaluation: a separate test file; otherwise part of the data is held out.
        max_length: tokens kept of each text; longer ones are cut and counted.
        most: maximum number of tokens that the model can read (`lowdim.models.longest_text`).
        limit: maximum number of training texts, with at least one of each class.

    Raises:
        DataError, UnknownNameError: see `lowdim.train.data`.
    """
    datasets = _datasets()
    examples = read_examples(files, text=text, label=label)
    held = None if evaluation is None else read_examples([evaluation], text=text, label=label, classes=examples.classes)
    parts = split(examples, test=held, seed=seed)
    train = parts.train if limit is None else _first(parts.train, limit)
    length = max_length if most is None else min(max_length, most)
    notes = [*examples.notes, *(held.notes if held else ()), *parts.notes]
    tables, cut, total = {}, 0, 0
    for name, part in (("train", train), ("validation", parts.validation), ("test", parts.test)):
        ids = tokenizer(list(part.texts), truncation=False, verbose=False)["input_ids"]
        long = sum(len(row) > length for row in ids)
        cut, total = cut + long, total + len(ids)
        if long:
            ids = tokenizer(list(part.texts), truncation=True, max_length=length)["input_ids"]
        tables[name] = datasets.Dataset.from_dict({"input_ids": ids, "labels": list(part.labels)})
    if cut:
        why = "--max-length" if length == max_length else "the model reads no more"
        notes.append(f"{cut} of {total} texts are longer than {length} tokens and were cut ({why})")
    return Task(
        "classify",
        tables["train"],
        tables["validation"],
        tables["test"],
        _Pad(tokenizer.pad_token_id or 0, padding_side(tokenizer)),
        length,
        examples.classes,
        tuple(notes),
        _name(files),
    )


def language_modelling(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    text: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Task:
    """Language modelling on text files: documents are joined by the end token and cut into blocks of `max_length`.

    Args: see `classification`.

    Held-out blocks are contiguous, at the end of the text, so that neighbouring blocks do not leak.

    Raises:
        DataError: no text, or fewer than three blocks of it.
    """
    datasets = _datasets()
    documents, notes = read_texts(files, text=text)
    if most is not None and most < max_length:
        notes.append(f"blocks have {most} tokens, not {max_length}: the model reads no more")
        max_length = most
    blocks = _blocks(tokenizer, documents, max_length)
    if evaluation is None:
        if len(blocks) < 3:
            raise DataError(
                f"{_name(files)} gives {len(blocks)} blocks of {max_length} tokens; at least 3 are needed (--max-length)"
            )
        test_count, validation_count = max(1, len(blocks) // 5), max(1, len(blocks) // 8)
        held = blocks[len(blocks) - test_count :]
        rest = blocks[: len(blocks) - test_count]
    else:
        held_documents, held_notes = read_texts([evaluation], text=text)
        notes += held_notes
        held = _blocks(tokenizer, held_documents, max_length)
        rest, validation_count = blocks, max(1, len(blocks) // 8)
        if len(rest) < 2 or not held:
            raise DataError(
                f"{_name(files)} and {evaluation} give too little text for blocks of {max_length} tokens (--max-length)"
            )
    train, chosen = rest[: len(rest) - validation_count], rest[len(rest) - validation_count :]
    random.Random(f"{seed}/blocks").shuffle(train)
    learn, choose, report = (datasets.Dataset.from_dict({"input_ids": p, "labels": p}) for p in (train[:limit], chosen, held))
    return Task(
        "causal-lm", learn, choose, report, stack_blocks, max_length, (), tuple(notes), _name(files), evaluation_batch=16
    )


def _first(examples: Examples, limit: int) -> Examples:
    """The first `limit` examples, with one of each class before others."""
    firsts = list({label: i for i, label in reversed(list(enumerate(examples.labels)))}.values())
    if limit < len(firsts):
        raise DataError(f"limit must be at least {len(firsts)}, one example of each class; got {limit}")
    others = [i for i in range(len(examples)) if i not in set(firsts)]
    return examples.take(sorted([*firsts, *others[: limit - len(firsts)]]))


class _Pad:
    """Pads rows to the longest of the batch."""

    def __init__(self, pad: int, side: str):
        self.pad, self.side = pad, side

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            where = slice(longest - count, None) if self.side == "left" else slice(0, count)
            ids[i, where] = torch.tensor(row["input_ids"])
            mask[i, where] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def stack_blocks(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of one length as a batch; the labels are the inputs."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def _blocks(tokenizer: Any, documents: list[str], length: int) -> list[list[int]]:
    stream: list[int] = []
    end = tokenizer.eos_token_id
    for document in documents:
        stream += tokenizer(document, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            stream.append(end)
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def _name(files: Sequence[str | Path]) -> str:
    names = [Path(f).name for f in files]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "training") from None
    return datasets
