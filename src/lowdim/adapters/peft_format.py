"""Adapters as PEFT checkpoints: exact where the update is low-rank (or PEFT has the method), else truncated, with the error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.adapted import Adapted
from lowdim.adapters.base import AdaptedLayer
from lowdim.errors import check_int
from lowdim.files import write_json, write_tensors
from lowdim.linalg import svd, truncated_svd
from lowdim.surgery import is_conv1d

__all__ = ["PeftExport", "to_peft"]


@dataclass(frozen=True)
class PeftExport:
    """What an export wrote and lost.

    Attributes:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        errors: layer -> `‖ΔW − B A‖_F / ‖ΔW‖_F`; 0 where exact.
        ranks: layer -> rank written.
        suggested_rank: the smallest common rank with an error of at most 1 % in every layer, where something was truncated.
    """

    folder: Path
    errors: dict[str, float]
    ranks: dict[str, int]
    suggested_rank: int | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing was lost."""
        return not any(self.errors.values())


def to_peft(
    adapted: Adapted, folder: str | Path, *, rank: int | None = None, native: bool = True, root: str = ""
) -> PeftExport:
    """Write a folder that `peft.PeftModel.from_pretrained(base_model, folder)` loads.

    Args:
        rank: at which to truncate updates of full rank; None keeps a quarter of the smaller side. Exact factors are not
            truncated.
        root: name of the submodule that the adapter is for by itself (an encoder inside a classifier); names are written
            relative to it, and modules outside it are left to the caller.
        native: write PEFT's own method where it has it (RandLoRA), exact; False always writes LoRA.

    Returns:
        A `PeftExport` that states the error of each layer.

    Raises:
        ValueError: the model has been merged, rank is below 1, or a convolution is of a kind that PEFT cannot adapt.
    """
    if not adapted.layers:
        raise ValueError("there is no adapter to export: the model has been merged")
    if rank is not None:
        check_int("rank", rank, 1)
    folder = Path(folder)
    own = adapted.method.peft(adapted) if native else None
    if own is not None:
        config, tensors = own
        result = PeftExport(folder, dict.fromkeys(adapted.layers, 0.0), {n: int(config.get("r", 0)) for n in adapted.layers})
    else:
        config, tensors, result = _as_lora(adapted, folder, rank)
    config = {
        "base_model_name_or_path": _base_name(adapted.model),
        "task_type": task_type(adapted.model),
        "inference_mode": True,
        "bias": "none",
        "target_modules": _targets(adapted),
        "modules_to_save": _inside(adapted.modules_to_save, root) or None,
        **config,
    }
    for module in _inside(adapted.modules_to_save, root):
        state = adapted.model.get_submodule(module).state_dict()
        tensors.update({f"base_model.model.{module}.{key}": value for key, value in state.items()})
    if root:
        config, tensors = _relative(config, tensors, root)
    write_json(folder / "adapter_config.json", config)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return result


def _inside(names: Iterable[str], root: str) -> list[str]:
    return [name for name in names if not root or name.startswith(root + ".")]


def _relative(config: dict[str, Any], tensors: dict[str, Tensor], root: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Names relative to the submodule `root`, which stands alone where the adapter will be loaded."""
    targets = config["target_modules"]
    names = targets.split("|") if isinstance(targets, str) else targets  # a regular expression of alternatives, or a list
    start = re.escape(root + ".") if isinstance(targets, str) else root + "."
    outside = [name for name in names if not name.startswith(start)]
    if outside:
        raise ValueError(f"layer {outside[0]} lies outside {root!r}; the adapter cannot be written for {root!r} alone")
    short = [name.removeprefix(start) for name in names]
    saved = [name.removeprefix(root + ".") for name in config["modules_to_save"] or []]
    config = {
        **config,
        "target_modules": "|".join(short) if isinstance(targets, str) else short,
        "modules_to_save": saved or None,
    }
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        config[key] = {"^" + name.removeprefix("^" + re.escape(root + ".")): r for name, r in patterns.items()}
    long = f"base_model.model.{root}."
    return config, {name.replace(long, "base_model.model.", 1): value for name, value in tensors.items()}


def _as_lora(adapted: Adapted, folder: Path, rank: int | None) -> tuple[dict[str, Any], dict[str, Tensor], PeftExport]:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    wanted = 0
    for name, layer in adapted.layers.items():
        A, B, errors[name], enough = _factors(layer, rank)
        placed = _layout(f"base_model.model.{name}", layer, A, B)
        wanted, ranks[name] = max(wanted, enough), len(next(iter(placed.values())))
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
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "fan_in_fan_out": any(is_conv1d(layer.base) for layer in adapted.layers.values()),
    }
    lossy = any(errors.values())
    return config, tensors, PeftExport(folder, errors, ranks, wanted if lossy else None)


def _factors(layer: AdaptedLayer, rank: int | None) -> tuple[Tensor, Tensor, float, int]:
    exact = layer.update.low_rank_delta()
    if exact is not None and exact[0].shape[0] <= min(layer.out_features, layer.in_features):
        return exact[0], exact[1], 0.0, exact[0].shape[0]
    dtype, delta = layer.update_dtype(), layer.delta()
    small = min(delta.shape)
    keep = min(rank if rank is not None else max(1, small // 4), small)
    spectrum = svd(delta)[1] if small <= 1024 else None
    u, s, vh = truncated_svd(delta, keep)
    total = float(delta.square().sum())
    error = max(0.0, 1.0 - float(s.square().sum()) / total) ** 0.5 if total else 0.0
    enough = keep
    if spectrum is not None and total:
        tail = (1 - spectrum.square().cumsum(0) / spectrum.square().sum()).clamp_min(0).sqrt()
        enough = int((tail <= 0.01).int().argmax()) + 1
    root = s.sqrt()
    return (root[:, None] * vh).to(dtype), (u * root).to(dtype), error, enough


def _layout(prefix: str, layer: AdaptedLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """PEFT's two tensors for `ΔW = B A`, the one with the rank in front first."""
    if layer.kind == "embedding":
        return {f"{prefix}.lora_embedding_A": A, f"{prefix}.lora_embedding_B": B}
    if isinstance(layer.base, nn.Conv2d):
        if layer.base.dilation != (1, 1) or layer.base.padding_mode != "zeros":
            raise ValueError(
                f"{prefix}: PEFT's LoRA has no dilation and pads with zeros only; got {layer.base}: merge() instead"
            )
        A, B = _grouped(A.view(len(A), *layer.base.weight.shape[1:]), layer.base.groups), B[..., None, None]
    return {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}


def _grouped(
    A: Tensor,  # (rank, in_channels / groups, kh, kw)
    groups: int,
) -> Tensor:
    """PEFT's first convolution sees all channels and only its second one has groups: one copy of `A` for each group."""
    if groups == 1:
        return A
    rank, channels, *size = A.shape
    eye = torch.eye(groups, dtype=A.dtype, device=A.device)
    return (eye[:, None, :, None, None, None] * A[None, :, None]).reshape(groups * rank, groups * channels, *size)


def _targets(adapted: Adapted) -> list[str] | str:
    """The adapted layers' names; as a regular expression where PEFT would take a name for the end of others, too."""
    names = list(adapted.layers)
    ends = tuple("." + name for name in names)
    others = (name for name, _ in adapted.model.named_modules() if name not in adapted.layers)
    return "|".join(map(re.escape, names)) if any(name.endswith(ends) for name in others) else names


def task_type(model: nn.Module) -> str | None:
    """PEFT's name for what the model does, from its transformers class; None for any other model."""
    name = type(model).__name__
    endings: Mapping[str, str] = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
