"""Models without memory: built, or copied, with torch's fake tensors, which have shapes but no numbers."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowdim.errors import UnknownNameError, check_choice, check_int

__all__ = ["Subject", "fake_batch", "fake_mode"]

TASKS = ("classify", "causal-lm", "pretrain")


@dataclass(frozen=True)
class Subject:
    """The model of a forecast: how to build it at a given depth, and its label.

    Attributes:
        source: as given by the caller: a name, a folder, a transformers config, a function, or a module.
        label: for tables.
        config: the transformers config, if there is one.
    """

    source: Any
    label: str
    config: Any
    task: str
    num_labels: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        task: str = "classify",
        num_labels: int = 2,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Subject:
        """Resolve a name, folder, config, function or module.

        Raises:
            UnknownNameError: no such model, or no such task.
            TypeError: something else was given.
        """
        check_choice("task", task, TASKS)
        check_int("num_labels", num_labels, 1)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating torch.dtype such as torch.bfloat16; got {dtype!r}")
        place = torch.device(device)
        if place.type not in ("cpu", "meta") and not torch.accelerator.is_available():
            raise ValueError(
                f"device must be one that this torch supports, and {place.type} is not (cpu gives a close estimate)"
            )
        config, label = None, type(source).__name__
        if isinstance(source, (str, Path)):
            from lowdim.models import load_config, resolve

            config, label = load_config(str(source)), resolve(str(source)).label
        elif hasattr(source, "to_dict") and hasattr(source, "model_type"):
            config, label = source, f"{source.model_type} config"
        elif callable(source):  # a module, or a function that builds one
            label = getattr(source, "__name__", label)
        else:
            raise TypeError(
                f"model must be a name, a folder, a transformers config, a module or a function that builds one; got {source!r}"
            )
        return cls(source, label, config, task, num_labels, dtype, place)

    @property
    def depth(self) -> int | None:
        """Number of identical blocks in the model, if the config gives it and they are all of one kind."""
        layers = getattr(self.config, "num_hidden_layers", None)
        kinds = getattr(self.config, "layer_types", None) or ()
        return layers if isinstance(layers, int) and len(set(kinds)) <= 1 else None

    def build(self, depth: int | None = None) -> nn.Module:
        """The model in training mode; call it under `fake_mode`. `depth` overrides the number of blocks."""
        if self.config is not None:
            from lowdim.models import build

            config = copy.deepcopy(self.config)
            config.dtype = self.dtype
            if depth is not None:
                if getattr(config, "layer_types", None):
                    config.layer_types = [config.layer_types[0]] * depth
                config.num_hidden_layers = depth
            if self.task == "classify" and self.num_labels > 1 and getattr(config, "problem_type", None) is None:
                config.problem_type = "single_label_classification"  # otherwise some models read the labels to decide
            try:
                with _without_drawing(), self.device:
                    model: Any = build(config, self.task, num_labels=self.num_labels)
                for part in model.modules():
                    if hasattr(part, "tie_weights"):
                        part.tie_weights()  # normally part of initialising them
                        break
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
                raise UnknownNameError(f"a {config.model_type} model has no class for the task {self.task}") from error
        elif isinstance(self.source, nn.Module):
            model = _fake_copy(self.source)
        else:
            with self.device:
                model = self.source()
            if not isinstance(model, nn.Module):
                raise TypeError(f"model: the function must return an nn.Module; got {type(model).__name__}")
            if not all(isinstance(p, FakeTensor) for p in model.parameters()):
                raise TypeError(
                    "model: the function must build the model when it is called; this one returned an existing model"
                )
        return model.train()


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Inside the block, new tensors have shapes but no memory; the random state is restored afterwards."""
    with _without_packing(), torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextmanager
def _without_packing() -> Iterator[None]:
    """Tell transformers, which checks the numbers for packed sequences, that there are none.

    It cannot read fake tensors, and would then build a mask of `length²` entries that training does not have.
    """
    if "transformers" not in sys.modules:  # no config was read: a model of another kind
        yield
        return
    masks = importlib.import_module("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    find = getattr(masks, name, None)
    setattr(masks, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masks, name, find)


def fake_batch(subject: Subject, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    """A batch of the task: for classification with a mask that may hide tokens, for language modelling full blocks."""
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=subject.device)
    if subject.task != "classify":
        return {"input_ids": ids, "labels": ids.clone()}
    labels = torch.zeros(batch_size, dtype=torch.long, device=subject.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss as transformers models return it."""
    out = model(**batch)
    return out["loss"] if isinstance(out, Mapping) else out.loss


@contextmanager
def _without_drawing() -> Iterator[None]:
    """Transformers initialises no weights inside the block, if its version has such an option."""
    module = importlib.import_module("transformers.initialization")
    skip = getattr(module, "no_init_weights", nullcontext)
    with skip():
        yield


LossFn = Callable[[nn.Module, Any], Tensor]


def _fake_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with fake tensors; tied weights stay tied, nothing is allocated."""
    mode = active_fake_mode()
    assert mode is not None
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = fake
    for buffer in model.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer.detach())
    return copy.deepcopy(model, memo)
