"""The HTML page: a record becomes sentences, tables and the JSON that the page's own script draws from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.report import cuts, evidence, measured, methods, sections, tree
from lowdim.report.frame import chart, costs_of, document, footer, method_view
from lowdim.report.losses import losses_section
from lowdim.report.opening import opening, terms
from lowdim.report.reading import read
from lowdim.report.record import Comparison
from lowdim.report.sentences import caveats, subtitle
from lowdim.report.text import date, plural

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
    section = sections.section
    body = "".join(
        (
            opening(record, caveats(record)),
            terms(subtitle(record)),
            section("methods", "All methods", _methods(record), methods.table_hint(record)),
            _costs(record),
            tree.tree_section(record),
            section("samples", "What the models wrote", evidence.samples(record), "Prompts of the test part."),
            section("classes", "By class", evidence.by_class(record)),
            section("smaller-sizes", "At smaller sizes", cuts.cut_table(record), cuts.HINT),
            _rates(record),
            measured.measured_section(record),
            losses_section(record),
            section("left-out", "Not compared", methods.left_out(record)),
            section("use", _use_title(record), sections.load(record.winner)),
            section("the-data", "Data", evidence.data_section(record.data)),
            section("circumstances", "Circumstances", _details(record)),
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


def _methods(record: Comparison) -> str:
    said = methods.forecast_sentence(record)
    rows = methods.method_table(record)
    return rows + (f'<p class="foot">{said}</p>' if said and rows else "") + methods.departed(record)


def _costs(record: Comparison) -> str:
    if len([c for c in record.ranked if any(costs_of(c).values())]) < 2:
        return ""
    better = "high and left" if record.higher else "low and left"
    hint = f"Better is {better}. Filled markers are on the front: no other method beats them on both axes."
    if record.judgement and record.noise_band:
        hint += " In the shaded band no score is shown to differ from the best."
    return chart("costs", f"What {record.metric} costs", hint, "scatter", "")


def _rates(record: Comparison) -> str:
    drawn = [c for c in record.finished if len(c.trials) > 1]
    if not drawn:
        return ""
    sized = any(trial.size is not None for c in drawn for trial in c.trials)
    rows = []
    for candidate in drawn:
        for trial in candidate.trials:
            chosen = trial.lr == candidate.lr and (candidate.size is None or trial.size == candidate.size)
            size = [str(trial.size) if trial.size is not None else "–"] if sized else []
            lr = measured.rate_cell(trial.lr, trial.origin)
            rows.append((candidate.label, lr, *size, record.score(trial.score), "chosen" if chosen else ""))
    heads = ("Method", "Learning rate", *(["Size"] if sized else []), f"Validation {record.metric}", "")
    lines = ", one line for each size" if sized else ""
    steps = {trial.steps for c in drawn for trial in c.trials if trial.steps is not None}
    when = f" after {plural(min(steps), 'step')}, the first rung" if record.search and len(steps) == 1 else ""
    hint = f"Validation {record.metric} of each rate{when}{lines}; the large marker was chosen. All panels share their axes."
    numbers = sections.details("Numbers", sections.numbers(heads, rows, "Numbers of the chart"))
    return chart("rates", "Learning rates", hint, "rates", numbers)


def _use_title(record: Comparison) -> str:
    return f"Use {record.chosen.label}" if record.chosen else "Use the winner"


def _details(record: Comparison) -> str:
    notes = "".join(f"<li>{sections.esc(note)}</li>" for note in record.notes)
    return "".join(
        (
            sections.details("Notes", f'<ul class="notes">{notes}</ul>' if notes else "", opened=True),
            sections.details("Settings", sections.pairs(record.settings)),
            sections.details("Model", sections.pairs(record.model)),
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
        "band": record.noise_band,
        "costs": [{"key": key, "title": title, "unit": unit} for key, title, unit in _COSTS],
        "methods": [method_view(c, marks[c.family], c is record.chosen, record.marked_as) for c in record.finished],
        "search": tree.tree_view(record),
    }
