"""The trainer callback that sets SGD's learning rate and momentum from the curvature, every so many epochs or steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from lowdim.calibrate import evaluating, to_device
from lowdim.diagnose import TuneSGD
from lowdim.diagnose.core.curvature import twice_differentiable
from lowdim.errors import check_choice, check_int
from lowdim.surgery import model_device, unwrap
from lowdim.train.callback_base import callback_base

__all__ = ["TuneSGDCallback"]

_WITHIN = 1e-6  # of an epoch: the trainer counts epochs in floats


class TuneSGDCallback(callback_base()):
    """A `transformers.TrainerCallback` that sets learning rate and momentum of SGD: `lowdim.diagnose.TuneSGD`.

    The curvature is measured on one fixed batch, in evaluation mode: a batch of the trainer's own loader would shift its random
    stream. A training that is resumed within an epoch keeps the rate of its checkpoint.

    Args:
        batch: a dict batch with labels, of the size that is trained with.
        loss_fn: `loss_fn(model, batch)`; None: `model(**batch).loss`.
        interval, unit: as in `lowdim.diagnose.TuneSGD`: every epoch by default.
        **options: `rule`, `steps`, `floor` and `seed` of `lowdim.diagnose.tune_sgd`.

    Attributes:
        tuner: the TuneSGD; None before the training begins.
        history: `{"step": …, "epoch": …, "lr": …, "momentum": …}` for each measurement of this process.

    Raises:
        TypeError: an unknown option; an optimizer without a momentum, a scheduler other than `LambdaLR` (in `on_train_begin`).
        ValueError: an interval or a unit out of range; as `tune_sgd` (in `on_train_begin`, or at a measurement).

    Example:
        >>> import torch
        >>> from lowdim.train import TuneSGDCallback
        >>> batch = {"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}
        >>> callback = TuneSGDCallback(batch, rule="gradient")  # Trainer(..., optimizers=(sgd, None), callbacks=[callback])

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092.
    """

    def __init__(
        self,
        batch: Mapping[str, Any],
        loss_fn: Callable[..., torch.Tensor] | None = None,
        *,
        interval: int = 1,
        unit: Literal["epochs", "steps"] = "epochs",
        **options: Any,
    ):
        TuneSGD.check_options("TuneSGDCallback", options)
        check_int("interval", interval, 1)
        check_choice("unit", unit, ("epochs", "steps"))
        self.batch, self.loss_fn, self.options = batch, loss_fn, {**options, "interval": interval, "unit": unit}
        self.tuner: TuneSGD | None = None

    @property
    def history(self) -> list[dict[str, float]]:
        """The measurements of this process."""
        return [] if self.tuner is None else self.tuner.history

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the trainer's optimizer and schedule; after a resume, what the trainer has counted."""
        model = unwrap(kwargs["model"])
        batch = to_device(dict(self.batch), model_device(model))

        def loss() -> torch.Tensor:
            with evaluating(model), twice_differentiable(model):
                return model(**batch).loss if self.loss_fn is None else self.loss_fn(model, batch)

        self.tuner = TuneSGD(kwargs["optimizer"], loss, scheduler=kwargs.get("lr_scheduler"), **self.options)
        begun = math.ceil((state.epoch or 0.0) - _WITHIN)
        self.tuner.load_state_dict({"steps": state.global_step, "epochs": begun, "history": []})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is due, and set the rate of the optimizer and of its schedule."""
        epoch = float(state.epoch or 0.0)
        if self.tuner is not None and abs(epoch - round(epoch)) <= _WITHIN:  # else resumed within an epoch
            self.tuner.epoch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        if self.tuner is not None:
            self.tuner.step()
