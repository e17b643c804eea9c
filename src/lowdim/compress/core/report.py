"""The report of a compression, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from lowdim.compress.core.narrow import below_head_dim
from lowdim.errors import listed
from lowdim.results import Result

__all__ = ["CompressedLayer", "CompressionReport", "attach_report", "last_report"]


@dataclass(frozen=True)
class CompressedLayer:
    """The result for one layer.

    Attributes:
        rank: of its factors; None without factors.
        relative_error: in the norm that the system minimises; 0 for a layer left dense, NaN where it depends on the input.
        before, after: its number of parameters (or what `counted` of the report says).
        note: why it was left dense.
        what: a short description of the new layer: "rank 12", "2:4", "90 % sparse"; empty for a layer left dense.
        replaced: whether the layer was replaced.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    relative_error: float
    before: int
    after: int
    note: str = ""
    what: str = ""
    replaced: bool = False


@dataclass(frozen=True)
class CompressionReport(Result):
    """The result of compressing a model, layer by layer in model order. `str(report)` is a table."""

    system: str
    layers: tuple[CompressedLayer, ...]
    details: dict[str, Any] = field(default_factory=dict)
    counted: str = "parameters"  # what `before` and `after` count

    @property
    def replaced(self) -> tuple[CompressedLayer, ...]:
        """The layers that were replaced."""
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def left_dense(self) -> tuple[CompressedLayer, ...]:
        """The layers that were selected but not replaced."""
        return tuple(layer for layer in self.layers if not layer.replaced)

    @property
    def before(self) -> int:
        """Parameters of the selected layers before."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Parameters of the selected layers after."""
        return sum(layer.after for layer in self.layers)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to look at: key and value projections of grouped-query attention whose rank is below the size of a head."""
        narrow = self.details.get("below_head_dim", {})
        if not narrow:
            return ()
        shown = listed((f"{name} ({rank})" for name, rank in narrow.items()), 120)
        return (
            f"{len(narrow)} key or value projections of grouped-query attention have a rank below the size of a head, which "
            f"costs more than elsewhere: {shown}. Leave them dense, or keep more of them",
        )

    @property
    def summary(self) -> str:
        """One line."""
        worst = max((layer.relative_error for layer in self.replaced), default=math.nan)
        loss = "" if math.isnan(worst) else f"; largest relative error {worst:.3g}"
        return (
            f"{self.system}: {len(self.replaced)} layers replaced, {len(self.left_dense)} left dense; "
            f"{self.before:,} -> {self.after:,} {self.counted} in them{loss}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields and the totals, as strict JSON."""
        totals = {
            "replaced": len(self.replaced),
            "left_dense": len(self.left_dense),
            "before": self.before,
            "after": self.after,
        }
        return {**super().to_dict(), **totals}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [vars(layer).copy() for layer in self.layers]

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [self.summary]
        for layer in self.layers:
            size = f"{layer.out_features}x{layer.in_features}"
            error = "" if math.isnan(layer.relative_error) else f", relative error {layer.relative_error:.4f}"
            what = f"{layer.what}{error}" if layer.replaced else layer.note
            lines.append(f"  {layer.name:{width}}  {size:>11}  {what}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def attach_report(model: nn.Module, report: CompressionReport) -> None:
    """Store the report with the model, where `last_report` finds it.

    Ranks of key and value projections that are below the size of a head are added to its details (`below_head_dim`).
    """
    narrow = below_head_dim(model, {row.name: row.rank for row in report.replaced if row.rank is not None})
    if narrow:
        report.details["below_head_dim"] = narrow
    cast(Any, model).lowdim_report = report


def last_report(model: nn.Module) -> CompressionReport:
    """The report of the last compression of this model; copies of the model have it too.

    Raises:
        ValueError: the model was not compressed by lowdim, or has been loaded from files since.
    """
    report = getattr(model, "lowdim_report", None)
    if not isinstance(report, CompressionReport):
        raise ValueError(
            f"{type(model).__name__} has no compression report: lowdim.compress makes it, and files do not store it"
        )
    return report
