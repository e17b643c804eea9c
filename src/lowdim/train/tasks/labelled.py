"""Labelled texts as rows of three parts: what the tasks on texts with labels share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from lowdim.errors import DataError
from lowdim.models.padding import padding_side
from lowdim.train.answers import IGNORED
from lowdim.train.data import Examples, Used, read_examples
from lowdim.train.inputs import Inputs, encode
from lowdim.train.repeats import same_text, same_tokens
from lowdim.train.splits import first_rows, places
from lowdim.train.streams import datasets_module
from lowdim.train.tasks.base import data_name, example_text

__all__ = ["Pad", "PadLabels", "Parts", "Reading", "labelled_parts"]


@dataclass(frozen=True)
class Parts:
    """The rows of each part, as datasets with `input_ids` and `labels`, and what was understood of the files.

    Attributes:
        example: the first training row as the model sees it, with its label.
        joint: what stands between the texts of a pair.
        texts: all texts in the order of the rows' `place`, where that was asked for.
    """

    train: Any
    validation: Any
    test: Any
    classes: tuple[str, ...]
    several: bool
    max_length: int
    notes: tuple[str, ...]
    columns: tuple[Used, ...]
    example: str
    joint: str | None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Set:
    """The examples of one or more files, and their tokens."""

    examples: Examples
    inputs: Inputs
    named: str

    def keys(self, unknown: int | None) -> list[bytes]:
        """For each example a key of its tokens."""
        return [same_tokens(ids, unknown) for ids in self.inputs.ids()]


class Reading(TypedDict, total=False):
    """How labelled files are read: the keywords of `labelled_parts` that a task passes on.

    Attributes:
        evaluation: a separate test file; otherwise part of the data is held out.
        validation: a separate validation file; otherwise part of the rest.
        text: the column of the text, or two with a comma for pairs; None detects them.
        label: the column of the label.
        max_length: tokens kept of each text; longer ones are cut and counted.
        most: maximum number of tokens that the model can read (`lowdim.models.longest_text`).
        seed: of the split.
        limit: maximum number of training texts, with at least one of each class.
        segments: whether the model reads `token_type_ids` of pairs; None: if the tokenizer gives them.
    """

    evaluation: str | Path | None
    validation: str | Path | None
    text: str | None
    label: str | None
    max_length: int
    most: int | None
    seed: int
    limit: int | None
    segments: bool | None


def labelled_parts(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    validation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    separator: str | None = None,
    numbers: bool = False,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    segments: bool | None = None,
    placed: bool = False,
) -> Parts:
    """Read files of labelled texts, or pairs of texts, and split them.

    Args:
        placed: give each row its `place` among all texts: those of the data, then of the validation and of the test file.
        The others: see `Reading` and `lowdim.train.data.read_examples`.
    """
    length = max_length if most is None else min(max_length, most)
    how = {"text": text, "label": label, "separator": separator, "numbers": numbers}

    def read(paths: Sequence[str | Path], classes: Sequence[str] = ()) -> _Set:
        examples = read_examples(paths, classes=classes, **how)
        return _Set(
            examples, encode(tokenizer, examples.texts, examples.others, length=length, segments=segments), data_name(paths)
        )

    whole = read(files)
    test, chosen = (None if file is None else read([file], whole.examples.classes) for file in (evaluation, validation))
    for other in (test, chosen):
        if other is not None:
            _check_alike(whole, other)
    unknown = tokenizer.unk_token_id if _unfit(whole, tokenizer.unk_token_id) else None
    found = places(
        whole.examples,
        tokens=whole.keys(unknown),
        test=test and test.examples,
        test_tokens=test.keys(unknown) if test else [],
        chosen=chosen and chosen.examples,
        chosen_tokens=chosen.keys(unknown) if chosen else [],
        seed=seed,
    )
    train = found.train if limit is None else first_rows(found.train, whole.examples.labels, limit)
    sets = [part for part in (whole, test, chosen) if part is not None]
    notes = [note for part in sets for note in part.examples.notes] + list(found.notes)
    notes += _indistinct(whole.inputs, [*found.train, *(found.validation if chosen is None else ()), *found.test])
    cut, total = sum(part.inputs.cut for part in sets), sum(len(part.examples) for part in sets)
    if cut:
        why = "--max-length" if length == max_length else "the model reads no more"
        kind = "pairs" if whole.examples.others else "texts"
        notes.append(f"{cut} of {total} {kind} are longer than {length} tokens and were cut ({why})")
    parts = [part for part in (whole, chosen, test) if part is not None]
    learn = _rows(whole, train, parts if placed else [])
    return Parts(
        train=learn,
        validation=_rows(chosen or whole, found.validation, parts if placed else []),
        test=_rows(test or whole, found.test if test is None else range(len(test.examples)), parts if placed else []),
        classes=whole.examples.classes,
        several=whole.examples.several,
        max_length=length,
        notes=tuple(notes),
        columns=tuple(used for part in sets for used in part.examples.columns),
        example=f"{example_text(tokenizer, learn)} -> {whole.examples.label(train[0])}",
        joint=whole.inputs.joint,
        texts=tuple(text for part in parts for text in part.examples.texts) if placed else (),
    )


def _check_alike(whole: _Set, other: _Set) -> None:
    """Raise unless a file holds pairs where the data does, and lists of labels where it does."""
    kinds: tuple[tuple[Callable[[Examples], bool], str, str, str], ...] = (
        (lambda part: bool(part.others), "pairs of texts", "single texts", "--text"),
        (lambda part: part.several, "lists of labels", "single labels", "--label"),
    )
    for has, several, single, option in kinds:
        if has(whole.examples) != has(other.examples):
            held = [several if has(part.examples) else single for part in (whole, other)]
            raise DataError(
                f"{whole.named} has {held[0]}, {other.named} {held[1]}; name the same columns for both with {option}"
            )


def _rows(part: _Set, where: Sequence[int], parts: Sequence[_Set]) -> Any:
    """The examples at these places as a dataset; with their places among the examples of all `parts`, if there are some."""
    import pyarrow as pa

    datasets = datasets_module()
    where = list(where)
    columns = {name: column.take(pa.array(where, pa.int64())) for name, column in part.inputs.columns.items()}
    kind = pa.list_(pa.int64()) if part.examples.several else pa.int64() if part.examples.classes else pa.float64()
    labels = pa.array([part.examples.labels[i] for i in where], kind)
    begin = sum(len(each.examples) for each in itertools.takewhile(lambda each: each is not part, parts))
    placed = {"place": pa.array([begin + i for i in where], pa.int64())} if parts else {}
    return datasets.Dataset(pa.table({**columns, **placed, "labels": labels}))


def _unfit(part: _Set, unknown: int | None) -> bool:
    """Whether more than a tenth of the texts differ only in words that the tokenizer does not know.

    They are then compared by their characters: they are not the same, and few would be left.
    """
    if unknown is None:
        return False
    each = zip(part.examples.each(), part.inputs.ids())
    vague = [(same_text(*texts), same_tokens(ids)) for texts, ids in each if unknown in ids]
    texts, tokens = (len(set(keys)) for keys in zip(*vague)) if vague else (0, 0)
    return texts - tokens > len(part.examples) // 10


def _indistinct(inputs: Inputs, where: Sequence[int]) -> list[str]:
    """A note on texts that are the same to the model, though they are not."""
    kept = set(where)
    same = len(kept) - len({same_tokens(ids) for i, ids in enumerate(inputs.ids()) if i in kept})
    if not same:
        return []
    return [f"{same} texts have the tokens of another text, since the tokenizer does not know the words that they differ in"]


class Pad:
    """Pads rows to the longest of the batch.

    Args:
        pad: the id that stands for no token.
        side: `"left"` or `"right"`.
        classes: where a row has any number of classes, how many there are: labels become zeros and ones, `(rows, classes)`.
    """

    def __init__(self, pad: int, side: str, classes: int = 0):
        self.pad, self.side, self.classes = pad, side, classes

    @classmethod
    def of(cls, tokenizer: Any, classes: int = 0) -> Pad:
        """As this tokenizer pads."""
        return cls(tokenizer.pad_token_id or 0, padding_side(tokenizer), classes)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The rows as a batch."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        types = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            where = slice(longest - count, None) if self.side == "left" else slice(0, count)
            ids[i, where] = torch.tensor(row["input_ids"])
            mask[i, where] = 1
            types[i, where] = torch.tensor(row.get("token_type_ids", 0))
        segments = {"token_type_ids": types} if "token_type_ids" in rows[0] else {}
        return {"input_ids": ids, "attention_mask": mask, **segments, "labels": self._labels([row["labels"] for row in rows])}

    def _labels(self, labels: list[Any]) -> Tensor:
        if not self.classes:
            return torch.tensor(labels)
        indicators = torch.zeros(len(labels), self.classes)
        for row, own in zip(indicators, labels):
            row[own] = 1.0
        return indicators


class PadLabels(Pad):
    """Pads rows with a label for each token; padding has none that counts."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The rows as a batch."""
        batch = super().__call__([{**row, "labels": 0} for row in rows])
        labels = torch.full_like(batch["input_ids"], IGNORED)
        labels[batch["attention_mask"].bool()] = torch.tensor([label for row in rows for label in row["labels"]])
        return {**batch, "labels": labels}
