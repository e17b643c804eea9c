"""The HTML page of `lowdim index-check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.report.axis import Scale
from lowdim.report.findings import items, mapping
from lowdim.report.frame import document, footer
from lowdim.report.opening import terms, verdict
from lowdim.report.sections import numbers, section, tile_list
from lowdim.report.text import MISSING, count, esc, number, plain
from lowdim.version import __version__

__all__ = ["render_replacement", "replacement_sections", "replacement_sentence", "write_replacement"]

_SAID = {
    "stay": "The old index may stay.",
    "rebuild": "The index must be rebuilt.",
    "unclear": "It is not clear whether the index may stay.",
}
_MODELS = ("old", "new")


def render_replacement(record: Mapping[str, Any]) -> str:
    """The page of a report on two sets of embeddings.

    Args:
        record: `ReplacementReport.to_dict()`, with the names of the files in `old`, `new` and `labels`. What is missing is
            left out.

    Example:
        >>> page = render_replacement({"verdict": "stay", "reason": "nothing is lost", "items": 10})
        >>> "The old index may stay." in page
        True
    """
    said = _SAID.get(plain(record.get("verdict")), "No verdict.")
    reason = plain(record.get("reason"), 1000)
    doubts = (
        []
        if record.get("labels") or record.get("matrix")
        else ["There are no labels, so neighbours stand in for right answers."]
    )
    opening = verdict(said, [_sentence(reason)], _needed(record), doubts)
    body = "".join(
        (
            f'<div class="opening"><div class="verdict">{opening}</div>{_tiles(record)}</div>',
            terms(
                [
                    (name, plain(record.get(key)))
                    for name, key in (("Old", "old"), ("New", "new"), ("Labels", "labels"))
                    if record.get(key)
                ]
            ),
            replacement_sections(record),
        )
    )
    view = {"kind": "table", "metric": {"name": "accuracy"}, "costs": [], "methods": []}
    return document("May the index stay?", "lowdim index-check", body, footer(__version__, ""), view)


def replacement_sections(record: Mapping[str, Any]) -> str:
    """The tables and the drawing of a report, for its own page and for that of a run."""
    return "".join(
        (
            section(
                "matrix",
                "Who finds what",
                _matrix(record),
                "Share of queries whose class is found, by the model that asks and the model of the gallery.",
            ),
            section(
                "gap",
                "What the replacement costs",
                _gap(record),
                "New queries in the old gallery, less old queries there, with a 95 % interval over queries.",
            ),
            section("classes", "By class", _classes(record), "Classes that lose most come first."),
            section(
                "inequalities",
                "Inequalities of compatible representations",
                _inequalities(record),
                "Shares of pairs of items; models that were begun anew rarely satisfy the first.",
            ),
        )
    )


def replacement_sentence(record: Mapping[str, Any]) -> str:
    """The verdict and its reason."""
    reason = plain(record.get("reason"), 1000)
    return " ".join(part for part in (_SAID.get(plain(record.get("verdict")), ""), _sentence(reason)) if part)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "." if words else ""


def write_replacement(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page to `path`; an old file is replaced only once the new one is complete."""
    return write_page(path, render_replacement(record))


def _share(value: Any, digits: int = 3) -> str:
    found = number(value)
    return MISSING if found is None else f"{found:.{digits}f}".replace("-", "−")


def _needed(record: Mapping[str, Any]) -> str:
    if record.get("verdict") != "unclear":
        return ""
    return (
        "More items that ask narrow the interval."
        if record.get("gap") is not None
        else "Labels for a part of the items would decide it."
    )


def _tiles(record: Mapping[str, Any]) -> str:
    tiles = [
        ("change of accuracy", _share(record.get("gap")), _interval(record)),
        ("average accuracy", _share(record.get("average_accuracy")), "of both self-tests and new on old"),
        (
            "average compatibility",
            _share(record.get("average_compatibility"), 0),
            "1: new queries do better in the old gallery",
        ),
        (f"overlap at {plain(record.get('k'))}", _share(record.get("overlap_at_k")), "neighbours found in the old index too"),
        ("self match", _share(record.get("self_match")), "new vectors that find their own old one first"),
        (
            "items",
            count(record.get("items")),
            f"{plain(record.get('old_size'))} and {plain(record.get('new_size'))} dimensions",
        ),
    ]
    return f'<div class="pick">{tile_list(tiles, "Numbers of the replacement")}</div>'


def _interval(record: Mapping[str, Any]) -> str:
    low, high = _share(record.get("low")), _share(record.get("high"))
    return "" if MISSING in (low, high) else f"{low} to {high}"


def _matrix(record: Mapping[str, Any]) -> str:
    rows = [items(row) for row in items(record.get("matrix"))]
    cells = [(f"{name} model asks", *(_share(value) for value in row)) for name, row in zip(_MODELS, rows)]
    return numbers(("", "old gallery", "new gallery"), cells, "Cross-test matrix")


def _gap(record: Mapping[str, Any]) -> str:
    gap, low, high = (number(record.get(key)) for key in ("gap", "low", "high"))
    if gap is None or low is None or high is None:
        return ""
    reach = max(abs(low), abs(high), abs(gap), 0.02) * 1.1
    scale = Scale.over(-reach, reach, (-0.01, reach), 0.0)
    if scale is None:
        return ""
    row = scale.row(gap, (low, high), colour="c0", filled=True)
    return f'<div class="drawn">{scale.head()}{row}<p class="foot">Shaded: at most 0.01 is lost.</p></div>'


def _classes(record: Mapping[str, Any]) -> str:
    keys = ("queries", "old_old", "new_old", "new_new", "loss")
    rows = [mapping(row) for row in items(record.get("per_class"))][:1000]
    cells = [
        (plain(row.get("label"), 80), count(row.get("queries")), *(_share(row.get(key)) for key in keys[1:])) for row in rows
    ]
    return numbers(("class", "queries", "old on old", "new on old", "new on new", "loss"), cells, "Accuracy by class")


def _inequalities(record: Mapping[str, Any]) -> str:
    shares = items(record.get("inequalities"))
    if not any(number(share) is not None for share in shares):
        return ""
    pairs = ("one class: the new vector is no farther than the old one", "two classes: it is no nearer")
    rows = [(name, _share(share)) for name, share in zip(pairs, shares)]
    return numbers(("pairs of", "share"), rows, esc("Inequalities"))
