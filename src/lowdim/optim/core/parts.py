"""The four parts that every projected optimizer is composed of, and their interfaces.

    a = residual.before(G)          the gradient, or the gradient plus a carried error
    projector.prepare(a)            a new subspace where one is due
    g = projector.down(a)           full size -> low
    D, η = inner.direction(g)       Adam and friends, on the low gradient; their state is low too
    U = scale · projector.up(D) + residual.after(…)
    W ← W − η U                     read from and written back to a store

Parts are frozen records of hyperparameters: everything that changes during training is in the optimizer's `state[p]`, a
    dictionary of
tensors and numbers, and `step` counts from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lowdim.linalg import compute_dtype
from lowdim.optim.core import sharded
from lowdim.optim.core.rounding import is_half, write_rounded

__all__ = ["DenseStore", "InnerRule", "Layout", "NoResidual", "Parts", "Projector", "ResidualRule", "State", "WeightStore"]

State = dict[str, Any]
Side = Literal["left", "right"]
#: name -> (shape, dtype) of every tensor that a part keeps in the state of one parameter
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


class Projector:
    """Maps a gradient to a small one and an update back; chooses the subspace.

    Define `due`, `prepare`, `down`, `up`, `low_shape` and `layout`; override `add_up` where the update can be added to the
    weight without a tensor of the weight's size.
    """

    scale: float = 1.0

    @property
    def interval(self) -> int | None:
        """Steps between two choices of a subspace; None if it is chosen only once, so that nothing can be staggered."""
        return None

    def due(self, state: State, step: int) -> bool:
        """Whether `prepare` will choose a new subspace from this step's gradient."""
        return False

    def prepare(self, a: Tensor, state: State, step: int) -> bool:
        """Choose a new subspace from `a` if one is due; True if it changed."""
        return False

    def down(self, a: Tensor, state: State) -> Tensor:
        """Full -> low. Linear in `a`."""
        raise NotImplementedError

    def up(self, low: Tensor, state: State) -> Tensor:
        """Low -> full, without the scale."""
        raise NotImplementedError

    def add_up(self, weight: Tensor, low: Tensor, state: State, *, alpha: float, beta: float = 1.0) -> None:
        """`weight ← beta · weight + alpha · up(low)`, in place."""
        if beta != 1.0:
            weight.mul_(beta)
        weight.add_(sharded.match(self.up(low, state), weight), alpha=alpha)

    def rotation(self, state: State) -> tuple[Tensor, Side] | None:
        """The map from coordinates in the previous subspace to those in the new one, or None."""
        return None

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the low gradient of a parameter of this shape."""
        raise NotImplementedError

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """What it keeps in the state of a parameter of this shape and dtype."""
        return {}

    def nbytes(self, shape: tuple[int, ...], rank: Any, dtype: torch.dtype) -> int:
        """Bytes of its state at this rank."""
        from dataclasses import is_dataclass, replace

        projector: Any = replace(self, rank=rank) if is_dataclass(self) and hasattr(self, "rank") else self  # type: ignore[type-var]
        return layout_bytes(projector.layout(shape, dtype))


class InnerRule:
    """Turns a low gradient into a direction, with a state of the low gradient's size.

    `elementwise` means that entries are independent: the state of a sharded parameter can then stay sharded.
    """

    elementwise: bool = False

    def init(self, low: Tensor, state: State) -> None:
        """Put zero moments into the state."""
        raise NotImplementedError

    def rotate(self, state: State, R: Tensor, side: Side) -> None:
        """Carry the moments over to a new subspace: `M R` (right) or `Rᵀ M` (left)."""
        raise NotImplementedError

    def direction(self, low: Tensor, state: State, step: int, lr: float, weight: Tensor) -> tuple[Tensor, float]:
        """The direction D, of the low gradient's shape, and the step size η; moments are updated in place.

        `weight` is the full parameter before the step. D may be part of the state: no other code changes it.
        """
        raise NotImplementedError

    def rate(self, step: int, lr: float, weight: Tensor) -> float | Tensor:
        """The rate that multiplies weight decay: the learning rate, unless the rule computes its own."""
        return lr

    def layout(self, low_shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """What it keeps for a low gradient of this shape of a parameter of this dtype."""
        raise NotImplementedError

    def nbytes(self, low_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of its state."""
        return layout_bytes(self.layout(low_shape, dtype))


