"""A training run of three steps on fake tensors, and the memory that it would have needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.catalogue import Variant
from lowdim.methods import Applied, Setup, strategy_for
from lowdim.plan.fake import LossFn, Subject, fake_batch, fake_mode, model_loss
from lowdim.plan.kernels import hidden_bytes
from lowdim.plan.measuring import optimizer_tensors
from lowdim.plan.tracker import Peak, Tracker, unique_bytes
from lowdim.plan.work import Work, speed

__all__ = ["Plan", "Rehearsal", "rehearse"]


@dataclass(frozen=True)
class Plan:
    """The training of a forecast: everything except the model."""

    variant: Variant
    batch_size: int
    sequence_length: int
    steps: int = 100
    lr: float = 1e-3
    gradient_checkpointing: bool = False
    layerwise: bool = False
    accumulate: int = 1
    batch: Callable[[], Any] | None = None
    loss_fn: LossFn = model_loss
    master_weights: bool = False

    @property
    def passes(self) -> int:
        """Forward passes of a rehearsed step: the third of an accumulated batch needs what the second needs."""
        return min(self.accumulate, 2)


@dataclass
class Rehearsal:
    """The memory and work of a rehearsed run.

    Attributes:
        peaks: the peak of each part of the run. A part is `(step, phase, place, index)`: the phase is `"forward"`, `"backward"`
            or `"optimizer"`, the place `"before"` the blocks, a block's index, or `"after"` them, the index that of the forward
            pass within an accumulated step.
        amounts: `trained`, `weight_bytes`, `file_bytes`, `flops` and `seconds` of one step.
        depth: number of blocks of the model, 0 if it has no stack of identical blocks.
    """

    peaks: dict[tuple[int, str, Any, int], Peak]
    amounts: dict[str, float] = field(default_factory=dict)
    depth: int = 0


def rehearse(subject: Subject, plan: Plan, depth: int | None = None) -> Rehearsal:
    """Build the model without memory, prepare it, and run a few steps.

    Three steps if the method recomputes something at intervals (a projection): the first creates the optimizer's state, the
    second is a usual step, the third recomputes with all state in place. Otherwise two.
    """
    variant, steps = _variant(plan)
    device = subject.device.type
    work = Work(speed(subject.dtype, device, torch.get_num_threads()))
    cuda = device == "cuda"
    tracker = Tracker(granularity=512 if cuda else 1, hidden=None if cuda else hidden_bytes, work=work.count)
    with fake_mode():
        model = subject.build(depth)
        weight_bytes = unique_bytes([*model.parameters(), *model.buffers()])
        plain_bytes = unique_bytes(model.state_dict().values())
        head = _head(model, subject.task)
        scratch = subject.task == "pretrain"
        setup = Setup(
            lr=plan.lr,
            steps=plan.steps,
            head=head,
            initialise=False,
            scratch=scratch,
            layerwise=plan.layerwise,
            accumulate=plan.passes,
            master_weights=plan.master_weights,
        )
        applied = strategy_for(variant).apply(model, setup)
        applied.model.train()
        if plan.gradient_checkpointing:
            _checkpoint(applied.model)
        tracker.add([*applied.model.parameters(), *applied.model.buffers()], "weights")
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: tracker.add([p.grad], "gradients"))
            for p in applied.model.parameters()
            if p.requires_grad
        ]
        optimizer = applied.start(plan.lr)
        tracker.add(optimizer_tensors(optimizer), "optimizer_state")
        batch = fake_batch(subject, plan.batch_size, plan.sequence_length) if plan.batch is None else plan.batch()
        tracker.add([t for t in batch.values() if isinstance(t, Tensor)] if isinstance(batch, dict) else [], "activations")
        stack = _stack(applied.model, depth if depth is not None else subject.depth)
        marks = _Marks(tracker, stack)
        with tracker:
            for step in range(1, steps + 1):
                work.on = step == 2
                _step(applied, optimizer, batch, plan, tracker, marks, work, step)
        for handle in (*hooks, *marks.handles):
            handle.remove()
        amounts = {
            "trained": applied.trained(),
            "weight_bytes": weight_bytes,
            "file_bytes": _file_bytes(applied, plain_bytes),
            "flops": work.flops,
            "seconds": work.seconds,
        }
    peaks = {key: peak for key, peak in tracker.peaks.items() if isinstance(key, tuple)}
    return Rehearsal(peaks, amounts, len(stack))


def _step(
    applied: Applied,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    plan: Plan,
    tracker: Tracker,
    marks: _Marks,
    work: Work,
    step: int,
) -> None:
    for index in range(plan.passes):
        marks.index, before = index, (work.flops, work.seconds)
        marks.begin(step, "forward", "before", "activations")
        loss = applied.loss(batch, plan.loss_fn).total
        loss = loss / plan.accumulate if plan.accumulate > 1 else loss
        marks.begin(step, "backward", "after", "workspace")
        loss.backward()
        extra = (getattr(p, "float_grad", None) for p in applied.model.parameters())  # of 8-bit weights, which have no .grad
        tracker.add([grad for grad in extra if grad is not None], "gradients")
        tracker.add(optimizer_tensors(optimizer), "optimizer_state")
    work.repeat(before, plan.accumulate - plan.passes)
    marks.begin(step, "optimizer", "before", "workspace")
    optimizer.step()
    tracker.add(optimizer_tensors(optimizer), "optimizer_state")
    applied.after_step(optimizer)
    optimizer.zero_grad()


class _Marks:
    """Hooks on the stack of blocks that report the current part of the step to the tracker."""

    def __init__(self, tracker: Tracker, stack: list[nn.Module]):
        self.tracker, self.count = tracker, len(stack)
        self.index = 0  # of the forward pass within its step
        self.now: tuple[int, str, Any, int] = (0, "forward", "before", 0)
        self.handles: list[Any] = []
        for index, block in enumerate(stack):
            self.handles.append(block.register_forward_pre_hook(self._entering(index), with_kwargs=True))
            self.handles.append(block.register_forward_hook(self._leaving(index)))

    def begin(self, step: int, phase: str, place: Any, kind: str | None = None) -> None:
        self.now = (step, phase, place, self.index)
        self.tracker.enter(self.now, kind)

    def _entering(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.now[1] != "forward":
                return  # recomputed by checkpointing
            self.begin(self.now[0], "forward", index)
            if index == 0:
                self._on_gradient([*args, *kwargs.values()], "before")

        return hook

    def _leaving(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if self.now[1] != "forward":
                return
            self._on_gradient(out if isinstance(out, (tuple, list)) else [out], index)
            if index == self.count - 1:
                self.begin(self.now[0], "forward", "after")

        return hook

    def _on_gradient(self, values: Any, place: Any) -> None:
        first = next((v for v in values if isinstance(v, Tensor) and v.requires_grad), None)
        if first is not None:
            first.register_hook(lambda grad: self.begin(self.now[0], "backward", place))


def _variant(plan: Plan) -> tuple[Variant, int]:
    """The variant as changed for forecasting, and the number of steps that cover everything."""
    strategy = strategy_for(plan.variant)
    strategy.check_layerwise(plan.layerwise)
    if strategy.refresh_interval is None:
        return plan.variant, 2
    return dataclasses.replace(plan.variant, options={**plan.variant.options, strategy.refresh_interval: 2}), 3


def _head(model: nn.Module, task: str) -> tuple[str, ...]:
    from lowdim.models import head_modules

    return head_modules(model, task)


def _stack(model: nn.Module, depth: int | None) -> list[nn.Module]:
    """The blocks: the first ModuleList of this length."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return list(next(lists, ())) if depth else []


def _checkpoint(model: nn.Module) -> None:
    # transformers 5 renames it
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} does not support it (it has no gradient_checkpointing_enable)"
        )
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]
    enable({"use_reentrant": False})


def _file_bytes(applied: Applied, plain_bytes: int) -> int:
    """Bytes of the tensors that are written at the end: the adapter with its head, or a whole plain model."""
    return plain_bytes if applied.adapted is None else unique_bytes(applied.adapted.state_dict().values())
