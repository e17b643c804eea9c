"""A comparison in a notebook: the verdict and a small table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowdim.report.reading import read
from lowdim.report.rows import columns, sentences
from lowdim.report.sentences import spoken
from lowdim.report.text import esc
from lowdim.results import html_table

__all__ = ["fragment"]


def fragment(comparison: Mapping[str, Any]) -> str:
    """The comparison as HTML for a notebook's cell: verdict, table, reasons.

    Args:
        comparison: the record that `lowdim compare` writes, as for `lowdim.report.render`.

    Returns:
        HTML without styles and scripts; everything in it is escaped.

    Example:
        >>> print(fragment({"methods": [{"name": "lora", "mean": 0.8}]}).splitlines()[0])
        <p><strong>lora.</strong></p>
    """
    record = read(comparison)
    said, reasons = spoken(record)
    shown = [column for column in columns(record) if column.title]
    rows = [dict(zip((column.title for column in shown), cells)) for cells in zip(*(column.cells for column in shown))]
    parts = [f"<p><strong>{esc(said)}</strong></p>", html_table(record.title, rows)]
    return "\n".join([*parts, *(f"<p>{esc(line)}</p>" for line in (*reasons, *sentences(record)))])
