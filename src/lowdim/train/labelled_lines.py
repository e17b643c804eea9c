"""Lines of a label and a text."""

from __future__ import annotations

from pathlib import Path

from lowdim.errors import DataError, shown
from lowdim.train.columns import Table, TableBuilder
from lowdim.train.encoding import open_text

__all__ = ["read_labelled_lines"]


def read_labelled_lines(path: Path) -> Table:
    """`label text` lines, as in fastText and the sent-conv files, or `label<TAB>text`.

    Raises:
        DataError: a line has no text.
    """
    builder = TableBuilder(["label", "text"])
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            mark, _, rest = line.partition("\t") if "\t" in line else line.partition(" ")
            if not rest.strip():
                raise DataError(
                    f"{path}, line {number}: a labelled text file has `label text` on each line; got {shown(line.rstrip())}"
                )
            builder.append({"label": mark.removeprefix("__label__"), "text": rest.strip()}, len(line))
    return builder.table(path)
