"""Running statistics of frozen normalisation layers, which training would otherwise change in a model that is not saved."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["freeze_statistics", "release_statistics"]


def freeze_statistics(model: nn.Module) -> list[nn.Module]:
    """Keep batch normalisation with frozen parameters in evaluation mode, whatever `model.train()` says.

    In training mode a batch normalisation normalises with the batch and updates its running mean and variance. An adapter's
    file does not hold these, so the frozen model has to keep them. A layer is left alone while a parameter of its own is
    trained.

    Returns:
        The layers, for `release_statistics`.

    Example:
        >>> import torch
        >>> from lowdim.surgery import freeze, freeze_statistics
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> freeze(model)
        >>> _ = freeze_statistics(model)
        >>> model.train()[1].training
        False
    """
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    for module in found:
        module.train = functools.partial(_train, module)  # type: ignore[method-assign]
        module.train(module.training)
    return found


def release_statistics(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Undo `freeze_statistics`: the layers follow the mode of `model` again."""
    for module in modules:
        module.__dict__.pop("train", None)
        module.train(model.training)


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return type(module).train(module, mode and trained)
