"""The HTML page: a record becomes sentences, tables and the JSON that the page's own script draws from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.report import sections
from lowdim.report.frame import answer, chart, costs_of, document, footer, method_view, trust
from lowdim.report.record import Comparison, read
from lowdim.report.sentences import caveats, headline, subtitle
from lowdim.report.text import date, esc, rate

__all__ = ["render", "write"]

_COSTS = (
    ("memory", "Peak memory", "bytes"),
    ("time", "Time per step", "seconds"),
    ("parameters", "Trained parameters", "count"),
    ("file", "File size", "bytes"),
)


def render(comparison: Mapping[str, Any]) -> str:
    """The page of a comparison.

    It loads nothing: its policy forbids every request, and its one script and one style sheet are allowed by their hash,
    so text in the record can never run.

    Args:
        comparison: the record that `lowdim compare` writes. Entries that are missing, None or of another type are
            left out of the page; no record makes this raise.

    Returns:
        One HTML document. Loss curves are thinned to at most 600 points each, so that it stays below 3 MB.

    Example:
        >>> page = render({"title": "LoRA or not", "methods": [{"name": "lora", "mean": 0.8, "scores": [0.8]}]})
        >>> "<h1>LoRA or not</h1>" in page
        True
    """
    record = read(comparison)
    verdict, rest = headline(record)
    body = "".join(
        (
            answer(verdict, rest),
            sections.key_figures(record),
            _terms(subtitle(record)),
            trust(caveats(record)),
            sections.section("methods", "All methods", sections.method_table(record), _TABLE_HINT),
            _costs(record),
            _losses(record),
            _rates(record),
            sections.section("left-out", "Not compared", sections.left_out(record)),
            sections.section("use", _use_title(record), sections.load(record)),
            sections.section("circumstances", "Circumstances", _details(record)),
        )
    )
    made = " · ".join(part for part in ("lowdim compare", date(record.created)) if part)
    return document(record.title, made, body, footer(record.version, record.command), _view(record))


def write(comparison: Mapping[str, Any], path: str | Path) -> Path:
    """Write the comparison's page to `path`; an old file is replaced only once the new one is complete.

    Args:
        comparison: as for `render`.
        path: the HTML file; missing parent folders are created.

    Returns:
        The path.

    Raises:
        OSError: no space or no permission; an old file is unchanged.
    """
    return write_page(path, render(comparison))


_TABLE_HINT = (
    "Best first; click a column’s name to sort by it. ≈ marks scores within noise of the best, ★ the Pareto front of score "
    "and memory, and the band behind the intervals is the best method’s."
)


def _terms(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{esc(term)}</dt><dd>{esc(value)}</dd></div>" for term, value in rows)
    return f'<dl class="terms">{cells}</dl>' if cells else ""


def _costs(record: Comparison) -> str:
    if len([c for c in record.ranked if any(costs_of(c).values())]) < 2:
        return ""
    better = "high and left" if record.higher else "low and left"
    hint = f"Better is {better}. Filled markers are on the front: no other method beats them on both axes. "
    hint += "Bars are 95 % intervals."
    return chart("costs", f"What {record.metric} costs", hint, "scatter", "")


def _losses(record: Comparison) -> str:
    drawn = [c for c in record.finished if c.curves]
    if not drawn:
        return ""
    rows = []
    for candidate in drawn:
        first = [v for v in (line.loss[0] for line in candidate.curves) if v is not None]
        last = [v for v in (line.loss[-1] for line in candidate.curves) if v is not None]
        ends = [f"{sum(part) / len(part):.4g}" if part else "–" for part in (first, last)]
        rows.append((candidate.label, str(len(candidate.curves)), *ends))
    table = _numbers(("Method", "Seeds", "First loss", "Last loss"), rows)
    hint = "Mean over seeds; the band of a highlighted method spans its seeds. Choose methods in the legend."
    return chart("losses", "Training loss", hint, "curves", sections.details("Numbers", table))


def _rates(record: Comparison) -> str:
    drawn = [c for c in record.finished if len(c.trials) > 1]
    if not drawn:
        return ""
    rows = [
        (candidate.label, rate(trial.lr), record.score(trial.score), "chosen" if trial.lr == candidate.lr else "")
        for candidate in drawn
        for trial in candidate.trials
    ]
    table = _numbers(("Method", "Learning rate", f"Trial {record.metric}", ""), rows)
    hint = "One trial for each learning rate; the large marker is the rate that was chosen. All panels share their axes."
    return chart("rates", "Learning rates", hint, "rates", sections.details("Numbers", table))


def _numbers(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in heads)
    body = "".join(f'<tr><th scope="row">{esc(r[0])}</th>{"".join(f"<td>{esc(c)}</td>" for c in r[1:])}</tr>' for r in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers of the chart">'
        f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _use_title(record: Comparison) -> str:
    return f"Use {record.chosen.label}" if record.chosen else "Use the winner"


def _details(record: Comparison) -> str:
    data = {key: value for key, value in record.data.items() if key != "notes"}
    data["notes"] = record.data.get("notes")
    notes = "".join(f"<li>{esc(note)}</li>" for note in record.notes)
    return "".join(
        (
            sections.details("Notes", f'<ul class="notes">{notes}</ul>' if notes else "", opened=True),
            sections.details("Settings", sections.pairs(record.settings)),
            sections.details("Model and data", sections.pairs(record.model) + sections.pairs(data)),
            sections.details("Machine and versions", sections.pairs(record.environment)),
        )
    )


def _view(record: Comparison) -> dict[str, Any]:
    """The data that the script draws: numbers of the record, with the style of each method."""
    marks = sections.shapes(record.candidates)
    return {
        "kind": "comparison",
        "title": record.title,
        "metric": {"name": record.metric, "higher": record.higher, "decimals": record.decimals},
        "budget": record.budget,
        "costs": [{"key": key, "title": title, "unit": unit} for key, title, unit in _COSTS],
        "methods": [method_view(c, marks[c.family], c is record.chosen) for c in record.finished],
    }
