"""A recipe for each method that fits a budget, ready for `lowdim run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowdim.catalogue import variant
from lowdim.files import whole_folder, write_text
from lowdim.jobs.plan import PlanSettings
from lowdim.outputs import new_folder
from lowdim.units import format_bytes

__all__ = ["write_recipes"]

#: What stands for the data where none is named.
DATA = "your-data.jsonl"


def write_recipes(settings: PlanSettings, fits: Sequence[Any], folder: str | Path, data: Sequence[str] = ()) -> list[Path]:
    """Write `METHOD.yaml` into a new folder for each method that fits.

    Args:
        settings: those that the fits were found for.
        fits: of `fit_plan`.
        data: what the recipes train on; a placeholder without.

    Returns:
        The files.

    Raises:
        FileExistsError: the folder is not empty.
    """
    texts = {f"{found.method}.yaml": _recipe(settings, found, list(data)) for found in fits if found.fits}
    with new_folder(folder) as place, whole_folder(place) as draft:
        for name, text in texts.items():
            write_text(draft / name, text)
    return [Path(folder) / name for name in texts]


def _recipe(settings: PlanSettings, found: Any, data: list[str]) -> str:
    import yaml

    need = f"{format_bytes(found.forecast.total)} of {format_bytes(found.budget_bytes)} at the peak of a step, as forecast"
    lines = [f"# {found.label}: {need} for texts of {settings.length} tokens."]
    lines += [f"# Changed to fit: {found.flags}"] if found.changes else ["# It fits without a change."]
    remarks = {} if data else {"data": "put your own file here"}
    if _is_shape(settings.model) and settings.task != "pretrain":
        remarks["model"] = "a shape without weights: put a folder with weights here"
    elif _is_shape(settings.model) and settings.tokenizer is None:
        remarks["tokenizer"] = "a shape has none: name bytes or a folder"
    lines += [""]
    for key, value in _values(settings, found, data or [DATA]).items():
        if value in (None, {}, False) and key not in remarks:
            continue
        text = yaml.safe_dump([value], allow_unicode=True, default_flow_style=True, width=10_000).strip()[1:-1]
        line = f"{key}: {text}"
        lines.append(f"{line}  # {remarks[key]}" if key in remarks else line)
    return "\n".join(lines) + "\n"


def _values(settings: PlanSettings, found: Any, data: list[str]) -> dict[str, Any]:
    """The recipe's keys that follow from the settings and the changes."""
    usual = variant(found.method)
    options = {
        name: value for name, value in settings.at_rank(usual).options.items() if usual.options.get(name, object()) != value
    }
    return {
        "model": settings.model,
        "task": settings.task,
        "tokenizer": settings.tokenizer,
        "ffn": settings.ffn,
        "mixer": settings.mixer,
        "method": found.method,
        "options": {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        "data": data,
        "max_length": max(4, settings.length),
        "batch_size": found.forecast.batch_size,
        "gradient_accumulation": found.forecast.accumulate,
        "gradient_checkpointing": found.forecast.gradient_checkpointing,
        "layerwise": found.forecast.layerwise,
        "dtype": found.forecast.dtype,
        "master_weights": settings.master_weights,
        "quantize": found.forecast.quantize,
        "bf16": found.forecast.bf16,
        "optimizer": None if found.forecast.optimizer == "adamw" else found.forecast.optimizer,
        "out": f"lowdim-run-{found.method}",
    }


def _is_shape(model: str) -> bool:
    from lowdim.models.architectures import is_shape

    return is_shape(model)
