"""Adapters as PEFT checkpoints: exact where the update is low-rank (or PEFT has the method), else truncated, with the error."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import EXPORTERS, Adapted
from lowdim.adapters.core.files.gguf_lora import FILE, write_gguf_lora
from lowdim.adapters.core.files.peft_check import check_in_peft
from lowdim.adapters.core.files.peft_factors import Cut, cut, laid_out, pad_rank
from lowdim.adapters.core.files.peft_names import PREFIX, plan_names
from lowdim.adapters.core.files.peft_targets import TARGETS, problems, rank_limit, usage
from lowdim.adapters.core.guards import error_context
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.merging import merged_layers
from lowdim.adapters.core.method import ModelMethod
from lowdim.adapters.core.tensors import kept_tensors
from lowdim.errors import check_choice, check_float, check_int
from lowdim.files import whole_folder, write_json, write_tensors
from lowdim.results import Result
from lowdim.surgery import is_conv1d, submodule, weight_matrix

__all__ = ["RANKS", "PeftExport", "to_peft"]

#: The record of a cut, beside PEFT's files.
RANKS = "ranks.json"


@dataclass(frozen=True)
class PeftExport(Result):
    """The result of an export: ranks, errors and notes.

    Attributes:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        errors: layer -> `‖ΔW − B A‖_F / ‖ΔW‖_F`; 0 where exact.
        ranks: layer -> rank written.
        whole_ranks: layer -> rank without a cut; empty where PEFT has the method itself.
        suggested_rank: the smallest common rank with an error of at most 1 % in every layer, where something was truncated;
            None if nothing was truncated, or if a layer is too large to check.
        notes: what users of `target` need to know: the command, limits to raise.
    """

    folder: Path
    errors: dict[str, float]
    ranks: dict[str, int]
    suggested_rank: int | None = None
    notes: tuple[str, ...] = ()
    whole_ranks: dict[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether nothing was lost."""
        return not any(self.errors.values())

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer: its rank, the rank without a cut, and its error."""
        return [
            {"layer": name, "rank": self.ranks.get(name), "whole_rank": self.whole_ranks.get(name), "error": error}
            for name, error in self.errors.items()
        ]

    @property
    def summary(self) -> str:
        """One line."""
        lost = "exact" if self.exact else f"largest relative error {max(self.errors.values()):.3g}"
        return f"{self.folder}: {len(self.errors)} layers, {lost}"


def to_peft(
    adapted: Adapted,
    folder: str | Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    target: str | None = None,
    native: bool = True,
    root: str = "",
    name: str | None = None,
) -> PeftExport:
    """Write a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    Where a rank or an error is given, or something is lost, `ranks.json` lists each layer's rank and error. An adapter of a set
    is written with its strength; an idle one with strength 1.

    Args:
        rank: the highest rank of a layer; lower ones stay. None writes updates that are low-rank exactly, and keeps a quarter
            of the smaller side of others.
        max_error: instead of `rank`, the smallest rank of each layer with at most this relative error.
        target: `"vllm"` or `"llamacpp"`: write LoRA that this program loads, every layer padded with zeros to one common rank;
            obstacles raise an error before anything is written. For llama.cpp the folder also holds `adapter.gguf`.
        root: name of the submodule that the adapter is for (an encoder inside a classifier); names are written relative to
            it, and modules outside it are left to the caller.
        native: write PEFT's own method where it exists (RandLoRA), exactly; False, a rank or an error writes LoRA.
        name: of the folder, in `notes`; None uses the folder's own.

    Returns:
        A `PeftExport` with the error of each layer.

    Raises:
        ValueError: the model has been merged, rank is below 1 or above what every layer has, rank and max_error together, a
            convolution is of a kind that PEFT cannot adapt, or `target` cannot load the adapter (every reason is listed).
        MissingExtraError: `target` is llama.cpp and gguf is not installed.
        UnknownNameError: no such target.
    """
    if isinstance(adapted.method, ModelMethod):
        adapted.export(folder)  # raises an error that explains why PEFT cannot load it
    if not adapted.layers:
        raise ValueError("there is no adapter to export: the model has been merged")
    if rank is not None:
        check_int("rank", rank, 1)
    if max_error is not None:
        check_float("max_error", max_error, 0.0, 1.0, high_open=True)
        if rank is not None:
            raise ValueError("give rank or max_error, not both: max_error chooses the rank")
    folder, base = Path(folder), _base_name(adapted.model)
    if target is not None:
        check_choice("target", target, TARGETS)
        reasons = problems(adapted, target)
        if reasons:
            raise ValueError(f"{TARGETS[target]} cannot load this adapter; merge it instead. " + "; ".join(reasons))
    adapted.warn_of_unsaved()
    with _awake(adapted):
        return _written(adapted, folder, base, rank, max_error, target, native, root, name)


EXPORTERS["peft"] = to_peft


@contextmanager
def _awake(adapted: Adapted) -> Iterator[None]:
    """An adapter that another one of its set keeps idle is written as it is when it is active, not as zeros."""
    idle = [layer for layer in adapted.layers.values() if layer.strength == 0.0]
    for layer in idle:
        layer.strength = 1.0
    try:
        yield
    finally:
        for layer in idle:
            layer.strength = 0.0


def _written(
    adapted: Adapted,
    folder: Path,
    base: str | None,
    rank: int | None,
    max_error: float | None,
    target: str | None,
    native: bool,
    root: str,
    name: str | None,
) -> PeftExport:
    """`to_peft` of checked arguments."""
    model, layers, kept = _below(adapted, root)
    plan = plan_names(model, layers, kept, heads=target is None)
    if not plan.factored:
        raise ValueError(
            f"PEFT would keep every adapted layer whole ({', '.join(layers)}): merge() the adapter and save the model"
        )
    usual = all(layer.strength == layer.gain == 1.0 for layer in layers.values())
    native = native and target is None and rank is None and max_error is None and usual
    own = adapted.method.peft(adapted) if native else None
    if own is not None:
        config, tensors = own[0], _renamed(own[1], layers, plan.factored, root)
        result = PeftExport(folder, dict.fromkeys(plan.factored, 0.0), {n: int(config.get("r", 0)) for n in plan.factored})
    else:
        factored = {key: layers[key] for key in plan.factored}
        found = {}
        for key, layer in factored.items():
            with error_context("export", key, layer):
                found[key] = cut(layer, rank, max_error, rank_limit(target))
        _check_rank(rank, found)
        config, tensors, result = _as_lora(factored, folder, found, pad=target is not None)
    if target is not None:
        notes = usage(adapted, target, name or folder.name, base, int(config["r"]))
        result = dataclasses.replace(result, notes=tuple(notes))
    for module in plan.saved:
        whole, errors = _whole(model, layers, module)
        tensors.update({f"{PREFIX}{module}.{key}": value for key, value in whole.items()})
        result.errors.update(errors)
    about = {
        "base_model_name_or_path": base,
        "task_type": plan.task,
        "inference_mode": True,
        "bias": "none",
        "target_modules": plan.targets,
        "modules_to_save": list(plan.saved) or None,
        **config,
        **({} if plan.task else _auto_mapping(model)),
    }
    _check_finite(tensors)
    with whole_folder(folder) as draft:
        write_json(draft / "adapter_config.json", about)
        write_tensors(draft / "adapter_model.safetensors", tensors, {"format": "pt"})
        if about["peft_type"] == "LORA":
            check_in_peft(model, plan.factored, tensors, draft)
        if rank is not None or max_error is not None or not result.exact or (folder / RANKS).exists():
            write_json(draft / RANKS, {"rank": rank, "max_error": max_error, "layers": result.rows()})
        if target == "llamacpp":
            write_gguf_lora(draft / FILE, model, tensors, config["lora_alpha"])
    return result


def _auto_mapping(model: nn.Module) -> dict[str, Any]:
    """The entry by which PEFT's `AutoPeftModel` finds the class of a transformers model without a task."""
    kind = type(model)
    if not kind.__module__.startswith("transformers."):
        return {}
    return {"auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _check_rank(rank: int | None, found: Mapping[str, Cut]) -> None:
    """Check that there is something of a rank.

    Raises:
        ValueError: it is above that of every layer.
    """
    top, layer = max((one.whole, name) for name, one in found.items())
    if rank is not None and rank > top:
        fewest = min(one.whole for one in found.values())
        there = f"rank {top}" if fewest == top else f"ranks from {fewest} to {top}"
        raise ValueError(
            f"rank={rank} is above what is there: the update has {there} ({layer}: {top}); leave the rank out to write it whole"
        )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that every number can be written.

    Raises:
        ValueError: one is NaN or infinite.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            dtype = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name.removeprefix(PREFIX)} has entries that are NaN or infinite in {dtype}; nothing was written"
            )


