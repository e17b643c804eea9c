"""One driver for every projected optimizer: groups, hooks, checkpoints, and the step that the parts make up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.optim import dense, sharded
from lowdim.optim.inner import AdamWRule
from lowdim.optim.parts import Parts, State
from lowdim.optim.projectors import Identity

__all__ = ["ProjectedOptimizer"]


class ProjectedOptimizer(torch.optim.Optimizer):
    """Base of the family: a composition writes `parts` and `check_group`, and inherits everything else.

    Args:
        params: as in torch: parameters, named parameters, or groups.
        defaults: hyperparameters that a group may set for itself.
        layerwise: update a parameter as soon as its gradient is there, in the backward pass, and free the gradient; `step()`
            then does nothing but call its closure.
        accumulate: micro-batches a step, for `layerwise` only. While the subspace stands the *projected* gradient is summed,
            which is exact since projecting is linear; the full gradient is kept only in steps that choose a subspace.
        foreach: update the unprojected parameters of a group in one fused call where that computes the same.

    Class attributes for compositions:
        method: name that a checkpoint carries.
        structural: group keys that fix the shape and meaning of the state; loading a checkpoint with others is an error.
    """

    method: str = "projected"
    structural: tuple[str, ...] = ("rank",)

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, layerwise: bool = False, accumulate: int = 1, foreach: bool = True
    ):
        check_int("accumulate", accumulate, 1)
        if accumulate > 1 and not layerwise:
            raise ValueError(
                f"accumulate={accumulate} needs layerwise=True; otherwise .grad itself is the sum over micro-batches"
            )
        self.layerwise, self.accumulate, self.foreach = layerwise, accumulate, foreach
        self._home: dict[Tensor, int] = {}
        self._handles: list[Any] = []
        super().__init__(params, {**defaults, "method": self.method})

    # What a composition writes.

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The parts for parameters of this many dimensions in this group, from the group's current hyperparameters."""
        raise NotImplementedError

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError/TypeError for hyperparameters or shapes that cannot work."""

    # Groups.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is checked first."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            self.check_group(group)
            if self.accumulate > 1 and any(self.parts(group, p.ndim).residual.full_size for p in group["params"]):
                raise ValueError("accumulate > 1 needs a residual rule that does not look at the full gradient")
        except Exception:
            self.param_groups.pop()
            raise
        self._adopt(index)

    def _adopt(self, index: int) -> None:
        group = self.param_groups[index]
        for p in group["params"]:
            self._home[p] = index
            if self.layerwise:
                handle = self.parts(group, p.ndim).store.watch(p, self._after_backward)
                if handle is not None:
                    self._handles.append(handle)

    def remove_hooks(self) -> None:
        """Stop updating in the backward pass (layerwise only), for instance before another optimizer takes over."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Stepping.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; gives the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.layerwise:
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parts: dict[int, Parts] = {}
        fused: dict[int, list[tuple[Tensor, Tensor, State]]] = {}  # by number of steps done
        for p in group["params"]:
            if p.ndim not in parts:
                parts[p.ndim] = self.parts(group, p.ndim)
            own = parts[p.ndim]
            grad = self._gradient(p, own)
            if grad is None:
                continue
            plain = isinstance(own.projector, Identity) and not own.residual.full_size
            if self.foreach and plain and dense.can_fuse(p, grad, own.inner):
                state = self.state[p]
                if "step" not in state:
                    own.inner.init(grad, state)
                fused.setdefault(state.get("step", 0), []).append((p, grad, state))
            else:
                self._update(p, grad, group, own)
        for step, rows in fused.items():
            own = parts[rows[0][0].ndim]
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
        """The step of one parameter, from its gradient, or from a low gradient that was projected before."""
        state, projector, inner, residual = self.state[p], parts.projector, parts.inner, parts.residual
        step = state.get("step", 0)
        a = None
        if low is None:
            assert grad is not None
            a = residual.before(grad, state)
            low = self._project(p, a, state, step, parts)
        if not inner.elementwise:
            low = sharded.gather(low)
        if "step" not in state:
            inner.init(low, state)
        lr, decay = float(group["lr"]), group["weight_decay"]
        weight = parts.store.read(p)
        shrink = inner.rate(step, lr, weight) * decay if decay else 0.0  # looks at the weight before it changes
        D, eta = inner.direction(low, state, step, lr, weight)
        on_device, before = isinstance(shrink, Tensor), parts.decay == "before"
        if on_device and before:  # a rate that is a tensor stays where it lies
            weight.mul_(1 - shrink)
        kept = 1.0 if isinstance(shrink, Tensor) else 1.0 - shrink  # else decay is part of the multiply-add
        extra = None if a is None else residual.after(a, low, D, projector, state)
        alpha = -eta if before else -eta * kept  # decay after the update shrinks the update too
        projector.add_up(weight, D, state, alpha=alpha * projector.scale, beta=kept)
        if extra is not None:
            weight.add_(sharded.match(extra, weight), alpha=alpha)
        if on_device and not before:
            weight.mul_(1 - shrink)
        parts.store.write(p, weight, self._generator(p, step, group) if parts.store.stochastic else None)
        state["step"] = step + 1

    def _project(self, p: Tensor, a: Tensor, state: State, step: int, parts: Parts) -> Tensor:
        try:
            changed = parts.projector.prepare(a, state, step)
        except ValueError as error:
            raise ValueError(f"{self._label(p)}: {error}") from error
        if changed and parts.rotate and step > 0:
            rotation = parts.projector.rotation(state)
            if rotation is not None:
                parts.inner.rotate(state, *rotation)
        return parts.projector.down(a, state)

    # Stepping inside the backward pass.

    @torch.no_grad()
    def _after_backward(self, p: Tensor) -> None:
        group = self.param_groups[self._home[p]]
        parts = self.parts(group, p.ndim)
        grad = self._gradient(p, parts)
        if grad is None:
            return
        with torch.autocast(p.device.type, enabled=False):  # a backward under autocast would round the products
            if self.accumulate == 1:
                self._update(p, grad, group, parts)
                parts.store.drop(p)
            else:
                self._accumulate(p, grad, group, parts)

    def _accumulate(self, p: Tensor, grad: Tensor, group: dict[str, Any], parts: Parts) -> None:
        state = self.state[p]
        micro = state.get("micro", 0) + 1
        last = micro == self.accumulate
        if isinstance(parts.projector, Identity) or parts.projector.due(state, state.get("step", 0)):
            if last:  # until then .grad holds the sum
                self._update(p, grad, group, parts)
                parts.store.drop(p)
        else:
            low = parts.projector.down(grad, state).to(torch.promote_types(grad.dtype, torch.float32))
            total = state.pop("low_sum", None)
            low = low if total is None else total.add_(low)
            parts.store.drop(p)
            if last:
                self._update(p, None, group, parts, low=low)
            else:
                state["low_sum"] = low
        state["micro"] = 0 if last else micro

    # Names and random numbers.

    def _label(self, p: Tensor) -> str:
        index = self._home.get(p, len(self.param_groups) - 1)
        group = self.param_groups[index]
        place = next(i for i, q in enumerate(group["params"]) if q is p)
        if "param_names" in group:
            return f"parameter {group['param_names'][place]} {tuple(p.shape)}"
        return f"parameter {place} of group {index} {tuple(p.shape)}"

    def _generator(self, p: Tensor, step: int, group: dict[str, Any]) -> torch.Generator:
        from lowdim.linalg import stream

        index = self._home[p]
        place = next(i for i, q in enumerate(self.param_groups[index]["params"]) if q is p)
        return stream(group.get("seed", 0), "store", index, place, step)

    # Checkpoints.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps its dtype (torch's own casts bytes and float32 bases to the parameter's).

        Raises:
            ValueError: saved by another method, with another rank or projection, or for parameters of other shapes.
        """
        saved_groups = state_dict["param_groups"]
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            self._check_saved_group(index, saved, group)
        super().load_state_dict({"state": {}, "param_groups": saved_groups})  # checks numbers of groups and parameters
        for saved, group in zip(saved_groups, self.param_groups):
            for key, p in zip(saved["params"], group["params"]):
                if key in state_dict["state"]:
                    self.state[p] = self._restored(p, group, state_dict["state"][key])

    def _check_saved_group(self, index: int, saved: dict[str, Any], group: dict[str, Any]) -> None:
        if saved.get("method") != self.method:
            found = saved.get("method", "another optimizer")
            raise ValueError(f"state_dict must come from {self.method}; group {index} was saved by {found}")
        for key in self.structural:
            if _plain(saved.get(key)) != _plain(group.get(key)):
                raise ValueError(
                    f"state_dict: group {index} was saved with {key}={saved.get(key)!r}; this optimizer has {group.get(key)!r}"
                )

    def _restored(self, p: Tensor, group: dict[str, Any], saved: State) -> State:
        if "step" in saved:
            wanted = self.parts(group, p.ndim).layout(tuple(p.shape), p.dtype)
            for name, (shape, _) in wanted.items():
                found = saved.get(name)
                if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                    what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
                    raise ValueError(f"state_dict: {self._label(p)} needs {name!r} of shape {shape}; found {what}")
        return {k: v.detach().to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("layerwise", "accumulate", "foreach")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copied = not hasattr(self, "_home")  # unpickled or deep-copied: nothing was built by __init__
        super().__setstate__(state)
        if copied:
            self._home, self._handles = {}, []
            for index in range(len(self.param_groups)):
                self._adopt(index)


def _plain(value: Any) -> Any:
    """Lists and tuples that hold the same compare equal: a checkpoint may have passed through JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
