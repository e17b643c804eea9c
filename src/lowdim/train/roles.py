"""The roles of a table's columns: which hold the text, the pair of texts, the label.

The first rows of a file or a stream decide, so that both are read from the same column. No column is taken in silence where
several belong to one example, an id is never a text, and a column of texts is never a label.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, UnknownNameError, cut, listed, nearest, shown
from lowdim.train.columns import Table
from lowdim.train.conversations import FORMATS
from lowdim.train.profiles import SAMPLE, Profile, profile

__all__ = ["Roles", "document_roles", "labelled_roles", "profiles"]

_TEXT_NAMES = ("text", "sentence", "content", "review", "question", "document", "body", "comment", "utterance", "tweet")
_LABEL_NAMES = (
    "label", "labels", "class", "category", "sentiment", "target", "intent", "y", "topic", "gold_label",
)  # fmt: skip
#: Names of a column of lists, each with the labels of a text.
_SEVERAL_NAMES = (*_LABEL_NAMES, "tags", "topics", "genres", "categories", "classes", "emotions", "intents", "keywords")
#: Names of a column that holds a number to be learned.
_NUMBER_NAMES = (
    "score", "similarity", "similarity_score", "relatedness", "relatedness_score", "rating", "stars", "label", "labels",
    "target", "value", "y", "gold", "gold_score", "grade", "price", "points",
)  # fmt: skip
#: Words of a text, and a tag of each: another task.
_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "ner")
#: Names of a column that holds whole documents.
_DOCUMENT_NAMES = ("text", "content", "document", "body", "raw_content", "page_content")
#: Names of what is asked, and of what answers it: together they are one example.
_ASKING = (
    "prompt", "question", "instruction", "instructions", "query", "problem", "input", "inputs", "context", "system", "source",
    "src", "mr", "meaning_representation", "user", "human", "history", "premise",
)  # fmt: skip
_ANSWERING = (
    "answer", "answers", "completion", "response", "output", "outputs", "reply", "solution", "summary", "highlights", "chosen",
    "rejected", "target", "tgt", "ref", "reference", "references", "assistant", "bot", "gpt", "translation", "human_reference",
    "hypothesis", "final_answer", "target_text", "best_answer", "gold",
)  # fmt: skip
#: Answers that need not be texts: `42` is one, too. Next to a document other names hold as often a class or an origin.
_SHORT_ANSWERS = frozenset(_ANSWERING) - {"target", "reference", "ref", "gold", "hypothesis", "translation"}
#: Pairs of texts for classification, the first text first; other pairs are found by their numbers or letters.
_PAIR_NAMES = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
    ("question", "passage"), ("question", "context"), ("question", "answer"), ("question", "document"), ("query", "passage"),
    ("query", "document"), ("query", "text"), ("query", "product_title"), ("claim", "evidence"), ("context", "response"),
    ("context", "hypothesis"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"),
    ("source", "target"), ("instruction", "response"), ("anchor", "candidate"), ("text", "hypothesis"), ("sentence", "context"),
    ("headline", "body"), ("mr", "ref"), ("src", "tgt"), ("input", "output"),
)  # fmt: skip
_OPPOSITES = (("1", "2"), ("a", "b"), ("first", "second"), ("left", "right"))


@dataclass(frozen=True)
class Roles:
    """The columns that are used, and those that are not.

    Attributes:
        text: the column of the text; two for a pair.
        label: for classification.
    """

    text: tuple[str, ...]
    label: str | None = None
    unused: tuple[str, ...] = ()

    @property
    def pair(self) -> bool:
        """Whether an example is a pair of texts."""
        return len(self.text) == 2

    @property
    def used(self) -> str:
        """What each column is used for, in half a sentence."""
        texts = " and ".join(map(repr, map(_name, self.text)))
        said = f"the texts of a pair are columns {texts}" if self.pair else f"the text is column {texts}"
        return said if self.label is None else f"{said} and the label {_name(self.label)!r}"

    def to_dict(self) -> dict[str, Any]:
        """For records."""
        return {"text": list(self.text), "label": self.label, "unused": list(self.unused[:100])}


def profiles(rows: Table | Sequence[Mapping[str, Any]]) -> list[Profile]:
    """The columns of a table, or of the first rows of a stream."""
    if isinstance(rows, Table):
        return [profile(name, rows.column(name)[:SAMPLE]) for name in rows.columns]
    names = dict.fromkeys(name for row in rows for name in row)
    return [profile(name, [row.get(name) for row in rows]) for name in names]


def document_roles(columns: Sequence[Profile], asked: str | None, name: str) -> Roles:
    """The one column that a language model is trained on.

    Args:
        columns: of the file or stream `name`.
        asked: the column that the user named; it is taken whatever else there is.

    Raises:
        UnknownNameError: the column that was named does not exist, or none holds text.
        DataError: several columns belong to one example (prompt and answer, pairs), or lists hold the text (chats).
    """
    if asked is not None:
        if all(c.name != asked for c in columns) and {part.strip() for part in asked.split(",")} <= {c.name for c in columns}:
            raise DataError(f"--text {asked}: a language model is trained on one column; join them into one, or name one")
        return _roles(columns, (_asked(columns, asked, "--text", name).name,))
    usable = [c for c in columns if c.kind not in ("empty", "id")]
    document = _usual([c for c in columns if c.kind not in ("lists", "other")], _DOCUMENT_NAMES)
    lists = [c for c in usable if c.kind == "lists" and (c.chat or document is None)]
    if lists:
        raise DataError(
            f"{name}: {_held(lists)}, and a language model is trained on plain text: write each example as one string, or name "
            f"a column of text with --text{_answered(columns)}; {_all(columns)}"
        )
    parts = _parts(usable, document)
    found = document or next((c for c in usable if c.kind == "text"), None)
    if found is None and not parts:
        words = [c for c in usable if c.kind == "word"]
        found = _first(words, _TEXT_NAMES) or next(iter(words), None)
        parts = words if found is not None and found.plain not in _TEXT_NAMES and len(words) > 1 else []
    if parts:
        raise DataError(
            f"{name}: columns {listed(_name(c.name) for c in parts)} may all belong to an example, and a language model is "
            f"trained on one: join them into one column, or name the one to train on with --text, e.g. "
            f"--text {shlex.quote(parts[0].name)}{_answered(columns)} ({_all(columns)})"
        )
    if found is None:
        raise UnknownNameError(f"{name}: no column holds text; {_all(columns)}")
    return _roles(columns, (found.name,))


def _parts(usable: Sequence[Profile], document: Profile | None) -> list[Profile]:
    """The columns that make up one example, where there are several."""
    texts = [c for c in usable if c.kind == "text"]
    if document is None:
        asking = [c for c in usable if c.plain in _ASKING and c.string]
        answering = [c for c in usable if c.plain in _ANSWERING and (c.string or c.plain in _SHORT_ANSWERS)]
        roles = asking + answering
        several = [c for c in usable if c in texts or (c in roles and len(roles) > 1)]
        return several if len(several) > 1 else []
    parts = [
        c
        for c in usable
        if c is not document
        and ((c.plain in _SHORT_ANSWERS) or (c.kind == "text" and c.plain in (*_ASKING, *_ANSWERING)))
        and not document.holds(c)  # a column of whole texts that were made from the others
    ]
    parts += [c for c in texts if c is not document and c not in parts and c.size > document.size and not document.holds(c)]
    return [document, *parts] if parts else []


def labelled_roles(
    columns: Sequence[Profile], text: str | None, label: str | None, name: str, *, numbers: bool = False
) -> Roles:
    """The columns of the text, or of the pair of texts, and of the label.

    Args:
        text: the column that the user named, or two with a comma for a pair.
        numbers: whether the label is a number (task regress).

    Raises:
        UnknownNameError: a column does not exist, or cannot be found (the columns are listed).
        DataError: lists hold the text, more than two columns were named, or the columns fit two tasks.
    """
    if label is not None:
        mark = _asked(columns, label, "--label", name, lists=not numbers)
    else:
        mark = _number(columns, name) if numbers else _mark(columns, name)
    texts = _asked_texts(columns, text, name) if text is not None else _found_texts(columns, mark, name)
    if mark is None:
        others = [c for c in columns if c not in texts and c.kind in (("number",) if numbers else ("number", "word"))]
        if len(others) != 1:
            which = "the number" if numbers else "the label"
            raise UnknownNameError(
                f"{name}: which column holds {which}? name it with --label{_other_task(columns, numbers)}; {_all(columns)}"
            )
        mark = others[0]
    if not texts or mark in texts:
        raise UnknownNameError(
            f"{name}: which column holds the text? name it with --text{_other_task(columns, numbers)}; {_all(columns)}"
        )
    return _roles(columns, tuple(c.name for c in texts), mark.name)


def _mark(columns: Sequence[Profile], name: str) -> Profile | None:
    """The column of the label by its usual name.

    Raises:
        DataError: one column has single labels, and another lists of them; or lists may be tags of words.
    """
    lists = [c for c in columns if c.nested == "list" and not c.chat and c.plain in _SEVERAL_NAMES]
    words = next((c for c in columns if c.nested == "list" and c.plain in _WORDS), None)
    tags = next((c for c in columns if c.nested == "list" and c.plain in _TAGS), None)
    if words is not None and tags is not None:
        raise DataError(
            f"{name}: columns {words.name!r} and {tags.name!r} look like words with a tag each, which --task tokens learns; if "
            f"{tags.name!r} holds labels of a whole text, name it with --label {shlex.quote(tags.name)}"
        )
    single = _first([c for c in columns if c.nested != "list" and (c.kind != "text" or c.repeated)], _LABEL_NAMES)
    if single is not None and single.kind != "empty" and lists:
        raise DataError(
            f"{name}: column {_name(single.name)!r} holds one label in each row, and {_name(lists[0].name)!r} a list of them: "
            f"--label {shlex.quote(single.name)} trains on one class for each text, --label {shlex.quote(lists[0].name)} on "
            "several"
        )
    return (_first(lists, _SEVERAL_NAMES) if lists else None) or single


def _number(columns: Sequence[Profile], name: str) -> Profile | None:
    """The column of the number by its usual name.

    Raises:
        DataError: there are several, or the label is a word.
    """
    found = [c for c in columns if c.kind == "number" and c.plain in _NUMBER_NAMES]
    if len(found) > 1:
        raise DataError(
            f"{name}: which column holds the number? Columns {listed(_name(c.name) for c in found)} do; name one with --label, "
            f"e.g. --label {shlex.quote(found[0].name)}"
        )
    label = _first([c for c in columns if c.kind == "word" or c.nested], _LABEL_NAMES)
    if not found and label is not None:
        held = "lists" if label.nested else "words"
        raise DataError(
            f"{name}: column {_name(label.name)!r} holds {held}, and --task regress learns numbers: --task classify trains on "
            "classes; or name a column of numbers with --label"
        )
    return found[0] if found else None


def _other_task(columns: Sequence[Profile], numbers: bool) -> str:
    """What else these columns may be for."""
    names = {c.plain for c in columns}
    if any(c.chat for c in columns):
        return ". The rows hold chats, on whose answers --task instruct trains"
    if any(pair <= names for pair in ({"prompt", "completion"}, {"question", "answer"}, {"instruction", "output"})):
        return ". The rows hold questions with answers, on which --task instruct trains"
    if {"anchor", "positive"} <= names:
        return ". The rows hold texts that belong together; no task learns from them yet"
    if numbers and any(c.kind == "word" and c.plain in _LABEL_NAMES for c in columns):
        return ". Words are classes: --task classify"
    return ""


def _asked_texts(columns: Sequence[Profile], asked: str, name: str) -> list[Profile]:
    if any(c.name == asked for c in columns):
        return [_asked(columns, asked, "--text", name)]
    names = [part.strip() for part in asked.split(",")]
    if len(names) > 2 or len(set(names)) < len(names):
        raise DataError(f"--text {asked}: name one column, or two different ones for a pair; join more of them into one column")
    return [_asked(columns, part, "--text", name) for part in names]


def _found_texts(columns: Sequence[Profile], mark: Profile | None, name: str) -> list[Profile]:
    rest = [c for c in columns if c is not mark]
    pair = _pair(rest, sure=mark is not None)
    if pair:
        return pair
    usual = _usual(rest, _TEXT_NAMES)
    texts = [c for c in rest if c.kind == "text"]
    if usual is not None and usual.kind not in ("lists", "other"):
        longer = [c for c in texts if c is not usual and c.size > usual.size]
        if not longer:
            return [usual]
        texts = [usual, *longer]
    else:
        lists = [usual] if usual is not None else [c for c in rest if c.kind == "lists"]
        if lists:
            raise DataError(f"{name}: {_held(lists)}: write each example as one string, or name another with --text")
    if len(texts) > 1:
        one, two = (shlex.quote(c.name) for c in texts[:2])
        raise UnknownNameError(
            f"{name}: which column holds the text? Columns {listed(_name(c.name) for c in texts)} do: --text {one} takes one, "
            f"--text {one} --text {two} reads two as a pair; {_all(columns)}"
        )
    words = [c for c in rest if c.kind == "word"]
    return texts or ([max(words, key=lambda c: c.size)] if words else [])


def _pair(columns: Sequence[Profile], *, sure: bool) -> list[Profile] | None:
    """Two columns with the names of a pair; where the label is not known yet, only two columns of texts."""
    kinds = ("text", "word", "number") if sure else ("text",)
    usable = {c.plain: c for c in reversed(columns) if c.kind in kinds}
    named = [[usable[one], usable[two]] for one, two in _PAIR_NAMES if one in usable and two in usable]
    named = [pair for pair in named if any(c.string for c in pair)]
    if named:
        return named[0]
    found = [[c, usable[two]] for one, c in usable.items() if (two := _partner(one)) in usable]
    found = [pair for pair in found if any(c.kind == "text" for c in pair)] or [
        pair for pair in found if all(c.string for c in pair)
    ]
    others = [c for c in columns if (c.kind == "text" or c.plain in _TEXT_NAMES) and not any(c in pair for pair in found)]
    return found[0] if len(found) == 1 and not others else None


def _partner(name: str) -> str | None:
    """`text_b` for `text_a`, `#2_string` for `#1_string`, `s2` for `s1`."""
    for one, two in _OPPOSITES:
        pattern = rf"(?<!\d){one}(?!\d)" if one.isdigit() else rf"(?<![^\W_]){one}(?![^\W_])"
        if len(re.findall(pattern, name)) == 1:
            return re.sub(pattern, two, name)
    return None


def _asked(columns: Sequence[Profile], asked: str, option: str, name: str, *, lists: bool = False) -> Profile:
    found = next((c for c in columns if c.name == asked), None)
    if found is None:
        close = ", ".join(_name(n) for n in nearest(asked, [c.name for c in columns]))
        raise UnknownNameError(f"{option}: {name} has no column {shown(asked)}; nearest: {close}; {_all(columns)}")
    if found.nested and not (lists and found.nested == "list" and not found.chat):
        raise DataError(f"{option} {asked}: {name}: {_held([found])}: write each example as one string")
    return found


def _first(columns: Sequence[Profile], usual: Sequence[str]) -> Profile | None:
    """The first column with a usual name; one that holds something before one that is empty."""
    found = {c.plain: c for c in reversed(columns)}
    names = [u for u in usual if u in found]
    return next((found[u] for u in names if found[u].kind != "empty"), found[names[0]] if names else None)


def _usual(columns: Sequence[Profile], usual: Sequence[str]) -> Profile | None:
    """The first column with a usual name; an empty one only where no other holds strings."""
    found = _first(columns, usual)
    empty = found is not None and found.kind == "empty" and any(c.string or c.kind == "lists" for c in columns)
    return None if empty else found


def _answered(columns: Sequence[Profile]) -> str:
    """What to do with prompts and answers."""
    names = {c.name.strip().lower() for c in columns}
    return "; --task instruct trains on the answers" if any(form.needed <= names for form in FORMATS) else ""


def _roles(columns: Sequence[Profile], text: tuple[str, ...], label: str | None = None) -> Roles:
    return Roles(text, label, tuple(c.name for c in columns if c.name not in text and c.name != label))


def _name(name: str) -> str:
    return cut(name) if name.strip() else "(unnamed)"


def _all(columns: Sequence[Profile]) -> str:
    return f"columns: {listed(_name(c.name) for c in columns)}"


def _held(columns: Sequence[Profile]) -> str:
    held = " and ".join(dict.fromkeys(f"a {c.nested or 'chat written as a string'}" for c in columns))
    if len(columns) == 1:
        return f"column {_name(columns[0].name)!r} must hold text or numbers; got {held}"
    return f"columns {listed(_name(c.name) for c in columns)} must hold text or numbers; got {held}"
