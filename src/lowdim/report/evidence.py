"""What stands behind the scores: samples of what models wrote, scores by class, and the data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowdim.records import SampleRecord
from lowdim.report.findings import Class, items, mapping
from lowdim.report.record import Candidate, Comparison
from lowdim.report.sections import details, numbers, pairs
from lowdim.report.text import esc, number, plain, plural, series

__all__ = ["by_class", "class_table", "data_section", "sample_list", "samples"]

_OPEN = 2  # samples that are not folded away
_UNTOUCHED = "untouched"


def samples(comparison: Comparison) -> str:
    """What the untouched model and each finalist wrote."""
    labels = {c.name: c.label for c in comparison.candidates} | {_UNTOUCHED: "Untouched model"}
    chosen = comparison.chosen
    first = [_UNTOUCHED, *([chosen.name] if chosen else [])]
    return sample_list(comparison.samples, labels, first)


def sample_list(found: Sequence[SampleRecord], labels: Mapping[str, str], first: Sequence[str]) -> str:
    """Samples as a list; the first few are open, the others folded away."""
    entries = [_sample(index, sample, labels, first) for index, sample in enumerate(found, 1)]
    if not entries:
        return ""
    rest = "".join(entries[_OPEN:])
    return "".join(entries[:_OPEN]) + details(f"{plural(len(entries) - _OPEN, 'more sample')}", rest)


def _sample(index: int, sample: SampleRecord, labels: Mapping[str, str], first: Sequence[str]) -> str:
    names = sorted(sample.answers, key=lambda name: first.index(name) if name in first else len(first))
    answers = "".join(_said(labels.get(name, name), sample.answers[name], "answer") for name in names)
    asked = _said("Prompt", sample.prompt, "prompt") + (
        _said("Expected", sample.expected, "expected") if sample.expected else ""
    )
    return f'<article class="sample" aria-label="Sample {index}"><dl>{asked}</dl><dl>{answers}</dl></article>'


def _said(name: str, text: str, kind: str) -> str:
    shown = esc(re.sub(r"\n\s*\n\s*\n", "\n\n", text.strip("\n")), 4000)  # blank lines in a row as one
    return f'<div class="{kind}"><dt>{esc(name)}</dt><dd>{shown or "<i>nothing</i>"}</dd></div>'


def by_class(comparison: Comparison) -> str:
    """The pick's scores by class next to those of a baseline, folded away."""
    row = next((c for c in (comparison.chosen, *comparison.ranked) if c is not None and c.classes), None)
    if row is None:
        return ""
    others = [
        c for c in (*comparison.references, *comparison.ranked) if c.classes and c is not row and (c.trivial or c.baseline)
    ]
    other: Candidate | None = next(iter(others), None)
    title = f"{row.label}, class by class" + (f", against {other.label}" if other else "")
    return details(title, class_table(row.classes, other.classes if other else [], other.label if other else ""))


def class_table(rows: Sequence[Class], against: Sequence[Class] = (), label: str = "") -> str:
    """Precision, recall and F1 of each class, the F1 of another model beside it."""
    other = {c.name: c for c in against}
    heads = ["Class", "Rows", "Precision", "Recall", "F1", *([f"F1 of {label}"] if other else [])]
    cells = []
    for row in rows:
        extra = [_share(other[row.name].f1 if row.name in other else None)] if other else []
        amount = f"{row.count:,}" if row.count is not None else "–"
        cells.append([row.name, amount, _share(row.precision), _share(row.recall), _share(row.f1), *extra])
    return numbers(heads, cells, "Scores by class")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def data_section(data: Mapping[str, Any]) -> str:
    """The columns that were used and those that were not, one example as the model sees it, and remarks."""
    columns = [_columns(mapping(entry)) for entry in items(data.get("columns"))[:50]]
    example = plain(data.get("example"), 4000).strip()
    notes = "".join(f"<li>{esc(note)}</li>" for note in items(data.get("notes"))[:200] if note is not None)
    parts = [f"<p>{line}</p>" for line in columns if line]
    if example:
        caption = "<figcaption>One example as the model sees it</figcaption>"
        parts.append(f'<figure class="example">{caption}<pre>{esc(example, 4000)}</pre></figure>')
    if notes:
        parts.append(f'<ul class="notes">{notes}</ul>')
    rest = pairs(data, skip=("columns", "example", "notes", "baseline"))
    return "".join(parts) + details("Everything that is recorded of the data", rest) if parts or rest else ""


def _columns(entry: Mapping[str, Any]) -> str:
    """`reviews.csv: text is column text, label is column label. Not used: id, date.`, as HTML."""
    used = []
    for role, value in list(entry.items())[:30]:
        names = [plain(v, 120) for v in (items(value) or [value]) if v is not None and number(v) is None]
        if role not in ("source", "unused") and any(names):
            columns = series([f"<code>{esc(name)}</code>" for name in names])
            used.append(f"{esc(str(role).replace('_', ' '), 60)} {columns}")
    unused = [f"<code>{esc(name, 120)}</code>" for name in items(entry.get("unused"))[:100] if name is not None]
    source = f"<b>{esc(entry.get('source'), 200)}</b>: " if entry.get("source") else ""
    if not used and not unused:
        return ""
    rest = f"Not used: {', '.join(unused)}." if unused else "Every column is used."
    return f"{source}{', '.join(used) or 'no column is used'}. {rest}"
