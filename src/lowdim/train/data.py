"""Labelled and plain text: finding columns and classes, and splitting into parts that share no text."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, UnknownNameError, listed, nearest, shown
from lowdim.train.columns import Column, take
from lowdim.train.labels import encode_labels
from lowdim.train.tables import SHIPPED, locate, read_rows, read_text

__all__ = ["SHIPPED", "Examples", "Splits", "locate", "read_examples", "read_text", "read_texts", "split", "text_column"]

_TEXT_NAMES = ("text", "sentence", "content", "review", "question", "document", "body", "comment", "utterance", "tweet")
_LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "intent", "y", "topic")


@dataclass(frozen=True)
class Examples:
    """Texts with their labels as class indices; `notes` count the rows that were left out."""

    texts: Sequence[str]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at these indices."""
        return Examples(take(self.texts, indices), tuple(self.labels[i] for i in indices), self.classes)


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data: train on the first, choose on the second, report on the third, once."""

    train: Any
    validation: Any
    test: Any
    notes: tuple[str, ...] = field(default=())


def read_examples(
    paths: Sequence[str | Path], *, text: str | None = None, label: str | None = None, classes: Sequence[str] = ()
) -> Examples:
    """Labelled texts from one or more files; columns are detected for each file.

    Args:
        text, label: column names; None detects them by their usual names, or as the only text column and the only other one.
        classes: the classes in order, if an earlier file has fixed them; other labels are an error.

    Raises:
        DataError: unreadable file, no rows, only one class, an unknown label.
        UnknownNameError: a column that does not exist, or cannot be found (the columns are listed).
    """
    parts = [_labelled(locate(path), text, label) for path in paths]
    texts, marks, notes = zip(*parts)
    labels = encode_labels(list(itertools.chain.from_iterable(marks)), ", ".join(map(str, paths)), classes)
    return Examples(Column.concatenated(texts), labels.indices, labels.classes, (*itertools.chain(*notes), *labels.notes))


def _labelled(path: Path, text: str | None, label: str | None) -> tuple[Column, Column, list[str]]:
    """Texts, labels and notes of one file."""
    rows = read_rows(path)
    columns = list(rows.columns)
    text_column, label_column = _columns(rows, columns, text, label, str(path))
    texts, marks = rows.column(text_column), rows.column(label_column)
    keep: list[int] = []
    empty = missing = 0
    for row, (value, mark) in enumerate(zip(texts, marks)):
        if _blank(value):
            empty += 1
        elif _blank(mark):
            missing += 1
        else:
            _check_plain(value, text_column, path)
            _check_plain(mark, label_column, path)
            keep.append(row)
    if not keep:
        raise DataError(f"{path}: no row has both a text ({text_column!r}) and a label ({label_column!r})")
    if len(keep) < len(rows):
        texts, marks = texts.take(keep), marks.take(keep)
    if label is None and label_column in marks:
        raise DataError(f"{path}: the first row, {listed(columns)}, looks like data; begin the file with a row of column names")
    notes = list(rows.notes)
    unused = [c for c in columns if c not in (text_column, label_column)]
    if unused and (text is None or label is None):
        notes.append(
            f"{path}: the text is column {text_column!r} and the label {label_column!r} (not used: {listed(unused)}); "
            "--text and --label choose others"
        )
    if empty:
        notes.append(f"{empty} rows of {path} have an empty text and were left out")
    if missing:
        notes.append(f"{missing} rows of {path} have no label and were left out")
    return texts.as_strings(), marks, notes


def read_texts(paths: Sequence[str | Path], *, text: str | None = None) -> tuple[list[str], list[str]]:
    """Documents for a language model, and notes: each text file and each row of a table is one document.

    Raises:
        DataError: unreadable or empty files.
        UnknownNameError: the text column cannot be found.
    """
    documents: list[str] = []
    notes: list[str] = []
    for path in map(locate, paths):
        if path.suffix.lower() in (".txt", ".text", ".md"):
            documents.append(read_text(path))
            continue
        rows = read_rows(path)
        notes += rows.notes
        column = text_column(rows, text, str(path))
        found = []
        for value in rows.column(column):
            if not _blank(value):
                _check_plain(value, column, path)
                found.append(str(value))
        if len(found) < len(rows):
            notes.append(f"{len(rows) - len(found)} rows of {path} have an empty text and were left out")
        documents += found
    if not documents:
        raise DataError(f"{', '.join(map(str, paths))}: no text was found")
    return documents, notes


def text_column(rows: Sequence[dict[str, Any]], asked: str | None, name: str) -> str:
    """The text column: the requested one, one with a usual name, or the one with the longest texts.

    Raises:
        UnknownNameError: it does not exist, or no column holds text.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    column = _column("--text", asked, columns, _TEXT_NAMES, name) or _longest(rows, columns)
    if column is None:
        raise UnknownNameError(f"{name}: no column holds text; columns: {listed(columns)}")
    return column


