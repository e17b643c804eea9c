"""A few seeded optimizer steps on some parameters of a model, which is otherwise left as it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate.batches import given_batches
from lowdim.errors import LowdimError
from lowdim.linalg import derive_seed
from lowdim.surgery import freeze_statistics, release_statistics

__all__ = ["LossFn", "fit_parameters"]

LossFn = Callable[[nn.Module, Any], Tensor]


def fit_parameters(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    weight_decay: float = 0.0,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Take `steps` of AdamW on these parameters alone, over the batches again and again.

    The model is in training mode only here. Other parameters, running statistics, gradients and torch's random stream are
    afterwards as they were.

    Args:
        batches: consumed once and kept; a generator works.
        loss_fn: `loss_fn(model, batch) -> scalar`.
        seed: of dropout.
        weight_decay: decoupled decay; without it the steps are Adam's.
        after_step: called after each step, for averages.

    Returns:
        The loss of each step.

    Raises:
        ValueError: no batches, or no loss function.
        LowdimError: a loss that is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress.core.fitting import fit_parameters
        >>> model = nn.Linear(2, 1)
        >>> loss = lambda model, x: (model(x) - 3).square().mean()
        >>> losses = fit_parameters(model, [model.bias], [torch.ones(4, 2)], loss, steps=20, lr=0.1)
        >>> losses[-1] < losses[0], model.bias.grad
        (True, None)
    """
    batches = given_batches(batches, f"{steps} training steps need sample data")
    if loss_fn is None:
        raise ValueError(f"loss_fn is missing: {steps} training steps need loss_fn(model, batch) -> scalar")
    kept = list(batches)
    if not kept:
        raise ValueError(f"batches is empty: {steps} training steps need sample data")
    trained = list(parameters)
    losses = []
    with _training(model, trained, derive_seed(seed, "fit")), torch.enable_grad():
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        for step, batch in enumerate(itertools.islice(itertools.cycle(kept), steps)):
            loss = loss_fn(model, batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise LowdimError(f"the loss of training step {step + 1} is {losses[-1]}; try a smaller lr than {lr:g}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step()
    return losses


@contextmanager
def _training(model: nn.Module, trained: list[nn.Parameter], seed: int) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    grads = {p: p.grad for p in model.parameters()}
    mine = {id(p) for p in trained}
    for p in flags:
        p.requires_grad_(id(p) in mine)
        p.grad = None
    statistics = freeze_statistics(model)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.train()
            yield
    finally:
        release_statistics(model, statistics)
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = grads[p]
