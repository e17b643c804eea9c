"""Rows of instruction data as conversations: prompt and completion, question and answer, instructions, chats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, UnknownNameError, listed, nearest, shown
from lowdim.files import parse_json

__all__ = ["FORMATS", "EmptyTurnError", "Format", "Turn", "as_text", "conversation_of", "format_asked", "format_of"]

ROLES = ("system", "user", "assistant")
#: What other data sets call the roles.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class EmptyTurnError(DataError):
    """A prompt or an answer is empty."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Format:
    """The columns of a conversation.

    Attributes:
        name: for notes.
        prompt: columns whose texts, joined by an empty line, are the user's turn; the first may be named by others, too.
        answer: column of the assistant's turn; empty for chats.
        chat: column of the list of turns; empty for the others.
        optional: of `prompt`, columns that may be empty or missing.
        system: column of a system message.
    """

    name: str
    prompt: tuple[str, ...] = ()
    answer: str = ""
    chat: str = ""
    optional: tuple[str, ...] = ()
    system: str = "system"

    @property
    def needed(self) -> set[str]:
        """Columns without which it is not this format."""
        return {*(set(self.prompt) - set(self.optional)), *filter(None, (self.answer, self.chat))}

    @property
    def columns(self) -> tuple[str, ...]:
        """All of its columns."""
        return tuple(filter(None, (self.system, *self.prompt, self.answer, self.chat)))


#: In this order: the first whose columns are all there is taken.
FORMATS = (
    Format("messages", chat="messages"),
    Format("conversations", chat="conversations"),
    Format("conversation", chat="conversation"),
    Format("instruction and output", ("instruction", "input"), "output", optional=("input",)),
    Format("instruction and response", ("instruction", "context"), "response", optional=("context",)),
    Format("prompt and completion", ("prompt",), "completion"),
    Format("prompt and response", ("prompt",), "response"),
    Format("prompt and answer", ("prompt",), "answer"),
    Format("question and answer", ("context", "question"), "answer", optional=("context",)),
    Format("question and response", ("question",), "response"),
    Format("query and response", ("query",), "response"),
    Format("input and output", ("input",), "output"),
)


def format_of(columns: Iterable[str], source: str) -> Format:
    """The format of a table with these columns.

    Raises:
        DataError: none fits, or rows hold preferences, or two fit of which neither is part of the other.

    Example:
        >>> from lowdim.train.conversations import format_of
        >>> format_of(["id", "instruction", "input", "output"], "data.jsonl").name
        'instruction and output'
    """
    there = {column.strip().lower(): column for column in columns}
    if {"chosen", "rejected"} <= set(there):
        raise DataError(
            f"{source} holds preferences (columns chosen and rejected); `instruct` trains on one answer: rename the chosen one"
        )
    found = [form for form in FORMATS if form.needed <= set(there)]
    if not found:
        known = "; ".join(", ".join(sorted(form.needed)) for form in FORMATS)
        raise DataError(
            f"{source} has columns {listed(there.values())}; `instruct` reads one of: {known}; other names are given with "
            "--text PROMPT,ANSWER"
        )
    other = next((form for form in found[1:] if not form.needed <= set(found[0].columns)), None)
    if other is not None:
        options = [",".join(column for column in form.columns if column in form.needed) for form in (found[0], other)]
        raise DataError(
            f"{source} can be read in two ways: {found[0].name} ({', '.join(sorted(found[0].needed))}) and {other.name} "
            f"({', '.join(sorted(other.needed))}); choose with --text {options[0]} or --text {options[1]}"
        )
    return found[0]


def format_asked(asked: str, columns: Iterable[str], source: str) -> Format:
    """The format that `--text` names: a column of turns, or columns of the prompt and, last, the column of the answer.

    Raises:
        UnknownNameError: a column that does not exist.
        DataError: a column is named twice.
    """
    names = [name.strip() for name in asked.split(",")]
    there = list(columns)
    known = {column.strip().lower() for column in there}
    for name in names:
        if name.lower() not in known:
            raise UnknownNameError(
                f"--text: {source} has no column {shown(name)}; nearest: {listed(nearest(name, there))}; "
                f"columns: {listed(there)}"
            )
    plain = [name.lower() for name in names]
    if len(set(plain)) < len(plain):
        raise DataError(f"--text {asked}: name each column once, those of the prompt first and that of the answer last")
    if len(plain) == 1:
        return Format(names[0], chat=plain[0])
    *prompt, answer = plain
    return Format(" and ".join(names), tuple(prompt), answer, optional=tuple(prompt[1:]))


