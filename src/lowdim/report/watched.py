"""What a run watched while it trained: scores and numbers about subspaces as tables, its layers as charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowdim.report import sections
from lowdim.report.findings import items, mapping
from lowdim.report.line_chart import Line, line_chart
from lowdim.report.text import number, plain

__all__ = ["layers", "scores", "subspaces"]

#: The numbers about subspaces in a run's log, as (key, heading), and the number of steps shown.
_SEEN = (
    ("true_grad_norm", "Gradient norm"),
    ("projected_norm", "Projected norm"),
    ("captured", "Share captured"),
    ("overlap", "Overlap with the last subspaces"),
)
_SHOWN = 12
#: The numbers of watched layers, as (key, what the axis says, heading, digits).
_LAYERS = (
    ("alpha", "alpha", "Tail exponent alpha", ".3f"),
    ("intruders", "intruders", "Intruder dimensions", ".2f"),
    ("overlap", "overlap", "Overlap with the start", ".3f"),
)


def scores(run: Mapping[str, Any]) -> str:
    """The loss of the validation part during training."""
    rows = [items(row) for row in items(run.get("evaluations"))]
    known = [(number(r[0]), number(r[1])) for r in rows if len(r) == 2]
    cells = [[f"{step:.0f}", f"{loss:.4f}"] for step, loss in known if step is not None and loss is not None]
    return sections.numbers(["Step", "Validation loss, nats per token"], _some(cells), "Numbers by step")


def subspaces(run: Mapping[str, Any]) -> str:
    """The log of a projected optimizer."""
    rows = [mapping(row) for row in items(run.get("subspaces"))]
    keys = [(key, head) for key, head in _SEEN if any(number(row.get(key)) is not None for row in rows)]
    cells = []
    for row in _some(rows):
        values = [number(row.get(key)) for key, _ in keys]
        cells.append([plain(row.get("step"), 20), *("" if v is None else f"{v:.4g}" for v in values)])
    return sections.numbers(["Step", *(head for _, head in keys)], cells, "Numbers by step") if keys else ""


def layers(run: Mapping[str, Any]) -> str:
    """Charts of the means over the layers and of their ranges, the numbers, and a table by layer."""
    watch = mapping(run.get("watch"))
    rows = [row for row in map(mapping, items(watch.get("rows"))) if number(row.get("step")) is not None]
    if not rows:
        return ""
    shown = _some(rows)
    charts = "".join(_chart(shown, key, up) for key, up, _, _ in _LAYERS)
    charts = f'<div class="side-by-side">{charts}</div>'
    cells = [[f"{number(row['step']):.0f}", *(_with_range(row, key, digits) for key, _, _, digits in _LAYERS)] for row in shown]
    heads = ["Step", *(head for _, _, head, _ in _LAYERS)]
    table = sections.numbers(heads, cells, "Means over the layers, with the smallest and largest")
    return charts + table + sections.details("By layer", _by_layer(rows)) + _unmeasured(watch)


def _chart(rows: list[Any], key: str, up: str) -> str:
    """One of the numbers over the steps: the mean, and whiskers from the smallest layer to the largest."""
    places = [i for i, row in enumerate(rows) if number(row.get(key)) is not None and _of_layers(row, key)]
    of = [_of_layers(rows[i], key) for i in places]
    means = [number(rows[i][key]) or 0.0 for i in places]
    line = Line("mean", places, means, list(map(min, of)), list(map(max, of)))
    return line_chart([line] if places else [], [f"{number(row['step']):.0f}" for row in rows], "step", up)


def _of_layers(row: Mapping[str, Any], key: str) -> list[float]:
    found = (number(mapping(layer).get(key)) for layer in mapping(row.get("layers")).values())
    return [value for value in found if value is not None]


def _with_range(row: Mapping[str, Any], key: str, digits: str) -> str:
    mean, of = number(row.get(key)), _of_layers(row, key)
    if mean is None:
        return ""
    return f"{mean:{digits}}" + (f" ({min(of):.3g} to {max(of):.3g})" if of else "")


def _by_layer(rows: list[Any]) -> str:
    first, last = (mapping(row.get("layers")) for row in (rows[0], rows[-1]))
    cells = []
    for name in list(last)[:1000]:
        before, after = mapping(first.get(name)), mapping(last[name])
        values = [(number(before.get("alpha")), ".3f")]
        values += [(number(after.get(key)), ".0f" if key == "intruders" else digits) for key, _, _, digits in _LAYERS]
        cells.append([plain(name, 200), *("" if value is None else f"{value:{digits}}" for value, digits in values)])
    heads = ["Layer", "Alpha at the start", "Alpha", "Intruder dimensions", "Overlap"]
    return sections.numbers(heads, cells, "The last measurement by layer")


def _unmeasured(watch: Mapping[str, Any]) -> str:
    return sections.details("Not measured", sections.pairs(mapping(watch.get("not_measured"))))


def _some(rows: list[Any]) -> list[Any]:
    """A limited number of rows, evenly spaced, including the first and the last."""
    if len(rows) <= _SHOWN:
        return rows
    return [rows[round(i * (len(rows) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