class ResidualRule:
    """Handles the part of the gradient outside the subspace."""

    #: False only if neither method needs the full gradient: it can then be freed as soon as it is projected.
    full_size: bool = True

    def before(self, grad: Tensor, state: State) -> Tensor:
        """The input of the projector."""
        return grad

    def after(self, a: Tensor, low: Tensor, D: Tensor, projector: Projector, state: State) -> Tensor | None:
        """A full-size term that is added to the update `scale · up(D)`, or None."""
        return None

    def fused(
        self,
        weight: Tensor,
        a: Tensor | None,
        low: Tensor,
        D: Tensor,
        projector: Projector,
        state: State,
        *,
        step_size: float,
        beta: float,
    ) -> bool:
        """`weight ← beta · weight − step_size · (scale · up(D) + after(…))` in place, with fewer temporaries.

        False: nothing was done; add the two terms one after the other.
        """
        return False

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """What it keeps in the state of a parameter of this shape and dtype."""
        return {}


class NoResidual(ResidualRule):
    """The rest of the gradient is dropped (GaLore)."""

    full_size = False


class WeightStore:
    """How a weight and its gradient are kept; `read` gives a floating tensor that the driver changes in place."""

    #: True if `write` draws random numbers for every parameter; `rounds` says it for one.
    stochastic: bool = False

    def check(self, p: Tensor) -> None:
        """Raise TypeError for a parameter of a kind that it does not keep."""

    def dtype(self, p: Tensor) -> torch.dtype:
        """The floating dtype of the weight, on which the dtypes of the state depend."""
        return p.dtype

    def rounds(self, p: Tensor) -> bool:
        """Whether writing this parameter draws random numbers: the driver then passes `write` a generator for each step."""
        return self.stochastic

    def grad(self, p: Tensor) -> Tensor | None:
        """The gradient, or None."""
        raise NotImplementedError

    def drop(self, p: Tensor) -> None:
        """Free the gradient."""
        raise NotImplementedError

    def read(self, p: Tensor) -> Tensor:
        """The weight in floating point."""
        raise NotImplementedError

    def write(self, p: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """Store the changed weight."""
        raise NotImplementedError

    def watch(self, p: Tensor, call: Callable[[Tensor], None]) -> Any:
        """Run `call(p)` as soon as the gradient is ready; returns a handle with `.remove()`, or None."""
        raise NotImplementedError


class DenseStore(WeightStore):
    """An ordinary parameter: `.grad`, and the tensor itself, changed in place.

    A 16-bit parameter is read as a float32 copy and rounded stochastically when it is written: small updates add up.
    """

    def check(self, p: Tensor) -> None:
        """Integer weights have no `.grad`: they would silently never train."""
        if not p.is_floating_point():
            raise TypeError(
                f"params must be floating tensors; got {p.dtype} of shape {tuple(p.shape)} (for 8-bit weights: QGaLore)"
            )

    def rounds(self, p: Tensor) -> bool:
        """16-bit parameters."""
        return is_half(p)

    def grad(self, p: Tensor) -> Tensor | None:
        """`p.grad`."""
        return p.grad

    def drop(self, p: Tensor) -> None:
        """`p.grad = None`."""
        p.grad = None

    def read(self, p: Tensor) -> Tensor:
        """The parameter itself; of 16 bits a float32 copy."""
        return p.detach().float() if is_half(p) else p.detach()

    def write(self, p: Tensor, value: Tensor, generator: torch.Generator | None) -> None:
        """Rounded to 16 bits; otherwise nothing: `read` gave a view."""
        if is_half(p):
            write_rounded(p.detach(), value, generator)

    def watch(self, p: Tensor, call: Callable[[Tensor], None]) -> Any:
        """A post-accumulate-grad hook; a frozen parameter gets none."""
        return p.register_post_accumulate_grad_hook(call) if p.requires_grad else None


@dataclass(frozen=True)
class Parts:
    """One composition.

    Attributes:
        decay: weight decay acts on the updated weight (`"after"`, GaLore) or on the old one (`"before"`, as in torch).
        rotate: moments are transformed when the subspace changes; otherwise they are reused unchanged.
    """

    projector: Projector
    inner: InnerRule
    residual: ResidualRule = field(default_factory=NoResidual)
    store: WeightStore = field(default_factory=DenseStore)
    decay: Literal["before", "after"] = "after"
    rotate: bool = False

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Every tensor of fixed size that projector and rules keep for a parameter."""
        low = self.inner.layout(self.projector.low_shape(shape), dtype)
        return {**self.projector.layout(shape, dtype), **low, **self.residual.layout(shape, dtype)}

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of these tensors."""
        return layout_bytes(self.layout(shape, dtype))


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments of half-precision parameters are kept in float32: `v ← v + 0.001 g²` is lost in eight bits of mantissa."""
    return compute_dtype(dtype)