def conversation_of(row: Mapping[str, Any], form: Format, place: str) -> list[Turn]:
    """The turns of one row: a system message perhaps, then the user and the assistant in turn; the last is an answer.

    Raises:
        EmptyTurnError: an empty answer or prompt; the place (file and row) is named.
        DataError: an unknown role, or turns out of order.

    Example:
        >>> from lowdim.train.conversations import conversation_of, format_of
        >>> row = {"question": "1 + 1?", "answer": "2"}
        >>> [turn.content for turn in conversation_of(row, format_of(row, "a.jsonl"), "a.jsonl, row 1")]
        ['1 + 1?', '2']
    """
    own = {key.strip().lower(): value for key, value in row.items()}
    turns = _chat(own[form.chat], form.chat, place) if form.chat else _pair(own, form, place)
    system = own.get(form.system)
    if isinstance(system, str) and system.strip() and turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    _check(turns, place)
    return turns


def _pair(row: Mapping[str, Any], form: Format, place: str) -> list[Turn]:
    parts = []
    for column in form.prompt:
        text = _text(row.get(column), column, place)
        if not text.strip() and column not in form.optional:
            raise EmptyTurnError(f"{place}: column {column!r} is empty")
        parts.append(text)
    answer = _text(row.get(form.answer), form.answer, place)
    return [Turn("user", "\n\n".join(part for part in parts if part.strip())), Turn("assistant", answer)]


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) == 1:  # a list of one answer
        value = value[0]
    if isinstance(value, dict | list):
        raise DataError(f"{place}: column {column!r} must hold text; got {shown(value)}")
    return str(value)


def _chat(value: Any, column: str, place: str) -> list[Turn]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise DataError(
                f"{place}: column {column!r} must hold a list of turns, or one written as JSON; got {shown(value)}"
            ) from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(turn, Mapping) for turn in value):
        raise DataError(f"{place}: column {column!r} must hold a list of turns with role and content; got {shown(value)}")
    return [_turn(turn, f"{place}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Mapping[str, Any], place: str) -> Turn:
    role = str(turn.get("role", turn.get("from", ""))).strip().lower()
    if role not in _ROLES:
        raise DataError(f"{place}: the role must be one of {', '.join(ROLES)}; got {shown(role)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as for models that also read images
        kinds = {str(part.get("type", "text")) if isinstance(part, Mapping) else "text" for part in content}
        if kinds - {"text"}:
            raise DataError(f"{place}: only text can be trained on; got parts of type {', '.join(sorted(kinds))}")
        content = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    if turn.get("tool_calls"):
        raise DataError(f"{place}: tool calls cannot be trained on; write them as text, or leave the row out")
    return Turn(_ROLES[role], "" if content is None else str(content))


def _check(turns: Sequence[Turn], place: str) -> None:
    talk = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise DataError(f"{place}: a system message must come first")
    for number, turn in enumerate(talk, 1):
        wanted = ("assistant", "user")[number % 2]
        if turn.role != wanted:
            raise DataError(f"{place}: turn {number} must be by the {wanted}; got {turn.role}")
        if not turn.content.strip():
            raise EmptyTurnError(f"{place}: turn {number}, by the {turn.role}, is empty")
    if len(talk) < 2 or talk[-1].role != "assistant":
        raise DataError(f"{place}: the conversation must end with an answer; got {len(talk)} turns")


def as_text(turns: Sequence[Turn]) -> str:
    """A conversation as one line of JSON, for duplicates and notes."""
    return json.dumps([turn.to_dict() for turn in turns], ensure_ascii=False)