def _below(adapted: Adapted, root: str) -> tuple[nn.Module, dict[str, AdaptedLayer], list[str]]:
    """The submodule `root`, which stands alone where the adapter will be loaded, and its layers and kept modules there."""
    if not root:
        return adapted.model, adapted.layers, list(adapted.modules_to_save)
    start = f"{root}."
    outside = [name for name in adapted.layers if not name.startswith(start)]
    if outside:
        raise ValueError(f"layer {outside[0]} is not inside {root!r}; the adapter cannot be written for {root!r} alone")
    layers = {name.removeprefix(start): layer for name, layer in adapted.layers.items()}
    kept = [name.removeprefix(start) for name in adapted.modules_to_save if name.startswith(start)]
    return submodule(adapted.model, root), layers, kept


def _renamed(tensors: Mapping[str, Tensor], layers: Iterable[str], factored: Iterable[str], root: str) -> dict[str, Tensor]:
    """A method's own tensors, of the layers that are written as factors, by their names below `root`."""
    long = f"{PREFIX}{root}." if root else PREFIX
    left_out = tuple(f"{PREFIX}{name}." for name in layers if name not in set(factored))
    renamed = {key.replace(long, PREFIX, 1) if key.startswith(long) else key: value for key, value in tensors.items()}
    return {key: value for key, value in renamed.items() if not (left_out and key.startswith(left_out))}


