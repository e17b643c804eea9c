"""Instruction data from files: the conversation of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, cut
from lowdim.train.conversations import EmptyTurnError, Format, Turn, conversation_of, format_asked, format_of
from lowdim.train.data import Used
from lowdim.train.profiles import blank
from lowdim.train.roles import Roles
from lowdim.train.tables import locate, read_rows

__all__ = ["Dialogues", "read_dialogues"]


@dataclass(frozen=True)
class _Roles(Roles):
    """The columns of a conversation."""

    form: Format = field(default_factory=lambda: Format(""))

    @property
    def used(self) -> str:
        """What each column is used for, in half a sentence."""
        names = {name.strip().lower(): repr(cut(name)) for name in self.text}
        if self.form.chat:
            said = f"the turns are column {names[self.form.chat]}"
        else:
            asked = [names[column] for column in self.form.prompt if column in names]
            kind = "column" if len(asked) == 1 else "columns"
            said = f"the prompt is {kind} {' and '.join(asked)}, the answer column {names[self.form.answer]}"
        return f"{said}, the system message column {names[self.form.system]}" if self.form.system in names else said


@dataclass(frozen=True)
class Dialogues:
    """Conversations, each of which ends with an answer.

    Attributes:
        places: file and row of each, for messages.
        notes: what the user should know of the files.
        columns: of each file.
    """

    turns: list[list[Turn]]
    places: list[str]
    notes: tuple[str, ...] = ()
    columns: tuple[Used, ...] = ()


def read_dialogues(paths: Sequence[str | Path], *, text: str | None = None) -> Dialogues:
    r"""The conversations of one or more files; the format is detected for each file (`lowdim.train.conversations`).

    Args:
        text: names of the columns: of the turns, or of the prompt and, last, of the answer, with commas between them.

    Raises:
        DataError: unreadable files, columns of no format or of two, turns out of order, no row with a prompt and an answer.
        UnknownNameError: a column that does not exist.

    Example:
        >>> import pathlib, tempfile
        >>> from lowdim.train.dialogues import read_dialogues
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "sums.csv")
        ...     _ = file.write_text("question,answer\n1 + 1?,2\n")
        ...     found = read_dialogues([file])
        >>> [turn.content for turn in found.turns[0]]
        ['1 + 1?', '2']
    """
    turns: list[list[Turn]] = []
    places: list[str] = []
    notes: list[str] = []
    used: list[Used] = []
    for given in paths:
        path = locate(given)
        table = read_rows(path, (text,))
        form = format_of(table.columns, str(path)) if text is None else format_asked(text, table.columns, str(path))
        taken = tuple(name for name in table.columns if name.strip().lower() in form.columns)
        rest = tuple(name for name in table.columns if name not in taken)
        used.append(Used(str(given), _Roles(taken, unused=rest, form=form)))
        columns = [table.column(name) for name in taken]
        empty: list[EmptyTurnError] = []
        for number, values in enumerate(zip(*columns), 1):
            place = f"{path}, row {number}"
            try:
                turns.append(conversation_of(dict(zip(taken, map(_value, values))), form, place))
                places.append(place)
            except EmptyTurnError as error:
                empty.append(error)
        if len(empty) == len(table):
            raise DataError(
                f"no row of {path} has both a prompt and an answer: {empty[0]}; --text PROMPT,ANSWER names the columns"
            )
        notes += table.notes
        if empty:
            notes.append(f"{len(empty)} of {len(table)} rows have an empty prompt or answer and were left out ({empty[0]})")
    return Dialogues(turns, places, tuple(notes), tuple(used))


def _value(value: Any) -> Any:
    """A value of a table; one that is missing or cannot be seen is None."""
    return None if blank(value) else value
