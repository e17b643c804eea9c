"""Lines of a label and a text."""

from __future__ import annotations

import re
from pathlib import Path

from lowdim.errors import DataError, shown
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text

__all__ = ["read_labelled_lines"]

#: A label of fastText, which may stand anywhere in its line.
_MARK = re.compile(r"(?<!\S)__label__(\S*)\s*")


def read_labelled_lines(path: Path) -> Table:
    """`label text` lines, as in the sent-conv files, `label<TAB>text`, or fastText's `__label__a text`.

    Where a line has several of fastText's labels, each label is a list.

    Raises:
        DataError: a line has no text, or the lines are rows of a table.
    """
    with open_text(path) as lines:
        most = max(len(_marks(line)) for line in lines)
    _check_no_table(path)
    builder = TableBuilder(["label", "text"])
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                label, text = _marked(line, several=most > 1) if most else _labelled(path, number, line)
                builder.append({"label": label, "text": text}, len(line))
    return builder.table(path)


def _check_no_table(path: Path) -> None:
    """Refuse lines that all have the same number of tabs, where that is more than the one of `label<TAB>text`."""
    with open_text(path) as lines:
        counts = {line.count("\t") for line in lines if line.strip()}
    if len(counts) == 1 and (fields := counts.pop() + 1) > 2:
        raise DataError(
            f"{path} is a table: each line has {fields} fields with tabs between them, and a labelled text file has "
            f"`label text` on each line; give it the name {path.with_suffix('.tsv').name}"
        )


def _marks(line: str) -> list[str]:
    """The labels of a line, each once; `__label__a,__label__b` are two."""
    joined = "".join(f"__label__{mark}" for mark in _MARK.findall(line))
    return list(dict.fromkeys(mark.strip(",;|") for mark in joined.split("__label__")[1:]))


def _marked(line: str, *, several: bool) -> tuple[str | list[str] | None, str]:
    labels = _marks(line)
    return labels if several else (labels[0] if labels else None), _MARK.sub("", line).strip()


def _labelled(path: Path, number: int, line: str) -> tuple[str, str]:
    label, _, text = line.partition("\t") if "\t" in line else line.partition(" ")
    if not text.strip():
        raise DataError(
            f"{path}, line {number}: a labelled text file has `label text` on each line; got {shown(line.rstrip())}"
        )
    return label, text.strip()
