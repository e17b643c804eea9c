"""Merging: the plain layers that replace adapted ones, checked before any is put in place, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.errors import listed, warn_caller
from lowdim.results import Result
from lowdim.surgery import is_quantized, replace_layers, shallow_copy, submodule, weight_matrix
from lowdim.threads import one_thread

__all__ = [
    "LayerChange",
    "MergeReport",
    "allow_training",
    "change_of",
    "dequantized",
    "held_zeros",
    "merged_layers",
    "merged_weight",
    "put_layers",
    "tie_words",
    "untie_words",
    "warn_of_lost_zeros",
    "zeros_of",
]

#: Share of exact zeros from which a weight counts as sparse.
_SPARSE = 0.3
#: Entries from which one sees that a weight is not sparse.
_SAMPLE = 4096


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer: `‖ΔW‖_F / ‖W₀‖_F`, and the largest error of rounding once to the weight's dtype.

    Attributes:
        sparsity_before, sparsity_after: share of exact zeros of the weight, before attaching and merged.
        dropped: with `keep_mask`, `‖ΔW where W₀ = 0‖_F / ‖ΔW‖_F`: the part of the update that is not merged; 0 without.
    """

    layer: str
    relative_change: float
    largest_change: float
    rounding_error: float
    sparsity_before: float = 0.0
    sparsity_after: float = 0.0
    dropped: float = 0.0


@dataclass(frozen=True)
class MergeReport(Result):
    """The layers that a merge changed, and which tied weights it had to separate.

    Attributes:
        dequantized: layer -> the dtype of the plain layer that a quantized one has become.
    """

    layers: tuple[LayerChange, ...]
    untied: tuple[str, ...] = ()
    dequantized: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [vars(change).copy() for change in self.layers]

    @property
    def summary(self) -> str:
        """One line."""
        largest = max((change.relative_change for change in self.layers), default=0.0)
        untied = f"; untied: {', '.join(self.untied)}" if self.untied else ""
        dtypes = ", ".join(dict.fromkeys(self.dequantized.values()))
        plain = f"; {len(self.dequantized)} quantized ones are plain {dtypes} layers now" if self.dequantized else ""
        return f"{len(self.layers)} layers merged, largest relative change {largest:.3e}{untied}{plain}"


@torch.no_grad()
def merged_layers(
    layers: Mapping[str, AdaptedLayer], *, keep_mask: bool = False
) -> tuple[dict[str, nn.Module], tuple[LayerChange, ...]]:
    """The plain layers with `W_eff`, and their changes from the weights before. Nothing is put into the model.

    Args:
        keep_mask: leave 0 what was exactly 0 before attaching.

    Raises:
        ValueError: as `check_held`.
    """
    plain, changes = {}, []
    for name, layer in layers.items():
        before, after = layer.pristine_weight(), layer.effective_weight()
        after, dropped = held_zeros(before, after) if keep_mask else (after, 0.0)
        plain[name] = layer.merged(after)
        change = change_of(f"layer {name}", name, before, after, weight_matrix(plain[name]))
        changes.append(replace(change, dropped=dropped))
    return plain, tuple(changes)


def held_zeros(before: Tensor, after: Tensor) -> tuple[Tensor, float]:
    """`after` with 0 wherever `before` is exactly 0, and `‖ΔW there‖ / ‖ΔW‖`."""
    zero = before == 0
    lost = float(torch.linalg.vector_norm(torch.where(zero, after, 0.0)))
    whole = float(torch.linalg.vector_norm(after - before.to(after.dtype)))
    return torch.where(zero, 0.0, after), lost / whole if whole else 0.0


def warn_of_lost_zeros(changes: Iterable[LayerChange], rounded: Iterable[str] = ()) -> None:
    """A warning where a merge has filled in a sparse weight.

    Args:
        rounded: layers that were quantized, whose zeros are rounded numbers and no pattern.
    """
    known = set(rounded)
    lost = [
        f"{change.layer} had {change.sparsity_before:.1%} exact zeros and has {change.sparsity_after:.1%}"
        for change in changes
        if change.layer not in known and change.sparsity_before >= _SPARSE and change.sparsity_after < change.sparsity_before
    ]
    if lost:
        keeps = "merge(keep_mask=True) keeps the zeros, and so does lowdim export --keep-mask"
        warn_caller(f"the merge filled in sparse weights: layer {listed(lost)}; {keeps}")


def zeros_of(layer: str, before: Tensor, after: Tensor) -> LayerChange | None:
    """A change with the shares of zeros alone, for `warn_of_lost_zeros`; None where a sample of `before` is not sparse."""
    sample = before.reshape(-1)[:: max(1, before.numel() // _SAMPLE)].reshape(1, -1)
    if _zeros(sample) < _SPARSE / 2:
        return None
    return LayerChange(layer, 0.0, 0.0, 0.0, _zeros(before), _zeros(after))


def dequantized(layers: Mapping[str, AdaptedLayer], plain: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer -> dtype of the plain layer in `plain`, where the base was quantized."""
    return {
        name: str(weight_matrix(plain[name]).dtype).removeprefix("torch.")
        for name, layer in layers.items()
        if is_quantized(layer.plain)
    }


@torch.no_grad()
def merged_weight(name: str, layer: AdaptedLayer, stored: Tensor) -> None:
    """Write a layer's weight with `W_eff` into `stored`, computed in float32 or better and rounded once.

    Args:
        stored: contiguous, in the layer's own layout; shares no memory with the layer.

    Raises:
        ValueError: as `check_held`; `stored` is then of no use.
    """
    plain = type(layer) is AdaptedLayer and not layer.taken and layer.strength == 1.0
    rows = layer.update.exact_rows(weight_matrix(layer.base)) if plain else None
    if rows is not None and _rounded_rows(rows, _matrix_in(layer.plain, stored)):
        return
    exact = layer.effective_weight()
    merged = layer.merged(exact)
    stored.copy_(merged.weight.detach())  # type: ignore[arg-type,operator,union-attr]
    if not _surely_held(exact, stored.dtype):
        check_held(f"layer {name}", layer.pristine_weight().to(exact.dtype), exact, _matrix_in(layer.plain, stored))


def _rounded_rows(rows: Iterable[tuple[slice, Tensor]], matrix: Tensor) -> bool:
    """Round each block of rows into its place; False, with some of them written, if one may be too large for the dtype."""
    with one_thread():
        for where, block in rows:
            if not _surely_held(block, matrix.dtype):
                return False
            matrix[where] = block
    return True


def _surely_held(exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether even the norm of all entries is a number that `dtype` holds: then each of them is."""
    return float(torch.linalg.vector_norm(exact)) <= torch.finfo(dtype).max / 2  # half: the norm itself is rounded


def _matrix_in(layer: nn.Module, stored: Tensor) -> Tensor:
    """`weight_matrix` of a layer like `layer` whose weight is `stored`, in the memory of `stored`."""
    held = shallow_copy(layer)
    held._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
    return weight_matrix(held).detach()


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
    zeros = [_zeros(weight) for weight in (before, stored)]
    return LayerChange(name, relative, float(change.max()), float(rounding.max()), *zeros)


def _zeros(weight: Tensor) -> float:
    """The share of exact zeros; a vector, such as a new bias, is 0 without a pattern."""
    return 1 - int(torch.count_nonzero(weight)) / weight.numel() if weight.ndim > 1 and weight.numel() else 0.0


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
