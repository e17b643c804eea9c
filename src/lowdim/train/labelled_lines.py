"""Lines of a label and a text."""

from __future__ import annotations

import re
from pathlib import Path

from lowdim.errors import DataError, listed, shown
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text

__all__ = ["read_labelled_lines"]

#: A label of fastText, which may stand anywhere in its line.
_MARK = re.compile(r"(?<!\S)__label__(\S*)\s*")


def read_labelled_lines(path: Path) -> Table:
    """`label text` lines, as in the sent-conv files, `label<TAB>text`, or fastText's `__label__a text`.

    Raises:
        DataError: a line has no text, or more than one label.
    """
    with open_text(path) as lines:
        marked = any(_MARK.search(line) for line in lines)
    builder = TableBuilder(["label", "text"])
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                label, text = _marked(path, number, line) if marked else _labelled(path, number, line)
                builder.append({"label": label, "text": text}, len(line))
    return builder.table(path)


def _marked(path: Path, number: int, line: str) -> tuple[str | None, str]:
    joined = "".join(f"__label__{mark}" for mark in _MARK.findall(line))  # __label__a,__label__b are two
    labels = list(dict.fromkeys(mark.strip(",;|") for mark in joined.split("__label__")[1:]))
    if len(labels) > 1:
        raise DataError(
            f"{path}, line {number} has {len(labels)} labels ({listed(labels)}), and a text is trained with one; keep one in "
            "each line"
        )
    return (labels[0] if labels else None), _MARK.sub("", line).strip()


def _labelled(path: Path, number: int, line: str) -> tuple[str, str]:
    label, _, text = line.partition("\t") if "\t" in line else line.partition(" ")
    if not text.strip():
        raise DataError(
            f"{path}, line {number}: a labelled text file has `label text` on each line; got {shown(line.rstrip())}"
        )
    return label, text.strip()
