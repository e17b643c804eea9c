"""A training run of three steps on fake tensors, and the memory that it would have needed."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters import Adapted
from lowdim.adapters.core.update import WeightUpdate
from lowdim.calibrate import map_tensors
from lowdim.catalogue import Variant
from lowdim.garbage import isolated_gc
from lowdim.linalg import counting_pieces
from lowdim.methods import Applied, Setup, strategy_for
from lowdim.modules import more_when_plain
from lowdim.plan.alike import first_of_alike
from lowdim.plan.devices import as_one_of
from lowdim.plan.fake import LossFn, Subject, fake_batch, fake_mode, model_loss
from lowdim.plan.kernels import hidden_bytes
from lowdim.plan.measuring import optimizer_tensors
from lowdim.plan.tracker import Peak, Tracker, unique_bytes
from lowdim.plan.work import Work, speed
from lowdim.surgery import in_bfloat16

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
    head: tuple[str, ...] | None = None
    optimizer: str = "adamw"
    devices: int = 1
    bf16: bool = False

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
    second is a usual step, the third recomputes with all state in place. Otherwise two. With several devices it is the
    training of the first of them, under FSDP2.
    """
    variant, steps = _variant(plan)
    device = subject.device.type
    work = Work(speed(torch.bfloat16 if plan.bf16 else subject.dtype, device, torch.get_num_threads()))
    cuda = device == "cuda"
    tracker = Tracker(granularity=512 if cuda else 1, hidden=None if cuda else hidden_bytes, work=work.count)
    with isolated_gc(), as_one_of(plan.devices, device, tracker) as spread, fake_mode():
        model = subject.build(depth)
        weight_bytes = unique_bytes([*model.parameters(), *model.buffers()])
        plain_bytes = unique_bytes(model.state_dict().values()) + more_when_plain(model)
        head = _head(model, subject.task) if plan.head is None else plan.head
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
            optimizer=plan.optimizer,
        )
        with warnings.catch_warnings():  # of weights that are not reached, whose share depends on the depth: see `unreached`
            warnings.simplefilter("ignore", UserWarning)
            applied = strategy_for(variant).apply(model, setup)
        applied.model.train()
        if plan.gradient_checkpointing:
            _checkpoint(applied.model)
        spread(applied.model)
        tracker.add([*applied.model.parameters(), *applied.model.buffers()], "weights")
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: tracker.add([p.grad], "gradients"))
            for p in applied.model.parameters()
            if p.requires_grad
        ]
        tracker.trained = frozenset(p.shape for p in applied.model.parameters() if p.requires_grad)
        optimizer = applied.start(plan.lr)
        tracker.add(optimizer_tensors(optimizer), "optimizer_state")
        batch = fake_batch(subject, plan.batch_size, plan.sequence_length) if plan.batch is None else plan.batch()
        map_tensors(batch, lambda tensor: tracker.add([tensor], "activations"))
        stack = _stack(applied.model, depth if depth is not None else subject.depth)
        marks = _Marks(tracker, stack)
        computing = in_bfloat16(applied.model, device) if plan.bf16 else nullcontext()
        with tracker, counting_pieces(work), computing:
            _Steps(applied, optimizer, batch, plan, tracker, marks, work).run(steps)
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


