"""Labelled texts, pairs of texts, and documents from files."""

from __future__ import annotations

import itertools
import shlex
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lowdim.errors import DataError, listed, shown
from lowdim.train.columns import Column, Table, strings, take
from lowdim.train.labels import Labels, encode_labels, encode_several
from lowdim.train.marks import Marks, check_numbers, marks_of, to_numbers
from lowdim.train.profiles import SAMPLE, Profile, blank
from lowdim.train.roles import Roles, document_roles, labelled_roles, profiles
from lowdim.train.splits import Splits, split
from lowdim.train.tables import SHIPPED, locate, read_rows, read_text

__all__ = [
    "SHIPPED",
    "Documents",
    "Examples",
    "Splits",
    "Used",
    "check_plain",
    "locate",
    "read_documents",
    "read_examples",
    "read_text",
    "read_texts",
    "split",
]

#: Suffixes of files that are one document for a language model.
TEXT_FILES = (".txt", ".text", ".md")


@dataclass(frozen=True)
class Used:
    """What the columns of a file or stream are used for."""

    source: str
    roles: Roles

    @property
    def sentence(self) -> str:
        """One line: the columns that are used, and those that are not."""
        roles = self.roles
        if not roles.unused:
            return f"{self.source}: {roles.used}"
        options = "--text chooses another" if roles.label is None else "--text and --label choose others"
        unused = listed(name if name.strip() else "(unnamed)" for name in roles.unused)
        return f"{self.source}: {roles.used} (not used: {unused}); {options}"

    def to_dict(self) -> dict[str, Any]:
        """For records."""
        return {"source": self.source, **self.roles.to_dict()}


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of texts, with their labels.

    Attributes:
        labels: a class index for each; a tuple of them where a text has several; a number for regression.
        classes: their names in order; empty for regression.
        notes: columns that are not used, and the numbers of rows that were left out.
        others: the second texts, for pairs; empty for single texts.
        columns: of each file.
        several: whether a text may have any number of classes.
    """

    texts: Sequence[str]
    labels: tuple[Any, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    others: Sequence[str] = ()
    columns: tuple[Used, ...] = ()
    several: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at these indices."""
        others = take(self.others, indices) if self.others else ()
        labels = tuple(self.labels[i] for i in indices)
        return Examples(take(self.texts, indices), labels, self.classes, others=others, several=self.several)

    def label(self, index: int) -> str:
        """The label of an example, in words."""
        label = self.labels[index]
        if not self.classes:
            return f"{label:.6g}"
        return listed(shown(self.classes[one]) for one in label) or "none" if self.several else shown(self.classes[label])

    def each(self) -> Iterator[tuple[str, ...]]:
        """The text, or the two texts, of each example."""
        return zip(self.texts, self.others) if self.others else zip(self.texts)


@dataclass(frozen=True)
class Documents:
    """Documents for a language model.

    Attributes:
        notes: columns that are not used, and the numbers of rows that were left out.
        columns: of each table.
    """

    texts: Sequence[str]
    notes: list[str] = field(default_factory=list)
    columns: tuple[Used, ...] = ()


def read_examples(
    paths: Sequence[str | Path],
    *,
    text: str | None = None,
    label: str | None = None,
    classes: Sequence[str] = (),
    separator: str | None = None,
    numbers: bool = False,
) -> Examples:
    """Labelled texts, or pairs of texts, from one or more files; columns are detected for each file (`lowdim.train.roles`).

    Args:
        text, label: column names, two text columns with a comma for pairs; None detects them by their usual names, or as the
            only text column and the only other one.
        classes: the classes in order, if an earlier file has fixed them; other labels are an error.
        separator: what stands between several labels of a text that are written as one string; lists need none.
        numbers: whether labels are numbers and no classes (task regress).

    Raises:
        DataError: unreadable file, no rows, only one class, an unknown label, lists in place of texts; pairs and single texts,
            or lists of labels and single ones.
        UnknownNameError: a column that does not exist, or cannot be found (the columns are listed).
    """
    parts = [_labelled(given, text, label, separator, numbers) for given in paths]
    first = parts[0]
    for each in parts:
        if each.used.roles.pair != first.used.roles.pair:
            pair, single = (each.used, first.used) if each.used.roles.pair else (first.used, each.used)
            raise DataError(
                f"{pair.source} has pairs of texts ({listed(pair.roles.text)}), {single.source} has single texts "
                f"({listed(single.roles.text)}); name the same columns for both with --text"
            )
        if each.marks.several != first.marks.several:
            lists, single = (each.used, first.used) if each.marks.several else (first.used, each.used)
            raise DataError(
                f"{lists.source} has lists of labels (column {shown(lists.roles.label)}), {single.source} has single ones "
                f"({shown(single.roles.label)}); write lists in both, or name other columns with --label"
            )
    source, column = ", ".join(map(str, paths)), first.used.roles.label or ""
    values = list(itertools.chain.from_iterable(part.labels for part in parts))
    if numbers:
        found = Labels(
            tuple(known[value] for part in parts for known in [to_numbers(part.labels)] for value in part.labels), ()
        )
    elif first.marks.several:
        found = encode_several([first.marks.names(value) for value in values], source, classes, column)
    else:
        found = encode_labels(values, source, classes, column)
    texts, *others = [Column.concatenated(columns) for columns in zip(*(part.texts for part in parts))]
    notes = (*itertools.chain.from_iterable(part.notes for part in parts), *found.notes)
    used = tuple(part.used for part in parts)
    return Examples(texts, found.indices, found.classes, notes, others[0] if others else (), used, first.marks.several)


class _Labelled(NamedTuple):
    """The texts (two columns for pairs) and labels of one file."""

    texts: list[Column]
    labels: Column
    notes: list[str]
    used: Used
    marks: Marks


