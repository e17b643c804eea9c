"""Merging: the plain layers that replace adapted ones, checked before any is put in place, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.results import Result
from lowdim.surgery import is_quantized, replace_layers, submodule, weight_matrix

__all__ = [
    "LayerChange",
    "MergeReport",
    "allow_training",
    "change_of",
    "merged_layers",
    "put_layers",
    "tie_words",
    "untie_words",
]


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


def merged_layers(layers: Mapping[str, AdaptedLayer]) -> tuple[dict[str, nn.Module], tuple[LayerChange, ...]]:
    """The plain layers with `W_eff`, and their changes from the weights before. Nothing is put into the model.

    Raises:
        ValueError: as `check_held`.
    """
    plain, changes = {}, []
    for name, layer in layers.items():
        before, after = layer.pristine_weight(), layer.effective_weight()
        plain[name] = layer.merged(after)
        changes.append(change_of(f"layer {name}", name, before, after, weight_matrix(plain[name])))
    return plain, tuple(changes)


def change_of(what: str, name: str, before: Tensor, exact: Tensor, stored: Tensor) -> LayerChange:
    """The change from `before` to `exact`, and the error of keeping it as `stored`.

    Raises:
        ValueError: as `check_held`.
    """
    before = before.to(exact.dtype)
    check_held(what, before, exact, stored)
    size = float(torch.linalg.vector_norm(before)) or 1.0
    change = (exact - before).abs()
    rounding = (stored.to(exact.dtype) - exact).abs()
    relative = float(torch.linalg.vector_norm(change)) / size
    return LayerChange(name, relative, float(change.max()), float(rounding.max()))


def check_held(what: str, before: Tensor, exact: Tensor, stored: Tensor) -> None:
    """Check that numbers survive being stored; those that were not finite before may stay so.

    Raises:
        ValueError: numbers that the dtype of `stored` cannot hold, or an update that is not finite.
    """
    lost = ~torch.isfinite(exact) & torch.isfinite(before)
    if bool(lost.any()):
        raise ValueError(f"{what}: the update has {int(lost.sum())} entries that are NaN or infinite, so it cannot be merged")
    dtype = stored.dtype
    largest = torch.finfo(dtype).max
    finite = torch.isfinite(exact)
    # Some 8-bit formats give the largest number, or NaN, where others give infinity.
    over = finite & (~torch.isfinite(stored.to(exact.dtype)) | (exact.abs() > largest * (1 + torch.finfo(dtype).eps / 4)))
    if bool(over.any()):
        peak = float(exact[finite].abs().max())
        raise ValueError(
            f"{what}: the merged weight has entries up to {peak:.4g}, and {str(dtype).removeprefix('torch.')} holds at most "
            f"{largest:g}; convert the model first, e.g. model.to(torch.bfloat16) or model.float()"
        )


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each layer where its name is; if that is interrupted, those that were there before are put back."""
    before = {name: submodule(model, name) for name in layers}
    try:
        replace_layers(model, layers)
    except BaseException:
        replace_layers(model, before)
        raise


def allow_training(model: nn.Module) -> None:
    """Switch gradients on for every parameter that can have one: a quantized weight stays as it is."""
    packed = {id(getattr(module, "weight", None)) for module in model.modules() if is_quantized(module)}
    for parameter in model.parameters():
        if (parameter.is_floating_point() or parameter.is_complex()) and id(parameter) not in packed:
            parameter.requires_grad_(True)


def untie_words(model: Any) -> bool:
    """Set `config.tie_word_embeddings` to False where head and embedding no longer share a weight; returns whether it did."""
    if not _ties(model) or not _head_stands_alone(model):
        return False
    model.config.tie_word_embeddings = False
    return True


def tie_words(model: Any) -> None:
    """Undo `untie_words`."""
    model.config.tie_word_embeddings = True


def _ties(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _head_stands_alone(model: Any) -> bool:
    ends: list[Any] = []
    for side in ("output", "input"):
        getter = getattr(model, f"get_{side}_embeddings", None)
        ends.append(getter() if callable(getter) else None)
    return None not in ends and ends[0].weight is not ends[1].weight
