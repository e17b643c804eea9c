"""The comparison's table for the terminal: the page's columns, fewer of them where the terminal is narrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lowdim.report.record import Candidate, Comparison, read
from lowdim.report.text import count, duration, error, plain, size

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["table"]

Side = Literal["left", "right", "center"]


def table(comparison: Mapping[str, Any], width: int | None = None) -> Table:
    """The comparison as a table for `rich.console.Console.print`.

    Args:
        comparison: the record that `lowdim compare` writes, as for `lowdim.report.render`.
        width: columns of the terminal; None uses the width that rich finds (80 without a terminal). All of the table's
            columns fit 100; below 96 the forecast and the file size are left out, below 72 the interval and the trained
            parameters too.

    Returns:
        The table; best method first, then those skipped or failed, with the reasons below.

    Example:
        >>> record = {"methods": [{"name": "lora", "mean": 0.8, "interval": [0.7, 0.9]}]}
        >>> [str(column.header) for column in table(record, width=60).columns]
        ['Method', 'score', 'Peak', 'Step', '★']
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    record = read(comparison)
    width = Console().width if width is None else width
    wide, narrow = width >= 96, width < 72
    result: Table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left", caption_justify="left"
    )
    if record.title != "Comparison":
        result.title = Text(record.title)
    columns: list[tuple[str, bool, Side]] = [
        ("Method", True, "left"),
        (record.metric, True, "right"),
        ("95 % interval", not narrow, "left"),
        ("Trained", not narrow, "right"),
        ("Peak", True, "right"),
        ("Forecast", wide, "right"),
        ("Step", True, "right"),
        ("File", wide, "right"),
        ("★", True, "center"),
    ]
    keep = [shown for _, shown, _ in columns]
    rows = [[cell for cell, shown in zip(_cells(record, c), keep) if shown] for c in record.candidates]
    heads = [Text(name) for name, shown, _ in columns if shown]
    widths = [max(cell.cell_len for cell in column) for column in zip(heads, *rows)]
    # Only names are shortened: a truncated number would be wrong. Two blanks follow each column.
    widths[0] = max(8, min(widths[0], width - sum(widths[1:]) - 2 * len(widths)))
    sides: list[Side] = [side for _, shown, side in columns if shown]
    for head, size_, side in zip(heads, widths, sides):
        result.add_column(head, justify=side, no_wrap=True, overflow="ellipsis", min_width=size_, max_width=size_)
    for candidate, row in zip(record.candidates, rows):
        result.add_row(*row, style="bold" if candidate is record.chosen else "" if candidate.ok else "dim")
    result.caption = _caption(record)
    return result


def _cells(record: Comparison, candidate: Candidate) -> list[Text]:
    from rich.text import Text

    mark = "→ " if candidate is record.chosen else "≈ " if candidate.within_noise and candidate is not record.best else "  "
    name = Text(f"{mark}{plain(candidate.label, 80)}", overflow="ellipsis", no_wrap=True)
    if not candidate.ok:
        score = Text("skipped" if candidate.status == "skipped" else "failed")
        forecast = size(candidate.forecast_peak_bytes) if candidate.forecast_peak_bytes is not None else ""
        return [name, score, *(Text("") for _ in range(3)), Text(forecast), *(Text("") for _ in range(3))]
    off = error(candidate.forecast_peak_bytes, candidate.measured_peak_bytes)
    forecast = size(candidate.forecast_peak_bytes) + (f" {off.replace(' ', '')}" if off else "")
    return [
        name,
        Text(record.score(candidate.mean)),
        Text(record.interval(candidate)),
        Text(count(candidate.trained_parameters)),
        Text(size(candidate.measured_peak_bytes)),
        Text(forecast),
        Text(duration(candidate.seconds_per_step)),
        Text(size(candidate.file_bytes)),
        Text("★" if candidate.pareto else ""),
    ]


def _caption(record: Comparison) -> Text | None:
    """The meaning of the marks, and why methods are missing."""
    from rich.text import Text

    lines = []
    marks = [("→ the pick", record.chosen is not None)]
    marks.append(("≈ within noise of the best", any(c.within_noise and c is not record.best for c in record.candidates)))
    marks.append(("★ on the Pareto front", any(c.pareto for c in record.candidates)))
    if any(shown for _, shown in marks):
        lines.append(" · ".join(text for text, shown in marks if shown))
    for candidate in record.left_out:
        kind = "skipped" if candidate.status == "skipped" else "failed"
        reason = next(iter(plain(candidate.reason, 300).strip().splitlines()), "no reason recorded")
        lines.append(f"{candidate.label} {kind}: {reason}")
    return Text("\n".join(lines)) if lines else None