def split(
    examples: Examples, *, test: Examples | None = None, seed: int = 0, validation: float = 0.2, held_out: float = 0.3
) -> Splits:
    """Train, validation and test parts, each class in the same proportion; no duplicate is in two parts.

    Args:
        test: a separate test set; otherwise `held_out` of the examples.
        validation: share of the rest, used to choose hyperparameters.

    Raises:
        DataError: too few examples of a class to split.
    """
    notes: list[str] = []
    seen: dict[str, int] = {}
    unique = [i for i, t in enumerate(examples.texts) if seen.setdefault(t.strip(), i) == i]
    if len(unique) < len(examples):
        notes.append(f"{len(examples) - len(unique)} duplicate texts were left out, so that no text is in two parts")
    if test is not None:
        known = {t.strip() for t in test.texts}
        clean = [i for i in unique if examples.texts[i].strip() not in known]
        if len(clean) < len(unique):
            notes.append(f"{len(unique) - len(clean)} training texts are also in the test file and were left out of training")
        if not clean:
            raise DataError("every training text is also in the test file (--eval), so nothing is left to train on")
        unique = clean
    counts = Counter(examples.labels[i] for i in unique)
    need = 2 if test is not None else 3
    for index, name in enumerate(examples.classes):
        if counts[index] < need:
            raise DataError(f"class {name!r} has {counts[index]} examples; at least {need} are needed to split the data")
    rest, held = (unique, []) if test is not None else _stratified(examples, unique, held_out, seed, "test")
    train, chosen = _stratified(examples, rest, validation, seed, "validation")
    return Splits(examples.take(train), examples.take(chosen), test if test is not None else examples.take(held), tuple(notes))


def _stratified(examples: Examples, indices: list[int], share: float, seed: int, purpose: str) -> tuple[list[int], list[int]]:
    order = random.Random(f"{seed}/{purpose}")
    keep: list[int] = []
    taken: list[int] = []
    for index in range(len(examples.classes)):
        members = [i for i in indices if examples.labels[i] == index]
        order.shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        taken += members[:count]
        keep += members[count:]
    order.shuffle(keep)
    order.shuffle(taken)
    return keep, taken


def _columns(
    rows: Sequence[dict[str, Any]], columns: list[str], text: str | None, label: str | None, name: str
) -> tuple[str, str]:
    label_column = _column("--label", label, columns, _LABEL_NAMES, name)
    rest = [c for c in columns if c != label_column]
    text_column = _column("--text", text, rest if text is None else columns, _TEXT_NAMES, name)
    if text_column is None and rest:
        text_column = _longest(rows, rest)
    if label_column is None:
        others = [c for c in columns if c != text_column]
        if len(others) != 1:
            raise UnknownNameError(f"{name}: which column holds the label? name it with --label; columns: {listed(columns)}")
        label_column = others[0]
    if text_column is None or text_column == label_column:
        raise UnknownNameError(f"{name}: which column holds the text? name it with --text; columns: {listed(columns)}")
    return text_column, label_column


def _column(option: str, asked: str | None, columns: list[str], usual: Sequence[str], name: str) -> str | None:
    if asked is not None:
        if asked not in columns:
            close = ", ".join(nearest(asked, columns))
            raise UnknownNameError(f"{option}: {name} has no column {asked!r}; nearest: {close}; columns: {listed(columns)}")
        return asked
    lower = {c.lower(): c for c in reversed(columns)}
    return next((lower[u] for u in usual if u in lower), None)


def _longest(rows: Sequence[dict[str, Any]], columns: list[str]) -> str | None:
    head = list(itertools.islice(rows, 200))
    sizes = {c: sum(len(v) for row in head if isinstance(v := row.get(c), str)) for c in columns}
    best = max(columns, key=lambda c: sizes[c])
    return best if sizes[best] else None


def _blank(value: Any) -> bool:
    return value is None or value != value or not str(value).strip()


def _check_plain(value: Any, column: str, path: Path) -> None:
    if isinstance(value, (list, dict, bytes)):
        raise DataError(f"{path}: column {shown(column)} must hold text or numbers; got a {type(value).__name__}")
