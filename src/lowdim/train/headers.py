"""Whether the first row of a table names its columns, or is data."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from lowdim.errors import DataError, listed, shown
from lowdim.train.columns import Table

__all__ = ["check_header", "has_usual_name", "named_columns"]

_SAMPLE = 1000  # rows that are compared with the header
_USUAL = frozenset((
    "answer", "author", "body", "category", "class", "comment", "completion", "content", "context", "date", "description",
    "document", "gold_label", "headline", "hypothesis", "id", "idx", "index", "input", "instruction", "intent", "label",
    "labels", "lang", "language", "message", "messages", "name", "output", "premise", "prompt", "question", "rating",
    "response", "review", "score", "sentence", "sentence1", "sentence2", "sentiment", "source", "split", "stars",
    "summary", "target", "text", "text_a", "text_b", "title", "topic", "tweet", "url", "user", "utterance", "y",
))  # fmt: skip
_NUMBER = re.compile(r"[+-]?(?:\d[\d,. ]*|\.\d+)(?:[eE][+-]?\d+)?\s*%?")
_SENTENCE = re.compile(r"""(?:\S+\s+){2,}\S+[.!?…][")'”’]*""")
_LINK = re.compile(r"https?://|\S+@\S+\.\w+$|__label__")
_CLAUSE = re.compile(r"[^\W\d]+[,;!?] \w")
_WORD = re.compile(r"[a-z][A-Za-z0-9_]*")


def named_columns(header: Sequence[str]) -> list[str]:
    """The names of a header; a column without one gets pandas' name for it, `Unnamed: 0`.

    Example:
        >>> from lowdim.train.headers import named_columns
        >>> named_columns(["", "text ", "label"])
        ['Unnamed: 0', 'text', 'label']
    """
    names = [name.strip().lstrip("\ufeff").strip() for name in header]
    for place, name in enumerate(names):
        if not name:
            name = f"Unnamed: {place}"
            while name in names:  # a table that pandas has written, read and written again
                name += ".1"
            names[place] = name
    return names


def check_header(table: Table, confirmed: Collection[str] = ()) -> list[str]:
    """What the user should know of the header.

    Args:
        confirmed: names that the user gave to columns; a header that holds one is a header.

    Raises:
        DataError: the first row looks like data.
    """
    header = table.columns
    if set(confirmed) & set(header):
        return []
    why = _looks_like_data(table)
    if why:
        raise DataError(
            f"{table.path}: the first row, {listed(map(repr, header))}, looks like data ({why}); begin the file with a row of "
            "column names, or name columns by number, such as --text 2 --label 1; if it is a header, name the column of the "
            "text with --text"
        )
    if has_usual_name(header) or all(_WORD.fullmatch(name) or name.startswith("Unnamed: ") for name in header):
        return []
    return [f"{table.path}: the first row was read as the names of the columns: {listed(map(repr, header))}"]


def has_usual_name(header: Sequence[str]) -> bool:
    """Whether one of these is a name that columns often have."""
    return any(name.lower().replace(" ", "_").replace("-", "_") in _USUAL for name in header)


def _looks_like_data(table: Table) -> str:
    """Why the names look like values; empty where they do not."""
    header = [name for name in table.columns if not name.startswith("Unnamed: ")]
    if not header:
        return "no column has a name"
    numbers = [name for name in header if _NUMBER.fullmatch(name)]
    if numbers and header not in (list(map(str, range(n, n + len(header)))) for n in (0, 1)):
        return f"{shown(numbers[0])} is a number"
    if has_usual_name(header):
        return ""
    for name in header:
        if _LINK.match(name) or _CLAUSE.search(name):
            return f"{shown(name)} is no name"
        if len(name) > 100 or _SENTENCE.fullmatch(name):
            return f"{shown(name)} is a sentence"
        values = [str(value).strip() for value in table.column(name)[:_SAMPLE]]
        if name in values:
            return f"{shown(name)} also is a value of that column"
        words = sorted(len(value.split()) for value in values)
        if len(name.split()) >= 5 and words[len(words) // 2] >= 5:
            return f"{shown(name)} is as long as the texts below it"
    return ""
