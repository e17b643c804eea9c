"""The trainer callback that sets SGD's learning rate and momentum from the curvature, once an epoch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lowdim.calibrate import evaluating, to_device
from lowdim.diagnose import tune_sgd
from lowdim.diagnose.core.curvature import twice_differentiable
from lowdim.errors import refuse_strange
from lowdim.surgery import model_device, unwrap
from lowdim.train.callback_base import callback_base

__all__ = ["TuneSGDCallback"]


class TuneSGDCallback(callback_base()):
    """A `transformers.TrainerCallback` that sets learning rate and momentum of SGD at the beginning of each epoch.

    The curvature is measured on one fixed batch, in evaluation mode: a batch of the trainer's own loader would shift its random
    stream. A training that is resumed within an epoch keeps the rate of its checkpoint.

    Args:
        batch: a dict batch with labels, of the size that is trained with.
        loss_fn: `loss_fn(model, batch)`; None: `model(**batch).loss`.
        **options: `rule`, `steps`, `floor` and `seed` of `lowdim.diagnose.tune_sgd`.

    Attributes:
        history: `{"epoch": …, "lr": …, "momentum": …}` for each epoch so far.

    Raises:
        TypeError: an unknown option; an optimizer without a momentum, a scheduler other than `LambdaLR` (at the first epoch).
        ValueError: as `tune_sgd` (at the first epoch).

    Example:
        >>> import torch
        >>> from lowdim.train import TuneSGDCallback
        >>> batch = {"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
        >>> callback = TuneSGDCallback(batch, rule="gradient")  # Trainer(..., optimizers=(sgd, None), callbacks=[callback])

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """

    def __init__(self, batch: Mapping[str, Any], loss_fn: Callable[..., torch.Tensor] | None = None, **options: Any):
        known = [
            name for name in inspect.signature(tune_sgd).parameters if name not in ("optimizer", "loss_closure", "scheduler")
        ]
        refuse_strange("TuneSGDCallback", options, known)
        self.batch, self.loss_fn, self.options = batch, loss_fn, options
        self.history: list[dict[str, float]] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, and set the rate of the optimizer and of its schedule."""
        epoch = float(state.epoch or 0.0)
        if abs(epoch - round(epoch)) > 1e-6:  # resumed within an epoch
            return
        model = unwrap(kwargs["model"])
        batch = to_device(dict(self.batch), model_device(model))

        def loss() -> torch.Tensor:
            return model(**batch).loss if self.loss_fn is None else self.loss_fn(model, batch)

        with evaluating(model), twice_differentiable(model):
            lr, momentum = tune_sgd(kwargs["optimizer"], loss, scheduler=kwargs.get("lr_scheduler"), **self.options)
        self.history.append({"epoch": epoch, "lr": lr, "momentum": momentum})