class _Steps:
    """The steps of a rehearsal.

    Nothing acts beside most methods' steps: the second forward and backward pass allocate what the first did, on top of the
    optimizer's state. They are then not run again; each of their parts is known from the first, and only the optimizer steps.
    """

    def __init__(
        self,
        applied: Applied,
        optimizer: torch.optim.Optimizer,
        batch: Any,
        plan: Plan,
        tracker: Tracker,
        marks: _Marks,
        work: Work,
    ):
        self.applied, self.optimizer, self.batch, self.plan = applied, optimizer, batch, plan
        self.tracker, self.marks, self.work = tracker, marks, work
        freed_early = strategy_for(plan.variant).clips_itself(plan.layerwise)  # by the backward pass
        self.repeatable = plan.devices == 1 and not freed_early and _only_steps(applied)

    def run(self, steps: int) -> None:
        """Run `steps` steps; the work of the second is counted."""
        held, alike = dict(self.tracker.by_kind), False
        gradients: list[Any] = []
        for step in range(1, steps + 1):
            self.work.on = step == 2 or (step == 1 and self.repeatable)
            if alike:
                self._repeat(step, held)
            else:
                self._pass(step)
                gradients = self._gradients()
            self.work.on = step == 2
            self._update(step)
            alike = self.repeatable and self._unchanged(held, gradients)
            if step == 1 and not alike:
                self.work.flops, self.work.seconds = 0, 0.0  # the second step is counted as a whole
            if not alike:
                self.optimizer.zero_grad()

    def _pass(self, step: int) -> None:
        """The forward and backward passes of a step."""
        plan, tracker, work = self.plan, self.tracker, self.work
        for index in range(plan.passes):
            self.marks.index, before = index, work.now()
            self.marks.begin(step, "forward", "before", "activations")
            loss = self.applied.loss(self.batch, plan.loss_fn).total
            loss = loss / plan.accumulate if plan.accumulate > 1 else loss
            self.marks.begin(step, "backward", "after", "workspace")
            loss.backward()
            extra = (getattr(p, "float_grad", None) for p in self.applied.model.parameters())  # of 8-bit weights
            tracker.add([grad for grad in extra if grad is not None], "gradients")
            tracker.add(optimizer_tensors(self.optimizer), "optimizer_state")
        work.repeat(before, plan.accumulate - plan.passes)

    def _update(self, step: int) -> None:
        """The optimizer's step, and what comes after it."""
        self.marks.begin(step, "optimizer", "before", "workspace")
        alike = step > 1 and self.plan.devices == 1
        with first_of_alike(self.optimizer, self.tracker, self.work) if alike else nullcontext():
            self.optimizer.step()
        self.tracker.add(optimizer_tensors(self.optimizer), "optimizer_state")
        self.applied.after_step(self.optimizer)

    def _gradients(self) -> list[Any]:
        """References that do not hold the gradients, in the parameters' order."""
        grads = (p.grad for p in self.applied.model.parameters())
        return [None if grad is None else weakref.ref(grad) for grad in grads] if self.repeatable else []

    def _unchanged(self, held: dict[str, int], gradients: list[Any]) -> bool:
        """Whether all that the step has left are its gradients, as they were, and the optimizer's state."""
        now = self.tracker.by_kind
        if any(now[kind] != held[kind] for kind in ("weights", "activations", "workspace")):
            return False
        parameters = list(self.applied.model.parameters())
        kept = [None if grad is None else grad() for grad in gradients]
        return len(kept) == len(parameters) and all(p.grad is grad for p, grad in zip(parameters, kept))

    def _repeat(self, step: int, held: dict[str, int]) -> None:
        """The parts of the first step's passes, with what the optimizer holds now."""
        more = self.tracker.by_kind["optimizer_state"] - held["optimizer_state"]
        for key, peak in list(self.tracker.peaks.items()):
            if isinstance(key, tuple) and key[0] == 1 and key[1] != "optimizer":
                counts = {**peak.by_kind, "optimizer_state": peak.by_kind["optimizer_state"] + more}
                self.tracker.peaks[step, *key[1:]] = Peak(peak.total + more, peak.clock, counts)


def _only_steps(applied: Applied) -> bool:
    """Whether nothing acts beside the optimizer's steps: no schedule, no choice of ranks, no term in the loss."""
    adapted = applied.adapted
    if adapted is None or applied.companion is not None:
        return applied.companion is None
    hooks = ("step", "loss", "regularizer")
    own = [name for name in hooks if getattr(type(adapted), name) is not getattr(Adapted, name)]
    updates = {type(layer.update) for layer in adapted.layers.values()}
    own += [name for name in hooks[::2] for update in updates if getattr(update, name) is not getattr(WeightUpdate, name)]
    return not own


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
