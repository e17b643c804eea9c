"""The base class of all results: fields as strict JSON, table, plot, and views for terminals and notebooks."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, ClassVar

from lowdim.errors import MissingExtraError
from lowdim.files import write_json
from lowdim.outputs import write_page

__all__ = ["Result", "html_table", "json_value", "save_result"]

_SHOWN = 20  # rows of a table in a terminal or a notebook
_STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:60em;padding:0 1em}h1{font-size:1.2em}"
    "table{border-collapse:collapse;margin:1.5em 0}caption{text-align:left;font-weight:bold}"
    "th,td{padding:.2em .8em .2em 0;text-align:left;border-bottom:1px solid #ccc}"
)


class Result:
    """The outcome of a function, as a frozen dataclass: subclass it and declare the fields.

    The base gives `to_dict()`, `rows()`, `to_dataframe()`, `str()` and the view in a notebook. Override `rows` where the result
    has a natural table (a row for each layer, iteration or query), `summary` where another line says more, and `plot` where a
    picture says more than the table; `plot` starts with `axes = self._axes(ax)`.

    Attributes:
        left_out: names of fields that `to_dict` leaves out, because they are large and are not the answer to the question.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from lowdim.results import Result
        >>> @dataclass(frozen=True)
        ... class Spectrum(Result):
        ...     values: torch.Tensor  # (n,), descending
        ...     condition: float  # largest over smallest
        >>> Spectrum(torch.tensor([2.0, 0.0]), float("inf")).to_dict()
        {'values': [2.0, 0.0], 'condition': None}
        >>> print(Spectrum(torch.tensor([2.0, 1.0]), 2.0))
        Spectrum: condition 2
    """

    left_out: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields as strict JSON: arrays are lists, dataclasses are dicts, infinity and NaN are null.

        Raises:
            TypeError: JSON cannot represent a field; the error names it.
        """
        return _record(self, type(self).__name__, self.left_out)

    def rows(self) -> list[dict[str, Any]]:
        """The table, one dict per row. By default one row with the fields that hold a number, a text or None."""
        return [{name: value for name, value in self.to_dict().items() if not isinstance(value, (list, dict))}]

    def to_dataframe(self) -> Any:
        """`rows()` as a pandas table.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("pandas", "plot", f"{type(self).__name__}.to_dataframe") from error
        return pd.DataFrame(self.rows())

    def plot(self, *, ax: Any = None) -> Any:
        """A picture of the result on matplotlib axes (new ones unless given), which are returned.

        Raises:
            TypeError: this result has no picture. MissingExtraError: matplotlib is not installed.
        """
        raise TypeError(f"{type(self).__name__} has no plot; print it, or use to_dataframe()")

    @property
    def summary(self) -> str:
        """One line: the fields that hold a number or a text."""
        values = {name: value for name, value in Result.rows(self)[0].items() if value is not None}
        parts = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in values.items())
        return f"{type(self).__name__}: {parts}" if parts else type(self).__name__

    def __str__(self) -> str:
        return "\n".join([self.summary, *_text_table(self._table())])

    def _repr_html_(self) -> str:
        return html_table(self.summary, self._table())

    def _table(self) -> list[dict[str, Any]]:
        """The rows shown below the summary; empty where the summary already contains them."""
        return [] if type(self).rows is Result.rows else self.rows()

    def _axes(self, ax: Any = None) -> Any:
        """These axes, or new ones."""
        if ax is not None:
            return ax
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise MissingExtraError("matplotlib", "plot", f"{type(self).__name__}.plot") from error
        return plt.subplots()[1]


def json_value(value: Any, where: str = "value") -> Any:
    """The value in JSON types: tensors and arrays become lists, dataclasses dicts, infinity and NaN None.

    Args:
        where: the name of the value, for the error.

    Raises:
        TypeError: JSON cannot represent it; the error names the place.

    Example:
        >>> import numpy as np
        >>> from lowdim.results import json_value
        >>> json_value({"x": np.array([1.0, np.nan]), 3: (True, None)})
        {'x': [1.0, None], '3': [True, None]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Result):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _record(value, where)
    if isinstance(value, Mapping):
        return {_key(key, where): json_value(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, PurePath):
        return str(value)
    tolist = getattr(value, "tolist", None)  # of tensors, numpy arrays and numbers
    if callable(tolist):
        return json_value(tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot represent")


def save_result(result: Result, path: str | Path, *tables: tuple[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write a result as a page that needs nothing else (.html) or as its record (.json).

    Args:
        result: its summary stands first on the page.
        path: where; an old file is replaced.
        tables: of the page, each a caption and its rows, whole; one without rows is left out.

    Raises:
        ValueError: another ending.

    Example:
        >>> import tempfile
        >>> from dataclasses import dataclass
        >>> from lowdim.results import Result, save_result
        >>> @dataclass(frozen=True)
        ... class Answer(Result):
        ...     value: float
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = save_result(Answer(0.5), folder + "/answer.html", ("Values", [{"x": 1}])).read_text()
        >>> "<h1>Answer: value 0.5</h1>" in page, "<td>1</td>" in page
        (True, True)
    """
    path = Path(path)
    if path.suffix == ".json":
        return write_json(path, result.to_dict())
    if path.suffix != ".html":
        raise ValueError(f"path must end in .html (a page) or .json (the record); got {path}")
    head = f'<meta charset="utf-8"><title>{html.escape(type(result).__name__)}</title><style>{_STYLE}</style>'
    body = [f"<h1>{html.escape(result.summary)}</h1>", *(html_table(name, rows, limit=None) for name, rows in tables if rows)]
    return write_page(path, "\n".join([f'<!doctype html><html lang="en"><head>{head}</head><body>', *body, "</body></html>"]))


def html_table(caption: str, rows: Sequence[Mapping[str, Any]], *, limit: int | None = _SHOWN) -> str:
    """A table in HTML: everything in it is escaped; of a long one the first `limit` rows."""
    lines = [f"<table><caption>{html.escape(caption)}</caption>"]
    if rows:
        lines += _html_row("th", rows[0])
        for row in rows[:limit]:
            lines += _html_row("td", map(_shown, row.values()))
        if limit is not None and len(rows) > limit:
            lines.append(f'<tr><td colspan="{len(rows[0])}">and {len(rows) - limit} more</td></tr>')
    return "\n".join([*lines, "</table>"])


def _html_row(tag: str, cells: Iterable[str]) -> list[str]:
    return ["<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"]


def _text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned columns, texts to the left and numbers to the right."""
    if not rows:
        return []
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows[:_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = [isinstance(value, str) for value in rows[0].values()]
    lines = [
        "  ".join(cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(line, widths, texts)).rstrip()
        for line in cells
    ]
    return lines + ([f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else [])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _record(value: Any, where: str, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value) if field.name not in left_out]
    return {name: json_value(getattr(value, name), f"{where}.{name}") for name in names}


def _key(key: Any, where: str) -> str:
    if isinstance(key, (str, int, float)):
        return str(key)
    raise TypeError(f"a key of {where} is a {type(key).__name__}, which JSON cannot represent: {key!r}")