def _labelled(given: str | Path, text: str | None, label: str | None, separator: str | None, numbers: bool) -> _Labelled:
    path = locate(given)
    table = read_rows(path, (text, label))
    roles = labelled_roles(profiles(table), text, label, str(path), numbers=numbers)
    assert roles.label is not None
    *texts, labels = (table.column(name) for name in (*roles.text, roles.label))
    marks = marks_of(labels, roles.label, path, numbers=numbers, separator=separator)
    keep = array("q")
    empty: Counter[str] = Counter()
    missing = marked = 0
    odd: list[Any] = []
    for row, (*values, mark) in enumerate(zip(*texts, labels)):
        if any(map(blank, values)):
            empty[next(name for name, value in zip(roles.text, values) if blank(value))] += 1
        elif marks.missing(mark):
            missing += 1
        elif not marks.fits(mark):
            odd.append(mark)
        else:
            for value, name in zip((*values, *([] if marks.several else [mark])), (*roles.text, roles.label)):
                check_plain(value, name, path)
            marked += any(isinstance(value, str) and "__label__" in value for value in values)
            keep.append(row)
    if numbers:
        check_numbers(len(keep), odd, roles.label, path)
    if not keep:
        raise DataError(_nothing(path, roles, empty, len(table)))
    if len(keep) < len(table):
        *texts, labels = (column.take(keep) for column in (*texts, labels))
    if label is None and roles.label in labels:
        first = listed(table.columns)
        raise DataError(f"{path}: the first row, {first}, looks like data; begin the file with a row of column names")
    used = Used(str(given), roles)
    notes = [*table.notes, *([used.sentence] if roles.unused else [])]
    for name, count in empty.items():
        which = f" in column {shown(name)}" if roles.pair else ""
        notes.append(f"{count} rows of {path} have an empty text{which} and were left out")
    if missing:
        notes.append(f"{missing} rows of {path} have no label and were left out")
    if marked:
        notes.append(f"{marked} texts of {path} hold fastText's mark __label__, which may give the answer away")
    if odd:
        what = "a label that is no number" if numbers else "a label that is none"
        notes.append(f"{len(odd)} rows of {path} have {what}, such as {shown(odd[0])}, and were left out")
    return _Labelled([column.as_strings() for column in texts], labels, notes, used, marks)


def _nothing(path: Path, roles: Roles, empty: Counter[str], rows: int) -> str:
    """The message for a file of which no row can be used."""
    side = next((name for name in roles.text if empty[name] == rows), None)
    if roles.pair and side is not None:
        other = next(name for name in roles.text if name != side)
        return (
            f"{path}: column {shown(side)}, one side of the pairs, is empty in all {rows} rows; --text {shlex.quote(other)} "
            "reads the other as single texts"
        )
    held = " and ".join(map(shown, roles.text))
    return f"{path}: no row has both a text ({held}) and a label ({shown(roles.label)})"


def read_documents(paths: Sequence[str | Path], *, text: str | None = None) -> Documents:
    """Documents for a language model: each text file and each row of a table is one document.

    Args:
        text: the column to train on; None detects it, and refuses a table whose examples have several (prompt and answer).

    Raises:
        DataError: unreadable or empty files; several columns or lists that belong to one example.
        UnknownNameError: the text column cannot be found.
    """
    texts: list[Column] = []
    notes: list[str] = []
    used: list[Used] = []
    for given in paths:
        path = locate(given)
        if path.suffix.lower() in TEXT_FILES:
            texts.append(strings([read_text(path)]))
            continue
        table = read_rows(path, (text,))
        columns = profiles(table)
        roles = document_roles(columns, text, str(path))
        if text is None:
            _check_late(table, columns, path)
        used.append(Used(str(given), roles))
        name = roles.text[0]
        keep = array("q")
        for row, value in enumerate(table.column(name)):
            if not blank(value):
                check_plain(value, name, path)
                keep.append(row)
        told = any(c.name in roles.unused and c.kind in ("text", "word", "lists") for c in columns)
        notes += [*table.notes, *([used[-1].sentence] if told else [])]
        if len(keep) < len(table):
            notes.append(f"{len(table) - len(keep)} rows of {path} have an empty text and were left out")
        column = table.column(name) if len(keep) == len(table) else table.column(name).take(keep)
        texts.append(column.as_strings())
    found = Column.concatenated(texts)
    if not len(found):
        raise DataError(f"{listed(paths)}: no text was found")
    return Documents(found, notes, tuple(used))


def read_texts(paths: Sequence[str | Path], *, text: str | None = None) -> tuple[Sequence[str], list[str]]:
    """The documents of `read_documents`, and its notes."""
    found = read_documents(paths, text=text)
    return found.texts, found.notes


def _check_late(table: Table, columns: Sequence[Profile], path: Path) -> None:
    """Refuse a column that holds something only after the rows that have decided."""
    for column in columns:
        if column.kind == "empty" and not all(map(blank, table.column(column.name)[SAMPLE:])):
            raise late_column(str(path), column.name)


def late_column(source: str, name: str) -> DataError:
    """The error for a column that holds something only after the rows that have decided."""
    return DataError(
        f"{source}: column {shown(name)} is empty in the first {SAMPLE} rows and holds values later; name the text column "
        "with --text"
    )


def check_plain(value: Any, column: str, source: object) -> None:
    """Raise unless a value of a table is a string or a number.

    Raises:
        DataError: a list, dict or bytes.
    """
    if isinstance(value, (list, tuple, dict, bytes)):
        raise DataError(f"{source}: column {shown(column)} must hold text or numbers; got a {type(value).__name__}")
