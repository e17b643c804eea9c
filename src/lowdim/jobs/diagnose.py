"""Measure trained weights with one diagnostic.

It is above `train` and not in `lowdim.diagnose`, because a family does not load models by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowdim.errors import UnknownNameError
from lowdim.jobs.adapted import holds_adapter, load_adapted
from lowdim.jobs.options import check_options
from lowdim.jobs.systems import diagnostic

__all__ = ["DiagnoseSettings", "diagnose"]


@dataclass(frozen=True, kw_only=True)
class DiagnoseSettings:
    """One measurement.

    Attributes:
        diagnostic: a name of `lowdim list diagnose`.
        inputs: the weights to measure, by the diagnostic's own names (`base`, `tuned`): folders, safetensors files, or model
            names.
        options: its keyword arguments; others have their defaults.
    """

    diagnostic: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def diagnose(settings: DiagnoseSettings) -> Any:
    """Run a diagnostic on models given by name or folder.

    Returns:
        The diagnostic's own result; `to_dict()` is its record.

    Raises:
        UnknownNameError, ValueError: an unknown diagnostic, input or option, a missing input, a value out of range.

    Example:
        >>> from lowdim.jobs import DiagnoseSettings, diagnose
        >>> inputs = {"base": "stories260k", "tuned": "stories260k"}
        >>> diagnose(DiagnoseSettings(diagnostic="intruders", inputs=inputs, options={"k": 2})).total
        0
    """
    chosen = diagnostic(settings.diagnostic)
    for name in settings.inputs:
        if name not in chosen.inputs:
            raise UnknownNameError(f"{settings.diagnostic} does not take --{name}; it measures {_flags(chosen.inputs)}")
    missing = [name for name in chosen.inputs if name not in settings.inputs]
    if missing:
        raise ValueError(f"{settings.diagnostic} measures {_flags(chosen.inputs)}; missing: {_flags(missing)}")
    check_options(settings.diagnostic, chosen.options, settings.options)
    return chosen.function(*(_source(settings.inputs[name]) for name in chosen.inputs), **settings.options)


def _flags(names: Any) -> str:
    return " and ".join(f"--{name}" for name in names)


def _source(name: str) -> Any:
    """A path unchanged; an adapter's folder, and any other name, as the model."""
    path = Path(name)
    if path.is_dir() and holds_adapter(path):
        return load_adapted(path)[1].merge()
    if path.exists():
        return path
    from lowdim import models

    source = models.resolve(name)
    return models.load_model(name, "causal-lm") if source.gguf else Path(source.path)
