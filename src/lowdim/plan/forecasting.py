"""Forecasts of memory and time in training, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lowdim.catalogue import Variant, variant
from lowdim.errors import BudgetError, check_choice, check_int
from lowdim.methods import OPTIMIZERS, strategy_for
from lowdim.methods.nesting import nested_sizes
from lowdim.plan.depths import rehearse_deep
from lowdim.plan.fake import LossFn, Subject, model_loss
from lowdim.plan.rehearse import Plan
from lowdim.plan.tracker import KINDS
from lowdim.results import Result
from lowdim.units import format_bytes, parse_bytes

__all__ = ["NOT_COUNTED", "Forecast", "affordable", "forecast"]

#: What no forecast counts, in words.
NOT_COUNTED = (
    "the program (about 300 MiB; on a GPU also its context), what the allocator keeps or loses between blocks, the data, "
    "and work that a method does once before training"
)


@dataclass(frozen=True)
class Forecast(Result):
    """The memory of training at its peak, by use.

    Attributes:
        method, label: name of the method, and for tables.
        model: label of the model.
        weights: bytes of parameters and buffers, the adapter's included.
        gradients, optimizer_state, activations: bytes at the moment of the peak.
        workspace: bytes of tensors that live within one operation, or between two operations of the backward pass; with several
            devices also weights that are gathered, and gradients on their way.
        total: the sum: the peak of the run, on the device that needs most.
        usual: the peak of a step that refreshes nothing and creates no state; equals `total` for most methods.
        peak_at: `"forward"`, `"backward"` or `"optimizer"`: where in the step the peak is.
        trained_parameters: number of trained parameters.
        file_bytes: bytes of the tensors that are written at the end: the adapter, or a plain model.
        flops: floating-point operations of one step, all of its batches, matrix products and convolutions only.
        seconds_per_step: a rough estimate from this machine's speed; see `lowdim.plan.work`.
        batch_size, sequence_length, accumulate: of one forward pass, and the number of them in an optimizer step.
        budget_bytes, fits: the budget that was given, and whether `total` is within it.
        depths: the rehearsed depths, if the model's own depth was extrapolated from them.
        dtype, gradient_checkpointing, layerwise, quantize, optimizer, bf16: as given.
        kind: of the method, as in its catalogue row.
        vocabulary: the number of words of the model, where its configuration says.
        devices: the number of devices over which FSDP2 spreads the model. All bytes are those of one of them (but for the
            file); the batch is that of one of them.
        parts: the peak of each part of the run by use, as `{"step": 1, "phase": "forward", "weights": ..., ...}`.
    """

    left_out: ClassVar[tuple[str, ...]] = ("parts",)

    method: str
    label: str
    model: str
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    workspace: int
    total: int
    usual: int
    peak_at: str
    trained_parameters: int
    file_bytes: int
    flops: int
    seconds_per_step: float
    batch_size: int
    sequence_length: int
    budget_bytes: int | None = None
    depths: tuple[int, ...] = ()
    accumulate: int = 1
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    layerwise: bool = False
    kind: str = ""
    vocabulary: int | None = None
    quantize: str | None = None
    optimizer: str = "adamw"
    devices: int = 1
    bf16: bool = False
    parts: tuple[dict[str, Any], ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the budget; None without a budget."""
        return None if self.budget_bytes is None else self.total <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields, the verdict on the budget and what is not counted, as strict JSON."""
        return {**super().to_dict(), "fits": self.fits, "not_counted": NOT_COUNTED}

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.label}: {format_bytes(self.total)} at the peak, {self.trained_parameters:,} trained parameters"

    def __str__(self) -> str:
        return self.summary

    def _table(self) -> list[dict[str, Any]]:
        parts = ("weights", "gradients", "optimizer_state", "activations", "workspace", "total")
        return [{"at the peak": name.replace("_", " "), "size": format_bytes(getattr(self, name))} for name in parts]


def forecast(
    model: Any,
    method: str | Variant,
    *,
    batch_size: int = 16,
    sequence_length: int = 128,
    task: str = "classify",
    num_labels: int = 2,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    layerwise: bool = False,
    accumulate: int = 1,
    master_weights: bool = False,
    steps: int = 100,
    budget_bytes: int | str | None = None,
    device: str | torch.device = "cpu",
    batch: Callable[[], Any] | None = None,
    loss_fn: LossFn = model_loss,
    problem: str | None = None,
    head: Sequence[str] | None = None,
    quantize: str | None = None,
    optimizer: str = "adamw",
    devices: int = 1,
    bf16: bool = False,
) -> Forecast:
    """Memory and time of training `model` by `method`, from shapes alone: nothing of the model is allocated.

    A training run of two or three steps uses the real method and optimizer on tensors that have shapes but no numbers, and
    counts every storage while it is alive. On a CPU this is exact for memory from torch's allocator. A deep stack of identical
    blocks is rehearsed with 2 and 4 blocks, and each part of the step is extrapolated linearly, which is exact as well.

    Not included: the interpreter and torch themselves (about 300 MB), a GPU's context, memory that libraries allocate on their
    own, what the allocator keeps between blocks, the data, the copy that is read from disk, and one-time work of a method
    before training (a decomposition, statistics of data).

    Args:
        model: a name, a folder, a transformers config, an nn.Module (of which a fake copy is made), or a function without
            arguments that builds one.
        method: a name from the catalogue, or a `Variant`.
        batch_size, sequence_length: of one forward pass.
        task: such as `"classify"`, `"instruct"`, `"image"` (`lowdim.models.forms.FORMS`): the model's class and what a batch
            holds. Images have the size and the channels of the configuration.
        dtype: of the weights, if the model is built from its configuration.
        gradient_checkpointing: recompute each block in the backward pass.
        layerwise: `lowdim.optim` methods only: update each parameter as soon as its gradient is ready, and free the gradient.
        accumulate: forward passes of an optimizer step; from the second on, the gradients of the first are held.
        master_weights: keep a float32 copy of every trained 16-bit weight in the optimizer.
        steps: optimizer steps in all, for methods with schedules.
        budget_bytes: a number or a text such as `"8GiB"`; sets `fits`.
        device: the device of the training. Attention kernels differ between devices, and a forecast for another kind of device
            needs a torch that was built for it.
        batch: a function without arguments that makes a batch, for models with other inputs (called under the fake mode).
        loss_fn: `loss_fn(model, batch) -> scalar`, if it is not `model(**batch).loss`.
        problem: the model's `problem_type`, if it is not the task's usual one, such as `"multi_label_classification"`.
        head: names of modules that every method trains in full; None: the head that the task adds.
        quantize: `"int8"`, `"int4"` or `"nf4"`: the weights of the base's linear layers are kept in few bits, and built in
            the dtype of the model for each product.
        optimizer: `"adamw"`, or `"adamw8bit"` with moments in 8 bits; for methods without an optimizer of their own.
        devices: spread the model over so many by FSDP2, as `lowdim.surgery.shard` does; `batch_size` is for each of them, and
            gradients are reduced after each pass.
        bf16: the forward pass runs in bfloat16 by autocast, and the weights keep their dtype.

    Raises:
        UnknownNameError: no such model, method, kind of quantization or optimizer.
        ValueError: `bf16` with several devices, where FSDP2 casts in its own way.
        ValueError: the method cannot train this model (the message is its own), such as a quantized base.
        TypeError: `batch` or `loss_fn` is not a function, or the model does not accept the batch.

    Example:
        >>> import torch
        >>> from lowdim.plan import forecast
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 2))
        >>> f = forecast(build, "full", batch=lambda: torch.ones(8, 1000), loss_fn=lambda m, x: m(x).sum())
        >>> f.trained_parameters, f.optimizer_state // f.weights
        (1003002, 2)
    """
    check_int("batch_size", batch_size, 1)
    check_int("sequence_length", sequence_length, 1)
    check_int("accumulate", accumulate, 1)
    check_int("steps", steps, 1)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_int("devices", devices, 1)
    if bf16 and devices > 1:
        raise ValueError(f"bf16 is forecast on one device: FSDP2 casts in its own way; got devices={devices}")
    _check_functions(batch, loss_fn)
    chosen = method if isinstance(method, Variant) else variant(method)
    strategy_for(chosen).check_quantize(quantize)
    strategy_for(chosen).check_optimizer(optimizer)
    if chosen.nested and loss_fn is model_loss:
        loss_fn = _nested_loss(chosen, task)
    subject = Subject.of(
        model, task=task, num_labels=num_labels, dtype=dtype, device=device, problem=problem, quantize=quantize, head=head
    )
    plan = Plan(
        variant=chosen,
        batch_size=batch_size,
        sequence_length=sequence_length,
        steps=steps,
        lr=chosen.rates[0],
        gradient_checkpointing=gradient_checkpointing,
        layerwise=layerwise,
        accumulate=accumulate,
        master_weights=master_weights,
        batch=batch,
        loss_fn=loss_fn,
        head=None if head is None else tuple(head),
        optimizer=optimizer,
        devices=devices,
        bf16=bf16,
    )
    try:
        rehearsal, depths = rehearse_deep(subject, plan)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        why = f"it reads the values of tensors ({error.func}), and a forecast has none"
        raise ValueError(f"{chosen.label} on {subject.label} cannot be forecast: {why}") from error
    except TypeError as error:
        if subject.config is not None or batch is not None or "unexpected keyword" not in str(error):
            raise
        wanted = "give batch= (a function that makes what it reads) and loss_fn= (its loss)"
        raise TypeError(f"{subject.label} does not read token ids: {wanted}") from error
    except (
        RuntimeError,
        AttributeError,
        AssertionError,
    ) as error:  # an operation that cannot run on shapes alone, a model of another kind
        raise ValueError(f"{chosen.label} on {subject.label} cannot be forecast: {error}") from error
    stretch = max(rehearsal.peaks, key=lambda key: rehearsal.peaks[key].total)
    peak = rehearsal.peaks[stretch]
    usual = max(p.total for key, p in rehearsal.peaks.items() if key[0] == 2)
    amounts = rehearsal.amounts
    return Forecast(
        method=chosen.name,
        label=chosen.label,
        model=subject.label,
        **peak.by_kind,
        total=peak.total,
        usual=usual,
        peak_at=stretch[1],
        trained_parameters=int(amounts["trained"]),
        file_bytes=int(amounts["file_bytes"]),
        flops=int(amounts["flops"]),
        seconds_per_step=float(f"{amounts['seconds']:.3g}"),
        batch_size=batch_size,
        sequence_length=sequence_length,
        budget_bytes=parse_bytes(budget_bytes) if isinstance(budget_bytes, str) else budget_bytes,
        depths=depths,
        accumulate=accumulate,
        dtype=str(dtype).removeprefix("torch."),
        gradient_checkpointing=gradient_checkpointing,
        layerwise=layerwise,
        kind=chosen.kind,
        vocabulary=subject.vocabulary,
        quantize=quantize,
        optimizer=optimizer,
        devices=devices,
        bf16=bf16,
        parts=tuple({"step": key[0], "phase": key[1], **part.by_kind} for key, part in rehearsal.peaks.items()),
    )


def _nested_loss(chosen: Variant, task: str) -> LossFn:
    """The loss of a method that trains embeddings of several sizes."""
    if (reason := chosen.unfit(task)) is not None:
        raise ValueError(f"method {chosen.name}: {reason}")

    def loss(model: Any, batch: Any) -> torch.Tensor:
        config = model.config
        return model.nested_loss(batch, nested_sizes(chosen.nested, config.num_hidden_layers, config.hidden_size))

    return loss


def _check_functions(batch: Any, loss_fn: Any) -> None:
    if batch is not None and not callable(batch):
        raise TypeError(
            f"batch must be a function without arguments that makes a batch, such as lambda: torch.ones(2, 8); "
            f"got a {type(batch).__name__}: nothing of it is allocated, so it is made while the forecast runs"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function loss_fn(model, batch) -> scalar; got a {type(loss_fn).__name__}")


def affordable(forecasts: Iterable[Forecast], budget: int | str) -> list[Forecast]:
    """The forecasts whose peak is within the budget, least memory first.

    Raises:
        BudgetError: none is; the error names the smallest need, and how to reduce it.
    """
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    ordered = sorted(forecasts, key=lambda f: f.total)
    chosen = [f for f in ordered if f.total <= limit]
    if not chosen and ordered:
        least = ordered[0]
        parts = {kind: getattr(least, kind) for kind in KINDS}
        largest = max(parts, key=lambda kind: parts[kind])
        need, missing = format_bytes(least.total), format_bytes(least.total - limit)
        take = "take" if largest.endswith("s") else "takes"
        raise BudgetError(
            f"nothing fits {format_bytes(limit)}: the smallest need is {need} ({least.label}), so {missing} are missing; "
            f"{largest.replace('_', ' ')} {take} {format_bytes(parts[largest])}; try {_advice(largest, least, ordered)}"
        )
    return chosen


def _advice(largest: str, least: Forecast, tried: Iterable[Forecast]) -> str:
    """What would reduce the largest part, without what was tried or set already."""
    kinds, layerwise = {f.kind for f in tried}, any(f.layerwise for f in tried)
    batch = [("a smaller batch", least.batch_size > 1), ("shorter sequences", least.sequence_length > 1)]
    kept = [
        ("an adapter", "adapter" not in kinds),
        ("galore", "optimizer" not in kinds and least.kind != "adapter"),
        ("layerwise updates of a lowdim.optim method", not layerwise and least.kind != "adapter"),
        ("a smaller rank", least.kind in ("adapter", "optimizer", "layer")),
    ]
    steps = {
        "weights": [
            ("bfloat16 weights", least.dtype == "float32"),
            ("a quantized base (--quantize nf4)", least.quantize is None and least.kind == "adapter"),
        ],
        "gradients": kept,
        "optimizer_state": kept,
        "activations": [*batch, ("gradient checkpointing", not least.gradient_checkpointing)],
        "workspace": batch,
    }
    open_ = [text for text, sensible in steps[largest] if sensible]
    return " or ".join([*open_, "a smaller model"])
