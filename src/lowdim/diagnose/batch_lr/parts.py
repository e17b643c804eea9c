"""Data in parts of a batch's size, and the loss of a model on each, for sums over more samples than a pass can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate import map_tensors, row_count, to_device
from lowdim.surgery import model_device, unwrap

__all__ = ["Parts"]

_IGNORED = -100  # the label that losses leave out


class Parts:
    """Samples and a loss that is a mean over them.

    Args:
        model: called as `model(inputs)`, or with `loss_fn` as below.
        loss_fn: `loss_fn(model(inputs), targets)`; without targets `loss_fn(model, batch)`, or None for `model(**batch).loss`.
        inputs: a tensor, or a mapping of tensors with one first dimension.
        targets: tensors with the same first dimension, or None.

    Raises:
        TypeError: targets and loss that do not fit together. ValueError: first dimensions that differ.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None, inputs: Any, targets: Any = None):
        self.model, self.loss_fn, self.inputs, self.targets = unwrap(model), loss_fn, inputs, targets
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function; got {type(loss_fn).__name__}")
        if targets is None and not isinstance(inputs, Mapping):
            raise TypeError(
                f"targets must be given for inputs that are a {type(inputs).__name__}; a dict batch holds its labels itself"
            )
        if targets is not None and loss_fn is None:
            raise TypeError("loss_fn must be given with targets: loss_fn(model(inputs), targets)")
        self.n = row_count(inputs)
        lengths: set[int] = set()
        map_tensors((dict(inputs) if isinstance(inputs, Mapping) else inputs, targets), lambda t: lengths.add(len(t)))
        if len(lengths) != 1:
            raise ValueError(f"inputs and targets must have one first dimension; got {sorted(lengths)}")
        self.device = model_device(self.model)

    def rows(self, index: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of these rows, on the model's device."""
        inputs, targets = (map_tensors(part, lambda t: t[index.to(t.device)]) for part in (self.inputs, self.targets))
        return to_device(inputs, self.device), to_device(targets, self.device)

    def loss(self, index: Tensor) -> Tensor:
        """The mean loss over these rows."""
        inputs, targets = self.rows(index)
        if self.targets is not None:
            assert self.loss_fn is not None
            return self.loss_fn(self.model(inputs), targets)
        if self.loss_fn is not None:
            return self.loss_fn(self.model, inputs)
        output = self.model(**inputs)
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is None:
            raise ValueError("the model gives no loss: put labels into the batch, or give loss_fn(model, batch)")
        return found

    def weight(self, index: Tensor) -> int:
        """The number over which the loss of these rows is a mean: labels that are not −100, else rows."""
        labels = self.inputs.get("labels") if self.targets is None else self.targets
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return len(index)
        chosen = labels[index.to(labels.device)]
        if self.targets is None and chosen.ndim > 1 and str(getattr(self.model, "loss_type", "")).startswith("ForCausalLM"):
            chosen = chosen[:, 1:]  # the first token is predicted from nothing
        return int(chosen.ne(_IGNORED).sum())

    def split(self, size: int) -> Iterator[tuple[Tensor, float]]:
        """Consecutive rows, `size` at a time, each with its share of the whole mean; parts without a share are left out."""
        parts = torch.arange(self.n).split(size)
        weights = [self.weight(part) for part in parts]
        total = sum(weights)
        if not total:
            raise ValueError("no label counts: all are -100")
        yield from ((part, weight / total) for part, weight in zip(parts, weights) if weight)
