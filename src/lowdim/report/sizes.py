"""The HTML page of `lowdim sizes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.report.findings import items, mapping
from lowdim.report.frame import document, footer
from lowdim.report.line_chart import Line, line_chart
from lowdim.report.opening import terms, verdict
from lowdim.report.sections import numbers, section, tile_list
from lowdim.report.text import count, number, plain, ratio, size
from lowdim.version import __version__

__all__ = ["render_sizes", "write_sizes"]


def render_sizes(record: Mapping[str, Any]) -> str:
    """The page of a table of sizes.

    Args:
        record: `rows`, `model`, `metric`, `notes`, `pairs` of `SizeTable.to_dict()`; `smallest`, the row to take, and the
            `within` that chose it; `vectors`, for how many the index is counted; `beside`, the table of another model. What is
            missing is left out.

    Example:
        >>> row = {"layers": 6, "dim": 384, "quality": 0.8, "low": 0.78, "high": 0.82}
        >>> "6 layers and 384 dimensions" in render_sizes({"rows": [row], "metric": "spearman"})
        True
    """
    rows, metric, vectors = _rows(record), plain(record.get("metric"), 40) or "quality", number(record.get("vectors")) or 1e6
    other = mapping(record.get("beside"))
    chosen, full = mapping(record.get("smallest")), rows[-1] if rows else {}
    said = (
        f"{_words(chosen)} are enough."
        if chosen
        else "No size was measured."
        if not rows
        else f"The whole model has {_words(full)}."
    )
    reasons = []
    if chosen and full:
        reasons.append(
            f"The smallest size whose interval reaches the whole model's {metric} of {_number(full['quality'])} less "
            f"{_number(record.get('within'), 2)}: {_number(chosen.get('quality'))} ({_span(chosen)})."
        )
    doubts = [plain(note, 2000) for note in items(record.get("notes"))]
    opening = verdict(said, reasons, "", [f"{note[:1].upper()}{note[1:]}." for note in doubts if note])
    hint = f"An index of {count(vectors)} vectors in float32; milliseconds for one text on the cut model."
    body = "".join(
        (
            f'<div class="opening"><div class="verdict">{opening}</div>{_tiles(chosen, full, vectors)}</div>',
            terms([(name, value) for name, value in _terms(record, other) if value]),
            section(
                "quality",
                "Quality by dimensions",
                _chart(rows, _rows(other), metric),
                "With 95 % intervals over pairs; dashed: the model beside it.",
            ),
            section("sizes", "All sizes", _table(rows, _rows(other), metric, vectors), hint),
        )
    )
    view = {"kind": "table", "metric": {"name": metric}, "costs": [], "methods": []}
    return document("How small can the embedding be?", "lowdim sizes", body, footer(__version__, ""), view)


def write_sizes(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page to `path`; an old file is replaced only once the new one is complete."""
    return write_page(path, render_sizes(record))


def _rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that have layers, dimensions and a quality with its interval; the whole model last."""
    keys = ("layers", "dim", "quality", "low", "high")
    rows = [dict(mapping(row)) for row in items(record.get("rows"))]
    whole = [row for row in rows if all(number(row.get(key)) is not None for key in keys)]
    return sorted(whole, key=lambda row: (row["layers"], row["dim"]))


def _number(value: Any, digits: int = 3) -> str:
    found = number(value)
    return "" if found is None else f"{found:.{digits}f}".replace("-", "−")


def _pair(row: Mapping[str, Any]) -> str:
    return f"({plain(row.get('layers'), 20)}, {plain(row.get('dim'), 20)})"


def _words(row: Mapping[str, Any]) -> str:
    layers = plain(row.get("layers"), 20)
    return f"{layers} layer{'' if layers == '1' else 's'} and {plain(row.get('dim'), 20)} dimensions"


def _span(row: Mapping[str, Any]) -> str:
    return f"{_number(row.get('low'))} to {_number(row.get('high'))}"


def _terms(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Model", plain(record.get("name") or record.get("model"), 200)),
        ("Beside it", plain(other.get("name") or other.get("model"), 200)),
        ("Pairs", count(record.get("pairs")) if record.get("pairs") else ""),
        ("Data", plain(record.get("data"), 400)),
    ]


def _tiles(chosen: Mapping[str, Any], full: Mapping[str, Any], vectors: float) -> str:
    if not chosen:
        return ""

    def against(key: str) -> str:
        times = ratio(number(chosen.get(key)), number(full.get(key)))
        return f"{times} of the whole model" if times else ""

    ms = number(chosen.get("ms"))
    tiles = [
        ("layers, dimensions", _pair(chosen), f"of {_pair(full)}"),
        ("index", size((number(chosen.get("vector_bytes")) or 0) * vectors), against("vector_bytes")),
        ("model", size(chosen.get("model_bytes")), against("model_bytes")),
        ("time for a text", f"{ms:.2f} ms" if ms is not None else "", against("ms")),
    ]
    return f'<div class="pick">{tile_list(tiles, "Numbers of the smallest size")}</div>'


def _chart(rows: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], metric: str) -> str:
    dims = sorted({row["dim"] for row in (*rows, *other)})
    lines = []
    layers = sorted({row["layers"] for row in (*rows, *other)})
    for beside, table in ((False, rows), (True, other)):
        for layer in sorted({row["layers"] for row in table}):
            of = [row for row in table if row["layers"] == layer]
            columns = ([row[key] for row in of] for key in ("quality", "low", "high"))
            name = f"{layer} layer{'' if layer == 1 else 's'}{' beside' if beside else ''}"
            lines.append(
                Line(name, [dims.index(row["dim"]) for row in of], *columns, colour=layers.index(layer), beside=beside)
            )
    return line_chart(lines, [str(dim) for dim in dims], "dimensions", metric)


def _table(rows: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], metric: str, vectors: float) -> str:
    beside = {(row["layers"], row["dim"]): row for row in other}
    heads = [
        "(layers, dimensions)",
        metric,
        "95 % interval",
        "PCA",
        *(["beside"] if other else []),
        "model",
        "vector",
        "index",
        "ms",
    ]
    cells = []
    for row in rows:
        found = beside.get((row["layers"], row["dim"]), {})
        vector = number(row.get("vector_bytes"))
        cells.append(
            (
                _pair(row),
                _number(row["quality"]),
                _span(row),
                _number(row.get("pca")),
                *([_number(found.get("quality"))] if other else []),
                size(row.get("model_bytes")),
                size(vector),
                size(None if vector is None else vector * vectors),
                _number(row.get("ms"), 2),
            )
        )
    return numbers(heads, cells, "Quality, bytes and time by size")
