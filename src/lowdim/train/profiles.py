"""What the first rows of a table say about a column: texts, short strings, numbers, ids, lists."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SAMPLE", "Profile", "blank", "profile"]

#: Rows that decide about a column.
SAMPLE = 1000

_MEASURED = 200  # values whose words are counted
_CHAT_NAMES = (
    "messages",
    "conversations",
    "conversation",
    "chat",
    "chats",
    "dialog",
    "dialogue",
    "turns",
    "chosen",
    "rejected",
)
_CHAT_KEYS = frozenset({"role", "content", "from", "value", "user", "assistant"})
_WRITTEN_CHAT = re.compile(r"""\s*"?\[\s*\{\s*["'\\]{1,2}(?:role|content|from|value)["'\\]{1,2}\s*:""")
_ID_NAME = re.compile(
    r"(?:.*[\s_.:#-])?(?:ids?|idx|guids?|uuids?|uid)\d*|unnamed: [\d.]+|__index_level_\d+__|[qpd]id\d*|docno|index|urls?|uri"
)
_ID_CAMEL = re.compile(r".*[a-z](?:Id|ID|Idx|Url|URL)\d*")
_ID_VALUE = re.compile(r"https?://\S+|(?=\S*\d)[\w.:/#@+-]{1,64}")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")


@dataclass(frozen=True)
class Profile:
    """What the first rows say about a column.

    Attributes:
        kind: `"empty"`, `"id"`, `"number"`, `"word"` (short strings: classes, names), `"text"`, `"lists"` (lists or dicts that
            hold text), or `"other"` (lists of numbers or of words, bytes).
        size: mean number of characters.
        repeated: whether at most half of the values are different.
        nested: `"list"`, `"dict"` or `"bytes"`, where it holds such values.
        chat: whether it holds turns of a chat, as lists or written as strings.
    """

    name: str
    kind: str
    size: float = 0.0
    repeated: bool = False
    nested: str = ""
    chat: bool = False
    start: tuple[str, ...] = field(default=(), repr=False)  # the first values as strings, to compare columns

    @property
    def plain(self) -> str:
        """The name in lower case, its words joined by `_`."""
        return re.sub(r"[\s-]+", "_", self.name.strip().lower())

    @property
    def string(self) -> bool:
        """Whether it holds strings of any length."""
        return self.kind in ("word", "text")

    def holds(self, other: Profile) -> bool:
        """Whether the values of another column are part of its own."""
        return all(theirs.strip() in own for own, theirs in zip(self.start, other.start))


def profile(name: str, values: Sequence[Any]) -> Profile:
    """What these values say about a column.

    Example:
        >>> from lowdim.train.profiles import profile
        >>> profile("remark", ["a film that I liked", "a film that I did not"]).kind
        'text'
        >>> profile("id", ["row 1 of this file", "row 2 of this file"]).kind
        'id'
    """
    seen = [value for value in values if not blank(value)]
    if not seen:
        return Profile(name, "empty")
    start = tuple("" if blank(value) else str(value) for value in values[:20])
    nested = [value for value in seen if isinstance(value, (list, tuple, dict, bytes))]
    named = name.strip().lower() in _CHAT_NAMES
    if nested or all(_is_written_chat(value, named) for value in seen[:20]):
        parts = [part for value in (nested or seen) for part in _strings(value)]
        chat = not nested or named or any(map(_is_chat, nested))
        kind = "lists" if parts and (chat or _words(parts) >= 3) else "other"
        held = type(nested[0]).__name__ if nested else ""
        return Profile(name, kind, sum(map(len, parts)) / len(values), nested=held, chat=chat, start=start)
    texts = [str(value) for value in seen]
    different = len(set(texts))
    kind = _kind(name, seen, texts, different)
    return Profile(name, kind, sum(map(len, texts)) / len(values), different <= len(texts) / 2, start=start)


def _kind(name: str, values: Sequence[Any], texts: Sequence[str], different: int) -> str:
    if _ID_NAME.fullmatch(name.strip().lower()) or _ID_CAMEL.fullmatch(name) or not name.strip():
        return "id"
    if all(not isinstance(value, str) or _is_number(value) for value in values):
        return "number"
    words = _words(texts)
    if words >= 5 or (words >= 3 and different > len(texts) / 10):
        return "text"
    if len(texts) > 2 and different == len(texts) and all(_ID_VALUE.fullmatch(text.strip()) for text in texts):
        return "id"
    return "word"


def blank(value: Any) -> bool:
    """Whether this is no value: missing, not a number, an empty list, or nothing that can be seen.

    Example:
        >>> from lowdim.train.profiles import blank
        >>> blank(None), blank(" \u200b"), blank(0), blank("0")
        (True, True, False, False)
    """
    if isinstance(value, str):
        return all(unicodedata.category(character) in _INVISIBLE for character in value)
    if isinstance(value, (list, tuple, dict, bytes)):
        return not value
    return value is None or bool(value != value)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """The strings in lists and dicts."""
    if isinstance(value, str):
        yield value
    elif depth < 6 and isinstance(value, (list, tuple, dict)):
        for part in list(value.values() if isinstance(value, dict) else value)[:_MEASURED]:
            yield from _strings(part, depth + 1)


def _is_chat(value: Any) -> bool:
    """A list of turns, or one turn."""
    turn = value[0] if isinstance(value, (list, tuple)) else value
    return isinstance(turn, dict) and len(_CHAT_KEYS & set(turn)) > 1


def _is_written_chat(value: Any, named: bool) -> bool:
    """A chat in a table of strings; in a column that is named as one, any list or dict."""
    return isinstance(value, str) and bool(
        _WRITTEN_CHAT.match(value) or (named and value.lstrip('" ').startswith(("[{", "[[", "{")))
    )


def _words(texts: Sequence[str]) -> float:
    """Mean number of words; two characters of a script without spaces count as one."""
    some = texts[:_MEASURED]
    return sum(len(text.split()) + len(_UNSPACED.findall(text)) // 2 for text in some) / len(some)


def _is_number(value: str) -> bool:
    try:
        float(value.replace(",", "."))
    except ValueError:
        return False
    return True
