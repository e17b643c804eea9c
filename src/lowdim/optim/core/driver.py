"""One driver for every projected optimizer: groups, hooks, checkpoints, and the step composed of the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg import has_numbers, stream_on
from lowdim.optim.core import dense, sharded
from lowdim.optim.core.checking import (
    STATE_VERSION,
    check_full_gradient,
    check_masters,
    check_params,
    check_saved_group,
    restored,
)
from lowdim.optim.core.inner import AdamWRule
from lowdim.optim.core.parts import DenseStore, Layout, Parts, State
from lowdim.optim.core.progress import Progress
from lowdim.optim.core.projectors import Identity
from lowdim.optim.core.rounding import MASTER, is_half, master
from lowdim.optim.core.watch import Watcher, square, subspace_numbers

__all__ = ["ProjectedOptimizer"]


class ProjectedOptimizer(torch.optim.Optimizer):
    """Base of the family: a composition defines `parts` and `check_group`, and inherits everything else.

    Args:
        params: as in torch: parameters, named parameters, or groups.
        defaults: hyperparameters that a group may set for itself.
        layerwise: update a parameter as soon as its gradient is ready, in the backward pass, and free the gradient.
        accumulate: micro-batches per step, for `layerwise` only. While the subspace is fixed the *projected* gradient is
            summed, which is exact because projecting is linear; the full gradient is kept only in steps that choose a subspace.
            `step()` completes a step with fewer micro-batches (the last of an epoch).
        max_norm: clip by the global norm of the inner rules' input: projected gradients, and the gradients of unprojected
            parameters. It is at most the norm of the full gradients. With `layerwise` the projected gradients are then kept
            until `step()`, when all are known; full gradients are still freed immediately.
        replicas: with `layerwise` in several processes that hold the same parameters: average gradients over them here
            (projected ones while the subspace is fixed, which is `rank / side` of the traffic). Do not wrap such a model in
            DDP, which would average too late; under FSDP2 gradients are already averaged and this is not needed. False: each
            process has its own parameters. None: raise an error in several processes.
        stagger: choose the subspaces of different parameters at different steps; the first step still chooses all.
        foreach: update the unprojected parameters of a group in one fused call if that gives the same result.
        master_weights: keep a float32 copy of every 16-bit parameter in the state, and update that. Otherwise 16-bit parameters
            are rounded stochastically, from numbers that depend on `seed`, the parameter's place and the step.

    Class attributes for compositions:
        method: name that a checkpoint carries.
        structural: group keys that fix the shape and meaning of the state; loading a checkpoint with others is an error.
        keeps_small_updates: of 16-bit weights: see `lowdim.companion.warn_of_lost_updates`.
        hides_gradients: whether its weights have no `.grad` that a trainer could clip (INT8).
    """

    method: str = "projected"
    hides_gradients: bool = False
    keeps_small_updates: bool = True
    structural: tuple[str, ...] = ("rank",)

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        layerwise: bool = False,
        accumulate: int = 1,
        max_norm: float | None = None,
        replicas: bool | None = None,
        stagger: bool = False,
        foreach: bool = True,
        master_weights: bool = False,
    ):
        check_int("accumulate", accumulate, 1)
        if accumulate > 1 and not layerwise:
            raise ValueError(
                f"accumulate={accumulate} needs layerwise=True; otherwise .grad itself is the sum over micro-batches"
            )
        if max_norm is not None:
            check_float("max_norm", max_norm, 0.0, low_open=True)
        if replicas and not layerwise:
            raise ValueError("replicas=True needs layerwise=True; otherwise wrap the model in DDP, which averages .grad")
        self.layerwise, self.accumulate, self.max_norm = layerwise, accumulate, max_norm
        self.replicas, self.foreach = replicas, foreach
        self._start()
        shared = {"stagger": stagger, "master_weights": master_weights, "method": self.method, "version": STATE_VERSION}
        super().__init__(params, {**defaults, **shared})

    def _start(self) -> None:
        """Set the attributes that are not part of a checkpoint."""
        self._home: dict[Tensor, int] = {}
        self._handles: list[Any] = []
        self._waiting: dict[Tensor, Tensor] = {}  # low gradients, until the norm of all of them is known
        self._used: set[Tensor] = set()  # layerwise: whose gradient of this step has been used in a backward pass
        self._progress = Progress(self.method)
        self.watcher = Watcher()

    # Methods that a composition defines.

    @staticmethod
    def prepare_model(model: Any, *, rank: Any, **_: Any) -> Any:
        """The model with its weights as this optimizer stores them; unchanged where it stores them as they are."""
        return model

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The parts for parameters of this many dimensions in this group, from the group's current hyperparameters."""
        raise NotImplementedError

    def parts_of(self, p: Tensor, group: dict[str, Any]) -> Parts:
        """The parts for one parameter of this group."""
        return self.parts(group, p.ndim)

    def layout_of(self, p: Tensor, group: dict[str, Any]) -> Layout:
        """Every tensor of fixed size in the state of one parameter of this group."""
        parts, shape = self.parts_of(p, group), tuple(p.shape)
        masters: Layout = {MASTER: (shape, torch.float32)} if self._has_master(p, group) else {}
        return {**parts.layout(shape, parts.store.dtype(p)), **masters}

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError/TypeError for hyperparameters or shapes that cannot work."""

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is checked first."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            check_params(group["params"], index)
            check_masters(group)
            self.check_group(group)
            for p in group["params"]:
                self.parts_of(p, group).store.check(p)
            if any(self.parts_of(p, group).residual.full_size for p in group["params"]):
                check_full_gradient(self.method, self.layerwise, self.accumulate, self.max_norm)
        except Exception:
            self.param_groups.pop()
            raise
        self._adopt(index)

    def _adopt(self, index: int) -> None:
        group = self.param_groups[index]
        for p in group["params"]:
            self._home[p] = index
            if self.layerwise:
                handle = self.parts_of(p, group).store.watch(p, self._after_backward)
                if handle is not None:
                    self._handles.append(handle)

    def remove_hooks(self) -> None:
        """Stop updating in the backward pass (layerwise only), for instance before switching to another optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Stepping.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self.layerwise:
            self._finish()
            self._used.clear()
        elif self.max_norm is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    parts = self.parts_of(p, group)
                    if (grad := self._gradient(p, parts)) is not None:
                        self._wait(p, grad, group, parts)
            self._release()
        else:
            for group in self.param_groups:
                self._step_group(group)
        self.watcher.end()
        return loss

    def _finish(self) -> None:
        """Layerwise: finish steps with few micro-batches, gradients set elsewhere, and low gradients that wait for clipping."""
        for group in self.param_groups:
            for p in group["params"]:
                parts = self.parts_of(p, group)
                if self.state.get(p, {}).get("micro", 0):
                    self._last_micro_batch(p, group, parts)
                elif (grad := self._gradient(p, parts)) is not None:
                    self._use(p, grad, group, parts)
                    parts.store.drop(p)
        if self._waiting:
            self._release()

    def _wait(self, p: Tensor, grad: Tensor | None, group: dict[str, Any], parts: Parts, low: Tensor | None = None) -> None:
        """Keep the low gradient until `_release`."""
        state = self.state[p]
        self._waiting[p] = self._project(p, grad, group, state, state.get("step", 0), parts) if low is None else low

    def _release(self) -> None:
        """Clip the low gradients by their global norm, and step."""
        squares = [square(low) for low in self._waiting.values()]
        if not squares:
            return
        assert self.max_norm is not None
        wide = max((s.dtype for s in squares), key=lambda dtype: dtype.itemsize)
        norm = torch.stack([s.to(squares[0].device, wide) for s in squares]).sum().sqrt()
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.watcher.clipped(norm)
        for p, low in self._waiting.items():
            group = self.param_groups[self._home[p]]
            small = sharded.replicate(factor.to(device=low.device, dtype=low.dtype), low)
            self._update(p, None, group, self.parts_of(p, group), low=low * small)
        self._waiting.clear()

    def _step_group(self, group: dict[str, Any]) -> None:
        parts: dict[tuple[int, torch.dtype], Parts] = {}
        fused: dict[int, list[tuple[Tensor, Tensor, State]]] = {}  # by number of steps done
        for p in group["params"]:
            kind = p.ndim, p.dtype
            if kind not in parts:
                parts[kind] = self.parts_of(p, group)
            own = parts[kind]
            grad = self._gradient(p, own)
            if grad is None:
                continue
            plain = isinstance(own.projector, Identity) and not own.residual.full_size
            if self.foreach and plain and dense.can_fuse(p, grad, own.inner):
                state = self.state[p]
                if "step" not in state:
                    own.inner.init(grad, state)
                self.watcher.saw(grad, None)
                fused.setdefault(state.get("step", 0), []).append((p, grad, state))
            else:
                self._update(p, grad, group, own)
        for step, rows in fused.items():
            own = parts[rows[0][0].ndim, rows[0][0].dtype]
            assert isinstance(own.inner, AdamWRule)
            dense.fused_step(
                *map(list, zip(*rows)),  # type: ignore[arg-type]
                step=step,
                rule=own.inner,
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                decay_after=own.decay == "after",
            )

    def _gradient(self, p: Tensor, parts: Parts) -> Tensor | None:
        grad = parts.store.grad(p)
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(f"gradients must be dense; {self._label(p)} has a gradient of layout {grad.layout}")
        return grad

    def _update(self, p: Tensor, grad: Tensor | None, group: dict[str, Any], parts: Parts, low: Tensor | None = None) -> None:
        """The step of one parameter, from its gradient, or from an already projected low gradient."""
        state, projector, inner, residual = self.state[p], parts.projector, parts.inner, parts.residual
        step = state.get("step", 0)
        a = None
        if low is None:
            assert grad is not None
            a = residual.before(grad, state)
            low = self._project(p, a, group, state, step, parts)
        if not inner.elementwise:
            low = sharded.gather(low)
        if "step" not in state:
            inner.init(low, state)
        lr, decay = float(group["lr"]), group["weight_decay"]
        store, masters = parts.store, self._has_master(p, group)
        generator = self._generator(p, step, group) if store.rounds(p) and not masters else None
        # A 16-bit weight that is not projected is read, updated and rounded piece by piece.
        direct = is_half(p) and not masters and isinstance(store, DenseStore) and dense.can_walk(p.detach(), low, state, parts)
        weight = master(p.detach(), state) if masters else p.detach() if direct else store.read(p)
        shrink = inner.rate(step, lr, weight) * decay if decay else 0.0  # reads the weight before it changes
        kept = 1.0 if isinstance(shrink, Tensor) else 1.0 - shrink  # decay is then part of the multiply-add
        if direct or dense.can_walk(weight, low, state, parts):
            dense.walk(weight, low, state, parts, step, lr, kept, generator)
        else:
            D, eta = inner.direction(low, state, step, lr, weight)
            before = parts.decay == "before"
            if isinstance(shrink, Tensor) and before:  # a rate that is a tensor stays on its device
                weight.mul_(1 - shrink)
            size = eta if before else eta * kept  # decay after the update shrinks the update too
            if not residual.fused(weight, a, low, D, projector, state, step_size=size, beta=kept):
                extra = None if a is None else residual.after(a, low, D, projector, state)
                projector.add_up(weight, D, state, alpha=-size * projector.scale, beta=kept)
                if extra is not None:
                    weight.add_(sharded.match(extra, weight), alpha=-size)
            if isinstance(shrink, Tensor) and not before:
                weight.mul_(1 - shrink)
        if masters:
            p.detach().copy_(weight)
        elif not direct:
            store.write(p, weight, generator)
        state["step"] = step + 1

    def _project(self, p: Tensor, a: Any, group: dict[str, Any], state: State, step: int, parts: Parts) -> Tensor:
        projector = parts.projector
        if group["stagger"] and "phase" not in state and projector.interval is not None:
            state["phase"] = self._phase(p, projector.interval)
        due = projector.due(state, step) and has_numbers(a)  # a forecast chooses nothing
        if due:
            self._progress.begin(step)
        try:
            changed = projector.prepare(a, state, step)
        except ValueError as error:
            raise ValueError(f"{self._label(p)}: {error}") from error
        if due:
            self._progress.chosen(len(self._projected()) if step == 0 or not group["stagger"] else 1)
        if changed and parts.rotate and step > 0:
            rotation = projector.rotation(state)
            if rotation is not None:
                parts.inner.rotate(state, *rotation)
        low = projector.down(a, state)
        if self.accumulate == 1:
            self.watcher.saw(a, None if isinstance(projector, Identity) else low)
        return low

    def _phase(self, p: Tensor, interval: int) -> int:
        """The number of steps by which this parameter is due earlier; spread evenly over an interval, from 0."""
        projected = self._projected()
        place = next(i for i, q in enumerate(projected) if q is p)
        return -(place * interval // len(projected)) % interval

    def _projected(self) -> list[Tensor]:
        return [p for group in self.param_groups if group.get("rank") is not None for p in group["params"]]

    def log(self) -> dict[str, float]:
        """Numbers of the last step for a training log (reads tensors: call it when you log, not every step).

        `energy`: share of the gradients' energy in their subspaces when these were chosen, mean over parameters; `overlap`:
        share of a new subspace that was in the previous one, likewise. With `optimizer.watcher.on = True` also
        `true_grad_norm`, of the full gradients (not where projected gradients are summed over micro-batches), `projected_norm`,
        and `captured`, the share of the projected parameters' energy that the subspaces hold now.
        """
        states = [self.state[p] for group in self.param_groups for p in group["params"] if p in self.state]
        return {**self.watcher.numbers(), **subspace_numbers(states)}

    # Stepping inside the backward pass.

    @torch.no_grad()
    def _after_backward(self, p: Tensor) -> None:
        group = self.param_groups[self._home[p]]
        parts = self.parts_of(p, group)
        grad = self._gradient(p, parts)
        if grad is None:
            return
        if self.replicas is None:
            sharded.check_alone(p, self._label)
        self._check_first(p)
        with torch.autocast(p.device.type, enabled=False):  # a backward under autocast would round the products
            if self.accumulate == 1:
                self._use(p, grad, group, parts)
                parts.store.drop(p)
                self._used.add(p)
            else:
                self._accumulate(p, grad, group, parts)

    def _check_first(self, p: Tensor) -> None:
        """Raise RuntimeError at a second update of a parameter within one step."""
        if p not in self._used:
            return
        raise RuntimeError(
            f"layerwise=True, accumulate={self.accumulate}: a backward pass gives {self._label(p)} a gradient, but its "
            "update of this step was already made; it would be updated twice. Set accumulate to the number of backward passes "
            "between two calls of step(), and call step() after them"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; with `layerwise` it also ends a step."""
        super().zero_grad(set_to_none)
        self._used.clear()

    def _use(self, p: Tensor, grad: Tensor | None, group: dict[str, Any], parts: Parts, low: Tensor | None = None) -> None:
        """Step, or keep the low gradient."""
        if self.replicas:
            if low is None and grad is not None and not self._keeps_full(parts, self.state[p]):
                low = self._project(p, grad, group, self.state[p], self.state[p].get("step", 0), parts)
            sharded.average(grad if low is None else low)
        if self.max_norm is None:
            self._update(p, grad, group, parts, low=low)
        else:
            self._wait(p, grad, group, parts, low=low)

    def _accumulate(self, p: Tensor, grad: Tensor, group: dict[str, Any], parts: Parts) -> None:
        state = self.state[p]
        state["micro"] = state.get("micro", 0) + 1
        if not self._keeps_full(parts, state):
            low = parts.projector.down(grad, state).to(torch.promote_types(grad.dtype, torch.float32))
            total = state.pop("low_sum", None)
            state["low_sum"] = low if total is None else total.add_(low)
            parts.store.drop(p)
        if state["micro"] == self.accumulate:
            self._last_micro_batch(p, group, parts)
            self._used.add(p)

    def _keeps_full(self, parts: Parts, state: State) -> bool:
        """Whether this step needs the full gradient, summed in its usual place."""
        whole = isinstance(parts.projector, Identity) or parts.residual.full_size
        return whole or parts.projector.due(state, state.get("step", 0))

    def _last_micro_batch(self, p: Tensor, group: dict[str, Any], parts: Parts) -> None:
        state = self.state[p]
        state["micro"] = 0
        if self._keeps_full(parts, state):
            self._use(p, self._gradient(p, parts), group, parts)
            parts.store.drop(p)
        else:
            self._use(p, None, group, parts, low=state.pop("low_sum"))

    # Names and random numbers.

    def _has_master(self, p: Tensor, group: dict[str, Any]) -> bool:
        return bool(group["master_weights"]) and is_half(p)

    def _label(self, p: Tensor) -> str:
        index, place = self._place(p)
        names = self.param_groups[index].get("param_names")
        return f"parameter {names[place] if names else f'{place} of group {index}'} {tuple(p.shape)}"

    def _place(self, p: Tensor) -> tuple[int, int]:
        index = self._home.get(p, len(self.param_groups) - 1)
        return index, next(i for i, q in enumerate(self.param_groups[index]["params"]) if q is p)

    def _generator(self, p: Tensor, step: int, group: dict[str, Any]) -> torch.Generator:
        return stream_on(p.device, group.get("seed", 0), "store", *self._place(p), step)

    # Checkpoints.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps its dtype (torch's own casts bytes and float32 bases to the parameter's).

        Raises:
            ValueError: saved by another method, with another rank or projection, with or without master weights, or for
                parameters of other shapes.
        """
        saved_groups = [{"master_weights": False, **saved} for saved in state_dict["param_groups"]]
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            check_saved_group(index, saved, group, self.method, (*self.structural, "master_weights"))
        super().load_state_dict({"state": {}, "param_groups": saved_groups})  # checks numbers of groups and parameters
        self._used.clear()
        for saved, group in zip(saved_groups, self.param_groups):
            for key, p in zip(saved["params"], group["params"]):
                if key in state_dict["state"]:
                    wanted = self.layout_of(p, group)
                    self.state[p] = restored(p, state_dict["state"][key], wanted, self._label(p))

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("layerwise", "accumulate", "max_norm", "replicas", "foreach")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_home"):  # unpickled or deep-copied: __init__ did not run
            self._start()
            for index in range(len(self.param_groups)):
                self._adopt(index)
