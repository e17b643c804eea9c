"""Sentences as words with tags: from CoNLL files, and from tables with a list of words and a list of tags in each row."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowdim.errors import DataError, UnknownNameError, listed, shown
from lowdim.train.data import Used
from lowdim.train.encoding import existing, open_text
from lowdim.train.entities import entities_of
from lowdim.train.roles import Roles
from lowdim.train.tables import Table, locate, read_rows

__all__ = ["Tagged", "read_tagged", "tag_order"]

_CONLL = (".conll", ".bio", ".iob", ".iob1", ".iob2", ".bioes", ".tags", ".txt", ".tsv")
_TABLES = (".jsonl", ".json", ".parquet")
_WORDS = ("words", "tokens", "word", "token", "text", "sentence")
_TAGS = ("tags", "ner_tags", "labels", "tag", "label", "ner", "bio", "pos_tags", "chunk_tags", "targets")
#: Letters of other schemes, and those of IOBES that mean the same: BILOU, and BMES.
_LETTERS = {"L": "E", "U": "S", "M": "I"}


@dataclass(frozen=True)
class Tagged:
    """Sentences.

    Attributes:
        words, tags: of each sentence, of equal length.
        notes: what was rewritten or left out.
        columns: where they stand.
    """

    words: list[tuple[str, ...]]
    tags: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    columns: tuple[Used, ...] = ()

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class _Columns(Roles):
    """Columns of words and of tags."""

    @property
    def used(self) -> str:
        return f"the words are column {self.text[0]!r} and the tags {self.label!r}"


@dataclass(frozen=True)
class _Lines(Roles):
    """A word in each line."""

    @property
    def used(self) -> str:
        return "the first column holds the words and the last their tags"


def read_tagged(given: str | Path, *, text: str | None = None, label: str | None = None) -> Tagged:
    """The sentences of a file. Entities begin with `B-` in what is returned, or with `S-` where the file has such tags.

    CoNLL files (`.conll`, `.bio`, `.iob2`, `.txt`, `.tsv`, ...) have a word in each line, first, and its tag, last, and an
    empty line between sentences; lines of `-DOCSTART-` and comments are left out. Rows of `.jsonl`, `.json` and `.parquet` have
    two lists.

    Args:
        text, label: the columns of a table; None finds them.

    Raises:
        DataError: a line or row does not have one tag for each word (it is named), or the tags are numbers.
        UnknownNameError: a column does not exist, or cannot be found.
    """
    path = locate(given)
    kind = path.suffix.lower()
    if kind in _CONLL:
        if text is not None or label is not None:
            raise DataError(f"{path}: --text and --label are for tables; in this file the word is first and its tag last")
        words, tags = _conll(path)
        used, notes = Used(str(given), _Lines(())), []
    elif kind in _TABLES:
        table = read_rows(path, (text, label))
        words, tags, roles, notes = _table(table, text, label, path)
        used = Used(str(given), roles)
    else:
        raise DataError(f"{path}: sentences with tags are read from {', '.join((*_TABLES, *_CONLL))}; got {kind!r}")
    if not words:
        raise DataError(f"{path} holds no sentence")
    numbers = next((tag for own in tags for tag in own if re.fullmatch(r"[0-9]+", tag)), None)
    if numbers is not None:
        raise DataError(
            f"{path}: tag {shown(numbers)} is a number; write the names that the numbers stand for, such as B-PER and O"
        )
    plain, remarks = _uniform(tags, str(given))
    return Tagged(words, plain, (*notes, *remarks), (used,))


def tag_order(tags: Iterable[str]) -> tuple[str, ...]:
    """Different tags in order: `O`, then by type, each with `B` before the others.

    Example:
        >>> from lowdim.train.tagged import tag_order
        >>> tag_order(["I-PER", "O", "B-LOC", "B-PER"])
        ('O', 'B-LOC', 'B-PER', 'I-PER')
    """

    def key(tag: str) -> tuple[bool, str, int, str]:
        prefix, dash, kind = tag.partition("-")
        return tag != "O", kind if dash else tag, "BIES".find(prefix), tag

    return tuple(sorted(set(tags), key=key))


def _conll(path: Path) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    words: list[tuple[str, ...]] = []
    tags: list[tuple[str, ...]] = []
    counted = 0
    for lines in _sentences(path):
        last, width = lines[-1][0], len(lines[-1][1])
        while len(lines) > 1 and _is_comment(lines[0][1], width):
            lines.pop(0)
        short = next(((number, fields) for number, fields in lines if len(fields) < 2), None)
        if short is not None:
            raise DataError(f"{path}, line {short[0]}: {shown(short[1][0])} has no tag; each line has a word and its tag")
        odd = next(((number, fields) for number, fields in lines if len(fields) != width), None)
        if odd is not None:
            raise DataError(f"{path}, line {odd[0]}: it has {len(odd[1])} columns, and line {last} of its sentence {width}")
        words.append(tuple(sys.intern(fields[0]) for _, fields in lines))
        tags.append(tuple(sys.intern(fields[-1]) for _, fields in lines))
        counted += words[-1] == tuple(str(i) for i in range(1, len(lines) + 1)) and width > 2
    if words and counted == len(words):
        raise DataError(f"{path}: the first column numbers the words (1, 2, 3); write the word first and its tag last")
    return words, tags


def _sentences(path: Path) -> Iterator[list[tuple[int, list[str]]]]:
    """The lines of each sentence with their numbers, split into columns."""
    waiting: list[tuple[int, list[str]]] = []
    with open_text(existing(path)) as stream:
        for number, line in enumerate(stream, 1):
            bare = line.rstrip("\n")
            fields = bare.split("\t") if "\t" in bare else bare.split()
            if not bare.strip() or bare.startswith("-DOCSTART-"):
                if waiting:
                    yield waiting
                waiting = []
            else:
                waiting.append((number, [field.strip() for field in fields]))
    if waiting:
        yield waiting


def _is_comment(fields: Sequence[str], width: int) -> bool:
    """Whether a line before a sentence is about it: `# text`, `# id = 3`; a sentence may begin with the word `#`."""
    return fields[0].startswith("#") and (len(fields) != width or "=" in fields)


def _table(
    table: Table, text: str | None, label: str | None, path: Path
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], Roles, list[str]]:
    names = (_column(table, text, "--text", _WORDS, "words", path), _column(table, label, "--label", _TAGS, "tags", path))
    words: list[tuple[str, ...]] = []
    tags: list[tuple[str, ...]] = []
    empty = 0
    for number, (own, marks) in enumerate(zip(*map(table.column, names)), 1):
        if not own and not marks:
            empty += 1
            continue
        for name, values in zip(names, (own, marks)):
            if not isinstance(values, list):
                raise DataError(f"{path}, row {number}: {name!r} must be a list of strings; got {shown(values)}")
        if len(own) != len(marks):
            raise DataError(f"{path}, row {number}: {len(own)} words and {len(marks)} tags; each word has one tag")
        words.append(tuple(map(str, own)))
        tags.append(tuple(sys.intern(str(mark)) for mark in marks))
    roles = _Columns(names[:1], names[1], tuple(name for name in table.columns if name not in names))
    return words, tags, roles, [*table.notes, *([f"{empty} rows of {path} have no words and were left out"] if empty else [])]


def _column(table: Table, asked: str | None, option: str, usual: Sequence[str], what: str, path: Path) -> str:
    """The column that was named, or the first usual one that holds lists."""
    if asked is not None:
        if asked not in table.columns:
            raise UnknownNameError(f"{option}: {path} has no column {shown(asked)} (columns: {listed(table.columns)})")
        return asked
    lists = [name for name in table.columns if any(isinstance(value, list) for value in table.column(name)[:20])]
    found = next((name for wanted in usual for name in lists if name.lower() == wanted), None)
    if found is None:
        raise UnknownNameError(
            f"{path}: which column holds the {what}? name it with {option}; lists stand in {listed(lists) or 'none'} (columns: "
            f"{listed(table.columns)})"
        )
    return found


def _uniform(tags: Sequence[tuple[str, ...]], source: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Tags in IOB2 or IOBES, and notes on what was rewritten."""
    prefixes = {tag[0] for own in tags for tag in own if re.match(r"[A-Z]-.", tag)}
    if prefixes & set(_LETTERS) and prefixes <= {"B", "I", "E", "S", *_LETTERS}:
        tags = [tuple(_letter(tag) for tag in own) for own in tags]
        prefixes = {_LETTERS.get(letter, letter) for letter in prefixes}
        note = [f"{source}: the letters {', '.join(sorted(_LETTERS))} of its tags were rewritten as those of IOBES"]
    else:
        note = []
    begun = sum(_begins_inside(own) for own in tags)
    if begun and prefixes <= {"B", "I"}:
        note.append(f"{source}: {begun} entities begin with I-, as in IOB1, and were rewritten to begin with B- (IOB2)")
        return [_iob2(own) for own in tags], note
    return list(tags), note


def _letter(tag: str) -> str:
    return sys.intern(_LETTERS[tag[0]] + tag[1:]) if tag[0] in _LETTERS and tag[1:2] == "-" else tag


def _begins_inside(tags: Sequence[str]) -> int:
    """How many entities begin with `I-`."""
    return sum(tags[entity.start].startswith("I-") for entity in entities_of(tags))


def _iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """The same entities, each from a `B-` on."""
    starts = {entity.start for entity in entities_of(tags)}
    return tuple(sys.intern(f"B-{tag[2:]}") if i in starts and tag.startswith("I-") else tag for i, tag in enumerate(tags))
