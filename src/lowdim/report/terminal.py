"""The comparison in a terminal: the verdict first, then the page's table, with fewer columns where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowdim.report.cuts import cut_rows
from lowdim.report.measured import measured_lines
from lowdim.report.reading import read
from lowdim.report.record import Comparison
from lowdim.report.rows import columns, sentences
from lowdim.report.sentences import spoken
from lowdim.report.text import plain, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["summary", "table"]

_SAMPLES = 5
_SHOWN = 300  # characters of a prompt or an answer


def summary(comparison: Mapping[str, Any], width: int | None = None) -> RenderableType:
    """The whole result for `rich.console.Console.print`: verdict, reasons, table, and samples where models wrote some.

    Args:
        comparison, width: as for `table`.

    Returns:
        A rich renderable.

    Example:
        >>> from rich.console import Console
        >>> record = {"methods": [{"name": "lora", "mean": 0.8, "interval": [0.7, 0.9]}]}
        >>> Console(width=60).print(summary(record, width=60))  # doctest: +ELLIPSIS
        lora.
        Score 0.800 [0.700, 0.900].
        ...
    """
    from rich.console import Group
    from rich.text import Text

    record = read(comparison)
    said, reasons = spoken(record)
    parts: list[RenderableType] = [Text(said, style="bold"), *(Text(line) for line in reasons), Text("")]
    parts.append(_table(record, width))
    if lines := measured_lines(record):
        parts += [Text(""), *map(Text, lines)]
    if (cut := _cut(record)) is not None:
        parts += [Text(""), cut]
    if record.samples:
        parts += [Text(""), _samples(record)]
    return Group(*parts)


def table(comparison: Mapping[str, Any], width: int | None = None) -> Table:
    """The comparison as a table for `rich.console.Console.print`.

    Args:
        comparison: the record that `lowdim compare` writes, as for `lowdim.report.render`.
        width: columns of the terminal; None uses the width that rich finds (80 without a terminal). All of the table's
            columns fit 100; below 96 the file size is left out, below 72 the differences and the trained parameters too.

    Returns:
        The table; best method first, then those skipped or failed, with the reasons below.

    Example:
        >>> record = {"methods": [{"name": "lora", "mean": 0.8, "interval": [0.7, 0.9]}]}
        >>> [str(column.header) for column in table(record, width=60).columns]
        ['Method', 'score', 'Peak', 'Step', '★']
    """
    return _table(read(comparison), width)


def _table(record: Comparison, width: int | None) -> Table:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = Console().width if width is None else width
    result: Table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left", caption_justify="left"
    )
    if record.title != "Comparison":
        result.title = Text(record.title)
    shown = [column for column in columns(record) if width >= column.least]
    cells = [[*column.cells, *_missing(record, column.title, index)] for index, column in enumerate(shown)]
    widths = [max(Text(text).cell_len for text in (column.title, *texts)) for column, texts in zip(shown, cells)]
    # Only names are shortened: a truncated number would be wrong. Two blanks follow each column.
    widths[0] = max(8, min(widths[0], width - sum(widths[1:]) - 2 * len(widths)))
    for column, size_ in zip(shown, widths):
        head = Text(column.title)
        result.add_column(head, justify=column.side, no_wrap=True, overflow="ellipsis", min_width=size_, max_width=size_)
    rows = [*record.finished, *record.left_out]
    for candidate, row in zip(rows, zip(*cells)):
        style = "bold" if candidate is record.chosen else "dim" if candidate.trivial or not candidate.ok else ""
        result.add_row(*(Text(text, overflow="ellipsis", no_wrap=True) for text in row), style=style)
    lines = sentences(record)
    result.caption = Text("\n".join(lines)) if lines else None
    return result


def _cut(record: Comparison) -> Table | None:
    """Scores at smaller sizes, where embeddings were trained for them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heads, rows = cut_rows(record)
    if not rows:
        return None
    result: Table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left")
    result.title = Text(f"{record.metric} cut to layers × dimensions, first seed")
    for index, head in enumerate(heads):
        result.add_column(Text(head), justify="right" if index else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(Text, row))
    return result


def _missing(record: Comparison, title: str, index: int) -> list[str]:
    """The cells of skipped and failed methods in a column."""
    if index == 0:
        return [f"  {plain(c.label, 80)}" for c in record.left_out]
    if index == 1:
        return ["skipped" if c.status == "skipped" else "failed" for c in record.left_out]
    if title == "Forecast":
        return [size(c.forecast_peak_bytes) if c.forecast_peak_bytes is not None else "" for c in record.left_out]
    return ["" for _ in record.left_out]


def _samples(record: Comparison) -> RenderableType:
    """What the untouched model and the one that is handed over wrote for a few prompts."""
    from rich.table import Table
    from rich.text import Text

    result = Table.grid(padding=(0, 2, 0, 0))
    result.title, result.title_justify = Text("Samples", style="bold"), "left"
    pick = record.chosen or record.best
    for sample in record.samples[:_SAMPLES]:
        rows = [("prompt", sample.prompt), ("expected", sample.expected)]
        rows.append(("untouched", sample.answers.get("untouched", "")))
        rows += [(pick.label, sample.answers[pick.name])] if pick and pick.name in sample.answers else []
        for name, text in rows:
            if text.strip():
                result.add_row(Text(name, style="dim"), Text(plain(" ".join(text.split()), _SHOWN)))
        result.add_row("", "")
    return result
