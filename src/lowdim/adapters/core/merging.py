"""The report of a merge, and the plain layer that replaces an adapted one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.results import Result
from lowdim.surgery import weight_matrix

__all__ = ["LayerChange", "MergeReport", "merged_layer"]


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer: `‖ΔW‖_F / ‖W₀‖_F`, and the largest error of rounding once to the weight's dtype."""

    layer: str
    relative_change: float
    largest_change: float
    rounding_error: float


@dataclass(frozen=True)
class MergeReport(Result):
    """The layers that a merge changed, and which tied weights it had to separate."""

    layers: tuple[LayerChange, ...]
    untied: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [vars(change).copy() for change in self.layers]

    @property
    def summary(self) -> str:
        """One line."""
        largest = max((change.relative_change for change in self.layers), default=0.0)
        untied = f"; untied: {', '.join(self.untied)}" if self.untied else ""
        return f"{len(self.layers)} layers merged, largest relative change {largest:.3e}{untied}"


def merged_layer(name: str, layer: AdaptedLayer) -> tuple[nn.Module, LayerChange]:
    """The plain layer with `W_eff`, and its change from the weight before."""
    before, after = layer.pristine_weight(), layer.effective_weight()
    plain = layer.merged()
    before = before.to(after.dtype)
    size = float(torch.linalg.matrix_norm(before)) or 1.0
    change = (after - before).abs()
    rounding = (weight_matrix(plain).to(after.dtype) - after).abs()
    relative = float(torch.linalg.matrix_norm(change)) / size
    return plain, LayerChange(name, relative, float(change.max()), float(rounding.max()))
