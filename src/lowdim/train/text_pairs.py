"""Pairs and triplets of texts for embeddings, with or without scores, from tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowdim.errors import DataError, UnknownNameError, listed, nearest, shown
from lowdim.train.data import Used
from lowdim.train.profiles import Profile, blank
from lowdim.train.roles import Roles, profiles
from lowdim.train.tables import Table, locate, read_rows

__all__ = ["TextPairs", "read_pairs"]

#: Names of what is searched with, of what is to be found, and of what is not; a pair takes one of each of the first two.
_FIRST = (
    "anchor", "query", "question", "sentence1", "sentence_1", "text1", "text_1", "text_a", "sentence_a", "first", "premise",
    "title", "claim",
)  # fmt: skip
_SECOND = (
    "positive", "passage", "answer", "sentence2", "sentence_2", "text2", "text_2", "text_b", "sentence_b", "second",
    "hypothesis", "document", "context", "evidence", "body", "abstract", "pos",
)  # fmt: skip
_THIRD = ("negative", "hard_negative", "neg")
_SCORES = (
    "score", "scores", "similarity", "similarity_score", "relatedness", "relatedness_score", "label", "labels",
    "gold_score", "gold",
)  # fmt: skip


@dataclass(frozen=True)
class TextPairs:
    """Rows of two texts, or of three: the third must not be found.

    Attributes:
        columns: two or three lists of texts.
        scores: how alike the two are; None where the second answers the first.
        used: what the columns of each file are used for.
        notes: rows that were left out.
    """

    columns: tuple[list[str], ...]
    scores: list[float] | None
    used: tuple[Used, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def kind(self) -> str:
        """`"scored pairs"`, `"pairs"` or `"triplets"`."""
        return "scored pairs" if self.scores is not None else "triplets" if len(self.columns) == 3 else "pairs"


def read_pairs(files: Sequence[str | Path], *, text: str | None = None, score: str | None = None) -> TextPairs:
    """Read files of pairs, scored pairs or triplets.

    Args:
        files: .csv, .tsv, .jsonl, .json or .parquet; all of one kind.
        text: the columns of the texts, with commas; None finds them by name, or where a file has just two or three of them.
        score: the column of the score; None finds one of numbers with a usual name.

    Raises:
        DataError: a file that cannot be read, columns that can be read in two ways, files of unlike kinds, no row.
        UnknownNameError: no such column.
    """
    if not files:
        raise DataError("--data must name at least one file of pairs")
    parts = [_read(file, text, score) for file in files]
    kinds = {part.kind for part in parts}
    if len(kinds) > 1:
        raise DataError(f"the files hold {' and '.join(sorted(kinds))}; name files of one kind")
    scores = [value for part in parts for value in part.scores or ()]
    return TextPairs(
        tuple([value for column in columns for value in column] for columns in zip(*(part.columns for part in parts))),
        scores if parts[0].scores is not None else None,
        tuple(used for part in parts for used in part.used),
        tuple(note for part in parts for note in part.notes),
    )


def _read(file: str | Path, text: str | None, score: str | None) -> TextPairs:
    path = locate(file)
    table = read_rows(path, (text, score))
    found = profiles(table)
    mark = _score(found, score, path)
    names = _texts(found, text, mark, path)
    if mark is not None and len(names) == 3:
        raise DataError(f"{path}: three texts and a score ({listed((*names, mark))}); scores are for pairs: choose with --text")
    columns, scores, left_out = _rows(table, names, mark)
    if not columns[0]:
        raise DataError(f"{path} has no row with {len(names)} texts{'' if mark is None else ' and a score'}")
    unused = tuple(name for name in table.columns if name not in names and name != mark)
    notes = [
        *table.notes,
        *([f"{left_out} rows of {path} have an empty text or no score and were left out"] if left_out else []),
    ]
    return TextPairs(columns, scores, (Used(str(file), Roles(names, mark, unused)),), tuple(notes))


def _rows(table: Table, names: tuple[str, ...], mark: str | None) -> tuple[tuple[list[str], ...], list[float] | None, int]:
    columns: tuple[list[str], ...] = tuple([] for _ in names)
    scores: list[float] = []
    values = [table.column(name) for name in names]
    marks = [None] * len(table) if mark is None else list(table.column(mark))
    for row, number in zip(zip(*values), marks):
        known = _number(number) if mark is not None else 0.0
        if any(map(blank, row)) or known is None:
            continue
        for column, value in zip(columns, row):
            column.append(str(value))
        scores.append(known)
    return columns, scores if mark is not None else None, len(table) - len(columns[0])


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if number - number == 0 else None  # neither infinite nor NaN


def _score(columns: Sequence[Profile], asked: str | None, path: Path) -> str | None:
    if asked is not None:
        return _named(columns, asked, "--label", path).name
    found = [c.name for c in columns if c.kind == "number" and c.plain in _SCORES]
    return found[0] if found else None


def _texts(columns: Sequence[Profile], asked: str | None, mark: str | None, path: Path) -> tuple[str, ...]:
    if asked is not None:
        names = tuple(_named(columns, part.strip(), "--text", path).name for part in asked.split(","))
        if len(names) not in (2, 3) or len(set(names)) != len(names):
            raise DataError(f"--text must name two or three columns with commas; got {shown(asked)}")
        return names
    usable = {c.plain: c.name for c in reversed(columns) if c.string and c.name != mark}
    sides = [[usable[name] for name in names if name in usable] for names in (_FIRST, _SECOND, _THIRD)]
    if len(sides[0]) == len(sides[1]) == 1 and len(sides[2]) <= 1:
        return (*sides[0], *sides[1], *sides[2])
    texts = [c.name for c in columns if c.string and c.name != mark]
    if len(texts) not in (2, 3) or any(len(side) > 1 for side in sides):
        held = listed(c.name for c in columns)
        raise DataError(
            f"{path}: which columns are the texts? Name two (or three, the last one wrong) with --text; columns: {held}"
        )
    return tuple(texts)


def _named(columns: Sequence[Profile], name: str, option: str, path: Path) -> Profile:
    found = next((c for c in columns if c.name == name), None)
    if found is None:
        names = [c.name for c in columns]
        raise UnknownNameError(f"{option}: {path} has no column {shown(name)}; nearest: {listed(nearest(name, names))}")
    return found
