"""The HTML page of a comparison of compressions at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.records import metric_title
from lowdim.report import sections
from lowdim.report.findings import items, mapping
from lowdim.report.frame import chart, record_document
from lowdim.report.opening import terms, verdict
from lowdim.report.pipeline import point_view
from lowdim.report.text import MISSING, duration, number, plain, rate, size

__all__ = ["render_families", "write_families"]

_HINT = (
    "Each point is a method at one budget: the mean over its seeds, and the bytes of its tensors in a file. Better is {better} "
    "and left. Filled markers are on the front: no other point beats them on both axes."
)


def render_families(record: Mapping[str, Any]) -> str:
    """The page of a comparison of compressions.

    Args:
        record: what `families.json` holds; entries that are missing or of another type are left out.

    Example:
        >>> run = {"method": "lord", "budget": "0.5x", "seed": 0, "score": 20.0, "size": 2**20}
        >>> "lord 0.5x" in render_families({"title": "Small", "metric": "perplexity", "runs": [run]})
        True
    """
    record = mapping(record)
    metric = metric_title(plain(record.get("metric"), 60) or "score")
    points = _points(record)
    levels = [mapping(level) for level in items(record.get("levels"))]
    higher = bool(record.get("higher_is_better"))
    section, details = sections.section, sections.details
    body = "".join(
        (
            _opening(record, levels),
            terms(_terms(record, metric)),
            _chart(points, metric, "high" if higher else "low"),
            section(
                "levels",
                "Budget by budget",
                _levels(levels, record),
                "The rule is that of lowdim compare.",
            ),
            section("methods", "Every run", _runs(record, metric)),
            section("the-data", "Data", sections.pairs(mapping(record.get("data")), skip=("columns",))),
            section(
                "circumstances",
                "Circumstances",
                details("Settings", sections.pairs(mapping(record.get("settings"))), opened=True)
                + details("Machine and versions", sections.pairs(mapping(record.get("environment")))),
            ),
        )
    )
    methods = list(dict.fromkeys(plain(point["method"], 40) for point in points))
    view = {
        "kind": "families",
        "title": plain(record.get("title"), 300),
        "metric": {"name": metric, "higher": higher, "decimals": 4},
        "costs": [{"key": "disk", "title": "Bytes on disk", "unit": "bytes"}],
        "methods": [
            point_view(point["label"], point, False, costs={"disk": point["bytes"]}, colour=methods.index(point["method"]))
            for point in points
        ],
    }
    title = plain(record.get("title"), 300) or "Compressions"
    return record_document(record, title, "lowdim compare --compress", body, view)


def write_families(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page to `path`; an old file is replaced only once the new one is complete.

    Raises:
        OSError: no space or no permission; an old file is unchanged.
    """
    return write_page(path, render_families(record))


def _points(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The dense model, and each method at each budget: means over its seeds."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in map(mapping, items(record.get("runs"))):
        if number(run.get("score")) is not None:
            found.setdefault((plain(run.get("method"), 40), plain(run.get("budget"), 40)), []).append(run)
    points = [
        {
            "method": method,
            "label": f"{method} {budget}".strip(),
            "score": _mean([number(run.get("score")) for run in runs]),
            "bytes": _mean([number(run.get("size")) for run in runs]),
        }
        for (method, budget), runs in found.items()
    ]
    dense = number(record.get("dense_score"))
    if dense is not None:
        points.insert(0, {"method": "dense", "label": "dense", "score": dense, "bytes": number(record.get("dense_bytes"))})
    return points


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _opening(record: Mapping[str, Any], levels: Sequence[Mapping[str, Any]]) -> str:
    said = [f"{plain(level.get('budget'), 40)}: {plain(level.get('headline'), 300)}" for level in levels]
    doubts = [plain(note) for note in items(record.get("notes"))[:50]]
    words = verdict(said[0] if said else "No run is finished yet.", said[1:], "", doubts)
    tiles = [("Dense model", size(number(record.get("dense_bytes"))), "")]
    figures = sections.tile_list(tiles, "The dense model")
    return f'<div class="opening"><div class="verdict">{words}</div><div class="pick">{figures}</div></div>'


def _terms(record: Mapping[str, Any], metric: str) -> list[tuple[str, str]]:
    settings, data = mapping(record.get("settings")), mapping(record.get("data"))
    dense = number(record.get("dense_score"))
    rows = [
        ("Model", plain(mapping(record.get("model")).get("label"), 80)),
        ("Data", plain(data.get("name"), 80)),
        ("Held-out rows", plain(data.get("test"), 20)),
        ("Tuning steps", plain(settings.get("steps"), 20)),
        ("Seeds", plain(settings.get("seeds"), 20)),
        (f"Dense {metric}", "" if dense is None else f"{dense:.4g}"),
    ]
    return [(name, value) for name, value in rows if value]


def _chart(points: Sequence[Mapping[str, Any]], metric: str, better: str) -> str:
    if len(points) < 2:
        return ""
    return chart("costs", f"What {metric} costs", _HINT.format(better=better), "scatter", "")


def _levels(levels: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str:
    rows = []
    for level in levels:
        means, halves = mapping(level.get("means")), mapping(level.get("half_widths"))
        leader = plain(level.get("leader"), 40)
        top = number(means.get(leader))
        ranked = sorted(means, key=lambda name: -(number(means[name]) or 0.0))
        may = {plain(name, 40) for name in items(level.get("may_be_best"))}
        for name in ranked:
            mean, half = number(means[name]), number(halves.get(name))
            behind = "" if mean is None or top is None or name == leader else f"{top - mean:.3g} ± {half or 0.0:.2g}"
            rows.append((plain(level.get("budget"), 40), name, behind, "may be best" if name in may else ""))
        rows += [
            (plain(level.get("budget"), 40), plain(name, 40), "", plain(why, 200))
            for name, why in mapping(level.get("not_judged")).items()
        ]
    unit = plain(record.get("judged"), 40)
    return sections.numbers(("Budget", "Method", f"Behind the best ({unit})", ""), rows, "Verdicts")


def _runs(record: Mapping[str, Any], metric: str) -> str:
    rows = []
    for run in map(mapping, items(record.get("runs"))[:1000]):
        score, before = number(run.get("score")), number(run.get("before"))
        rows.append(
            (
                plain(run.get("method"), 40),
                plain(run.get("budget"), 40) or MISSING,
                plain((number(run.get("seed")) or 0) + 1, 8).removesuffix(".0"),
                size(number(run.get("size")) or None),
                MISSING if before is None else f"{before:.4g}",
                plain(run.get("failure"), 200) or (MISSING if score is None else f"{score:.4g}"),
                rate(number(run.get("lr"))),
                duration(number(run.get("seconds"))),
            )
        )
    heads = ("Method", "Budget", "Seed", "On disk", f"{metric}, before tuning", "after", "Rate", "Took")
    return sections.numbers(heads, rows, "Every run")
