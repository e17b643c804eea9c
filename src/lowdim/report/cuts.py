"""What embeddings score when they are cut to fewer layers and dimensions: of a comparison, and of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowdim.report.findings import items, mapping, whole
from lowdim.report.record import Comparison
from lowdim.report.sections import numbers
from lowdim.report.text import number

__all__ = ["HINT", "RUN_HINT", "cut_rows", "cut_table", "run_table", "scores_at"]

HINT = (
    "Scores on the test part, cut to the first layers × the first dimensions; the last column is the whole. Of the first seed; "
    "rows that were not trained to be cut show what cutting costs without it."
)
RUN_HINT = "Scores on the test part, cut to the first layers and the first dimensions, before and after training."
_MOST = 50  # sizes

#: (layers, dimensions) -> the score, and the score before training.
Scores = dict[tuple[int, int], tuple[float | None, float | None]]


def scores_at(value: Any) -> Scores:
    """The scores by size that a record holds; rows without a size are left out."""
    found: Scores = {}
    for row in map(mapping, items(value)[:_MOST]):
        layers, dimensions = whole(row.get("layers")), whole(row.get("dimensions"))
        if layers is not None and dimensions is not None:
            found[layers, dimensions] = number(row.get("score")), number(row.get("before"))
    return found


def cut_rows(record: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a row for each method with scores, the best first; no rows where there are none."""
    tables = [(candidate, scores_at(candidate.by_size)) for candidate in record.finished]
    sizes = sorted({size for _, scores in tables for size in scores})
    heads = ["Method", *(f"{layers} × {dimensions}" for layers, dimensions in sizes), "whole"]
    rows = []
    for candidate, scores in tables:
        if not scores:
            continue
        cells = [scores.get(size, (None, None))[0] for size in sizes]
        own = candidate.scores[0] if candidate.scores else candidate.mean
        rows.append([candidate.label, *map(_score, (*cells, own))])
    return heads, rows


def cut_table(record: Comparison) -> str:
    """The table of a comparison's page."""
    heads, rows = cut_rows(record)
    return numbers(heads, rows, "Scores at smaller sizes") if rows else ""


def run_table(run: Mapping[str, Any]) -> str:
    """The table of a run's page: before and after training."""
    scores = scores_at(run.get("by_size"))
    rows = [(str(layers), str(dim), _score(before), _score(after)) for (layers, dim), (after, before) in scores.items()]
    return numbers(("Layers", "Dimensions", "Before", "After"), rows, "Scores at smaller sizes") if rows else ""


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
