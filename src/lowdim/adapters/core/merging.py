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


@torch.no_grad()
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


@torch.no_grad()
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


#: Parameters that a merge has separated: module, attribute, and the parameter that it shared.
Separated = list[tuple[nn.Module, str, nn.Parameter]]


def untie_words(model: Any) -> Separated | None:
    """Separate every weight that transformers ties, where one of them has been merged and no longer is the same.

    `config.tie_word_embeddings` is one switch for all ties of a model: once it is off, each needs its own tensor, or a saved
    checkpoint would lack it.

    Returns:
        What `tie_words` needs to undo it; None if nothing had to be separated.
    """
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    places = [(_place(model, one), _place(model, other)) for one, other in _tied_names(model).items()]
    pairs = [(one, other) for one, other in places if one is not None and other is not None]
    if all(_at(one) is _at(other) for one, other in pairs):
        return None
    separated: Separated = []
    seen: set[int] = set()
    for module, attribute in dict.fromkeys(place for pair in pairs for place in reversed(pair)):
        shared = _at((module, attribute))
        if id(shared) in seen:
            separated.append((module, attribute, shared))
            module._parameters[attribute] = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        seen.add(id(shared))
    model.config.tie_word_embeddings = False
    return separated


def tie_words(model: Any, separated: Separated) -> None:
    """Undo `untie_words`."""
    for module, attribute, shared in separated:
        module._parameters[attribute] = shared
    model.config.tie_word_embeddings = True


def _tied_names(model: Any) -> dict[str, str]:
    """Parameter -> the one that transformers ties it to."""
    found = getattr(model, "all_tied_weights_keys", None)
    if isinstance(found, dict):
        return found
    ends = [getattr(model, f"get_{side}_embeddings", None) for side in ("output", "input")]
    modules = {module: name for name, module in model.named_modules()}
    names = [modules.get(end()) for end in ends if callable(end)]
    return {f"{names[0]}.weight": f"{names[1]}.weight"} if len(names) == 2 and None not in names else {}


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return (module, attribute) if module._parameters.get(attribute) is not None else None


def _at(place: tuple[nn.Module, str]) -> nn.Parameter:
    return place[0]._parameters[place[1]]  # type: ignore[return-value]
