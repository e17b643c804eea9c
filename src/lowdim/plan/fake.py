"""Models without memory: built, or copied, with torch's fake tensors, which have shapes but no numbers."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from lowdim.errors import UnknownNameError, check_int
from lowdim.models.forms import form_of
from lowdim.modules import quantize_base, scheme_named

__all__ = ["Subject", "fake_batch", "fake_memo", "fake_mode", "faked"]


@dataclass(frozen=True)
class Subject:
    """The model of a forecast: how to build it at a given depth, and its label.

    Attributes:
        source: as given by the caller: a name, a folder, a transformers config, a function, or a module.
        label: for tables.
        config: the transformers config, if there is one.
        problem: the model's `problem_type`, if it is not the task's usual one.
        quantize: `"int8"`, `"int4"` or `"nf4"`: the base's linear weights are kept in few bits; None.
        head: modules that stay dense then; None: those that the task adds.
    """

    source: Any
    label: str
    config: Any
    task: str
    num_labels: int
    dtype: torch.dtype
    device: torch.device
    problem: str | None = None
    quantize: str | None = None
    head: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        task: str = "classify",
        num_labels: int = 2,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        problem: str | None = None,
        quantize: str | None = None,
        head: Iterable[str] | None = None,
    ) -> Subject:
        """Resolve a name, folder, config, function or module.

        Raises:
            UnknownNameError: no such model, or no such task.
            TypeError: something else was given.
        """
        form_of(task)
        check_int("num_labels", num_labels, 1)
        if quantize is not None:
            scheme_named(quantize)
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
        kept = None if head is None else tuple(head)
        return cls(source, label, config, task, num_labels, dtype, place, problem, quantize, kept)

    @property
    def kind(self) -> str | None:
        """The `problem_type` that the model gets; None for the usual one of its labels."""
        return self.problem or form_of(self.task).problem

    @property
    def chooses(self) -> bool:
        """Whether the model chooses one class of several for each row."""
        form = form_of(self.task)
        return form.head and form.labels == "row" and self.kind is None and self.num_labels > 1

    @property
    def depth(self) -> int | None:
        """Number of identical blocks in the model, if the config gives it and they are all of one kind."""
        layers = getattr(self.config, "num_hidden_layers", None)
        kinds = getattr(self.config, "layer_types", None) or ()
        staged = hasattr(self.config, "depths")  # Swin, ConvNext: blocks of several sizes
        return layers if isinstance(layers, int) and len(set(kinds)) <= 1 and not staged else None

    @property
    def vocabulary(self) -> int | None:
        """The number of words, if the config gives it."""
        text = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        size = getattr(text, "vocab_size", None)
        return size if isinstance(size, int) else None

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
            if self.chooses and getattr(config, "problem_type", None) is None:
                config.problem_type = "single_label_classification"  # otherwise some models read the labels to decide
            try:
                with _without_drawing(), _real_rates(), self.device:
                    model: Any = build(config, self.task, num_labels=self.num_labels, problem=self.problem)
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
        if self.quantize is not None:
            from lowdim.models import head_modules

            keep = head_modules(model, self.task) if self.head is None else self.head
            quantize_base(model, self.quantize, keep=keep, initialise=False)
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
    """A batch of the task: for texts of their own with a mask that may hide tokens, for language modelling full blocks."""
    form = form_of(subject.task)
    if form.inputs == "pixels":
        return _images(subject, batch_size)
    ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=subject.device)
    if form.labels == "block":
        return {"input_ids": ids, "labels": ids.clone()}
    if form.pairs:
        ids = torch.cat([ids, ids])
    labels = ids.clone() if form.labels == "token" else _labels(subject, batch_size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _labels(subject: Subject, batch_size: int) -> Tensor:
    """A label for each row: a class, a number, or a row of ones and zeros."""
    several = subject.kind == "multi_label_classification"
    shape = (batch_size, subject.num_labels) if several else (batch_size,)
    return torch.zeros(shape, dtype=torch.long if subject.kind is None else torch.float32, device=subject.device)


def faked(tensor: Tensor) -> Tensor:
    """The tensor without its numbers, inside `fake_mode`: a batch of real rows becomes that of a forecast."""
    mode = active_fake_mode()
    return tensor if mode is None or isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)


def _images(subject: Subject, batch_size: int) -> dict[str, Tensor]:
    """Images of the size that the configuration names."""
    size = getattr(subject.config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(subject.config, "num_channels", None) or 3
    pixels = torch.zeros(batch_size, channels, height, width, dtype=subject.dtype, device=subject.device)
    return {"pixel_values": pixels, "labels": _labels(subject, batch_size)}


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


class _Real(Tensor):
    """A tensor with numbers, also within a fake mode."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})


@contextmanager
def _real_rates() -> Iterator[None]:
    """Ranges that are asked for on the CPU have numbers: image models read the rates at which they drop paths from one."""
    usual = torch.linspace

    def linspace(*args: Any, **how: Any) -> Tensor:
        if str(how.get("device")) != "cpu":
            return usual(*args, **how)
        with unset_fake_temporarily():
            return usual(*args, **how).as_subclass(_Real)

    torch.linspace = linspace
    try:
        yield
    finally:
        torch.linspace = usual


LossFn = Callable[[nn.Module, Any], Tensor]


def _fake_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with fake tensors; tied weights stay tied, nothing is allocated."""
    mode = active_fake_mode()
    assert mode is not None
    return copy.deepcopy(model, fake_memo(model, mode))


def fake_memo(model: nn.Module, mode: FakeTensorMode) -> dict[int, Any]:
    """What `copy.deepcopy` needs to put fake tensors in the place of the model's."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        fake = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = fake
    for buffer in model.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer.detach())
    return memo
