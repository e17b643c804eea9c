"""The search tree: the data that the script draws, and the same as a table."""

from __future__ import annotations

from typing import Any

from lowdim.records import VisitRecord
from lowdim.report import sections
from lowdim.report.frame import chart
from lowdim.report.measured import rate_cell
from lowdim.report.record import Comparison
from lowdim.report.text import percent, plural

__all__ = ["tree_section", "tree_view"]

#: A candidate: method, size and rate.
Key = tuple[str, int | None, float]


def tree_section(comparison: Comparison) -> str:
    """The chart with its table; an empty string where nothing was searched over more than one rung."""
    paths, search = _paths(comparison), comparison.search
    if search is None or len(_rungs(comparison)) < 2:
        return ""
    hint = "Each line is a candidate, a method with one size and one learning rate. It ends where the candidate left."
    if search.exhaustive_steps > search.steps > 0:
        hint += (
            f" The search trained {search.steps:,} steps, {percent(search.steps / search.exhaustive_steps)} of what training "
        )
        hint += "every candidate to its end takes."
    rows = []
    for (method, size, lr), visits in paths.items():
        last = visits[-1]
        end = "went to the end" if last.goes_on else f"left after {plural(last.steps, 'step')}"
        label = _labels(comparison).get(method, method)
        shown = "–" if size is None else str(size)
        why = last.reason or ("" if last.goes_on else "–")
        rows.append((label, shown, rate_cell(lr, last.origin), end, comparison.score(last.score), why))
    heads = ("Method", "Size", "Learning rate", "End", f"Last validation {comparison.metric}", "Why")
    numbers = sections.details(
        f"All {plural(len(rows), 'candidate')}", sections.numbers(heads, rows, "Candidates of the search")
    )
    return chart("search", "The search", hint, "tree", numbers)


def tree_view(comparison: Comparison) -> dict[str, Any] | None:
    """Rungs, and by method the candidates with their visits; methods that came furthest first."""
    if comparison.search is None:
        return None
    order = {c.name: i for i, c in enumerate(comparison.candidates)}
    colours = {c.name: c.colour for c in comparison.candidates}
    chosen = comparison.chosen
    lanes: dict[str, list[dict[str, Any]]] = {}
    for (method, size, lr), visits in _paths(comparison).items():
        picked = chosen is not None and (method, lr) == (chosen.name, chosen.lr) and chosen.size in (None, size)
        lanes.setdefault(method, []).append(
            {
                "size": size,
                "lr": lr,
                "chosen": picked,
                "visits": [[v.rung, v.score] for v in visits],
                "on": visits[-1].goes_on,
                "reason": visits[-1].reason,
                "origin": visits[-1].origin,
            }
        )
    reach = {name: max(path["visits"][-1][0] for path in paths) for name, paths in lanes.items()}
    names = sorted(lanes, key=lambda name: (-reach[name], order.get(name, len(order))))
    return {
        "rungs": _rungs(comparison),
        "lanes": [
            {"name": n, "label": _labels(comparison).get(n, n), "colour": colours.get(n, "c0"),
             "paths": sorted(lanes[n], key=lambda p: (-p["visits"][-1][0], not p["on"]))} for n in names
        ],
    }  # fmt: skip


def _labels(comparison: Comparison) -> dict[str, str]:
    return {c.name: c.label for c in comparison.candidates}


def _paths(comparison: Comparison) -> dict[Key, list[VisitRecord]]:
    """The visits of each candidate in the order of the rungs."""
    paths: dict[Key, dict[int, VisitRecord]] = {}
    for visit in comparison.search.visits if comparison.search else ():
        paths.setdefault((visit.method, visit.size, visit.lr), {})[visit.rung] = visit
    return {key: [visits[rung] for rung in sorted(visits)] for key, visits in paths.items()}


def _rungs(comparison: Comparison) -> list[dict[str, int]]:
    """Each rung with its steps and how many candidates reached it."""
    found: dict[int, dict[str, int]] = {}
    for visits in _paths(comparison).values():
        for visit in visits:
            rung = found.setdefault(visit.rung, {"rung": visit.rung, "steps": visit.steps, "count": 0})
            rung["count"] += 1
    return [found[rung] for rung in sorted(found)]
