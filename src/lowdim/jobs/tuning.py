"""A short training of chosen parameters, by the same loop as `lowdim run`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.errors import LowdimError

if TYPE_CHECKING:
    from torch import nn

    from lowdim.train.tasks import Task

__all__ = ["replaced_parameters", "train"]


def train(
    model: nn.Module, parameters: list[Any], task: Task, steps: int, lr: float, *, batch_size: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Take `steps` of AdamW on these parameters, with a cosine schedule.

    Returns:
        The rate, how many numbers were trained, and the losses.

    Raises:
        LowdimError: a loss is not finite.
    """
    from lowdim.catalogue import variant
    from lowdim.methods import Applied, Setup
    from lowdim.methods.strategy import adamw
    from lowdim.train.loop import FitSettings, fit

    setup = Setup(lr=lr, steps=steps)
    applied = Applied(model, variant("full"), lambda rate: adamw(parameters, rate, setup))
    settings = FitSettings(steps=steps, lr=lr, schedule="cosine", batch_size=batch_size, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(applied, task, settings, Path(folder))
    if result.failure:
        raise LowdimError(f"{result.failure}; try a smaller --lr than {lr:g}. Nothing was written")
    return {"lr": lr, "trained": applied.trained(), "losses": result.losses}


def replaced_parameters(model: nn.Module) -> list[Any]:
    """Freeze a model but for the floating-point parameters of layers that a system has put in the place of others.

    Raises:
        ValueError: no layer was replaced.

    Example:
        >>> from torch import nn
        >>> from lowdim.jobs.tuning import replaced_parameters
        >>> from lowdim.modules import LowRankLinear
        >>> [tuple(p.shape) for p in replaced_parameters(nn.Sequential(nn.Linear(4, 4), LowRankLinear(4, 4, rank=1)))]
        [(1, 4), (4, 1), (4,)]
    """
    from lowdim.modules import Rebuildable
    from lowdim.surgery import freeze_except

    layers = [module for module in model.modules() if isinstance(module, Rebuildable) and not module.added]
    found = [p for layer in layers for p in layer.parameters() if p.is_floating_point()]  # type: ignore[attr-defined]
    if not found:
        raise ValueError(f"{type(model).__name__} has no replaced layer to tune; decompose it first, or tune all parameters")
    return freeze_except(model, found)
