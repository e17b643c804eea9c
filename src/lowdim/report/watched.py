"""What a run watched while it trained, as tables: scores, and numbers about subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowdim.report import sections
from lowdim.report.findings import items, mapping
from lowdim.report.text import number, plain

__all__ = ["scores", "subspaces"]

#: The numbers about subspaces in a run's log, as (key, heading), and the number of steps shown.
_SEEN = (
    ("true_grad_norm", "Gradient norm"),
    ("projected_norm", "Projected norm"),
    ("captured", "Share captured"),
    ("overlap", "Overlap with the last subspaces"),
)
_SHOWN = 12


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


def _some(rows: list[Any]) -> list[Any]:
    """A limited number of rows, evenly spaced, including the first and the last."""
    if len(rows) <= _SHOWN:
        return rows
    return [rows[round(i * (len(rows) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
