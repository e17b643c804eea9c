"""Measure trained weights with one diagnostic.

It is above `train` and not in `lowdim.diagnose`, because a family does not load models by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowdim.errors import UnknownNameError
from lowdim.jobs.measures import flag
from lowdim.jobs.options import REQUIRED, check_options
from lowdim.jobs.systems import diagnostic

__all__ = ["DiagnoseSettings", "diagnose"]


@dataclass(frozen=True, kw_only=True)
class DiagnoseSettings:
    """One measurement.

    Attributes:
        diagnostic: a name of `lowdim list diagnose`.
        inputs: what to measure, by the names of the command: `model`, `base`, `tuned` (folders, safetensors files, or model
            names), `data` (files of texts).
        options: its keyword arguments; others have their defaults.
    """

    diagnostic: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def diagnose(settings: DiagnoseSettings, *, say: Callable[[str], None] = lambda line: None) -> Any:
    """Run a diagnostic on models given by name or folder.

    Args:
        say: called with a line about the progress, by diagnostics that train.

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
            raise UnknownNameError(f"{settings.diagnostic} does not take {flag(name)}; it measures {_flags(chosen.inputs)}")
    missing = [name for name in chosen.inputs if name not in settings.inputs]
    if missing:
        raise ValueError(f"{settings.diagnostic} measures {_flags(chosen.inputs)}; missing: {_flags(missing)}")
    check_options(settings.diagnostic, chosen.options, settings.options)
    for name, option in chosen.options.items():
        if option.default is REQUIRED and name not in settings.options:
            raise ValueError(f"{settings.diagnostic} needs --option {name}=…, {option.what}: {option.help}")
    told = {"say": say} if "say" in inspect.signature(chosen.function).parameters else {}
    inputs = {name: settings.inputs[name] for name in chosen.inputs}
    return chosen.function(*chosen.measure.arguments(inputs), **told, **settings.options)


def _flags(names: Iterable[str]) -> str:
    return " and ".join(map(flag, names))