def _whole(model: nn.Module, layers: Mapping[str, AdaptedLayer], module: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state of a module, its adapted layers merged, and the error of rounding them relative to their update."""
    state, errors = kept_tensors(model, module), {}
    for name, layer in layers.items():
        if name != module and not name.startswith(f"{module}."):
            continue
        below = name[len(module) + 1 :]
        start = f"{below}." if below else ""
        plain = merged_layers({name: layer})[0][name]
        state = {key: value for key, value in state.items() if not key.startswith(start)}
        state |= {f"{start}{key}": value for key, value in plain.state_dict().items()}
        errors[name] = _rounding(layer, plain)
    return state, errors


def _rounding(layer: AdaptedLayer, plain: nn.Module) -> float:
    """`‖stored − W_eff‖_F / ‖ΔW‖_F`; 0 in float32 and better, whose rounding no update depends on."""
    stored = weight_matrix(plain)
    if stored.dtype.itemsize >= 4:
        return 0.0
    exact = layer.effective_weight()
    return float(torch.linalg.vector_norm(stored.to(exact.dtype) - exact)) / (layer.delta_norm() or 1.0)


def _as_lora(
    layers: Mapping[str, AdaptedLayer], folder: Path, found: dict[str, Cut], *, pad: bool
) -> tuple[dict[str, Any], dict[str, Tensor], PeftExport]:
    if pad:
        top = max(len(one.A) for one in found.values())
        for name, one in found.items():
            if one.error and len(one.A) < top:  # the padding is stored anyway, so use it
                found[name] = cut(layers[name], max_error=0.0, limit=top)
        found = {name: pad_rank(one, top) for name, one in found.items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, one in found.items():
        placed = laid_out(PREFIX + name, layers[name], one.A, one.B)
        ranks[name] = len(next(iter(placed.values())))
        tensors.update(placed)
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT looks a key up as a regular expression for the end of a name; the caret makes it the whole name.
    odd = {"^" + re.escape(name): r for name, r in ranks.items() if r != common}
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,  # the scale is inside B, so alpha / r is 1 in every layer
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "fan_in_fan_out": any(is_conv1d(layer.plain) for layer in layers.values()),
    }
    errors = {name: one.error for name, one in found.items()}
    whole = {name: one.whole * (ranks[name] // len(one.A)) for name, one in found.items()}
    enough = [one.enough for one in found.values()]
    known = [count for count in enough if count is not None]
    suggested = max(known) if any(errors.values()) and len(known) == len(enough) else None
    return config, tensors, PeftExport(folder, errors, ranks, suggested, whole_ranks=whole)


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
