"""Projectors: singular vectors for matrices, Tucker factors for tensors, and none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowdim.linalg import compute_dtype, has_numbers, leading_vectors, mode_products, stream_on, tucker
from lowdim.optim.core import sharded
from lowdim.optim.core.parts import Layout, Projector, Side, State

__all__ = ["PROJ_TYPES", "Identity", "SVDProjector", "TuckerProjector"]

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")


@dataclass(frozen=True)
class Identity(Projector):
    """No projection: a parameter of a group whose rank is None."""

    def down(self, a: Tensor, state: State) -> Tensor:
        """The gradient itself."""
        return a

    def up(self, low: Tensor, state: State) -> Tensor:
        """The direction itself."""
        return low

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape."""
        return shape


@dataclass(frozen=True)
class SVDProjector(Projector):
    """Leading singular vectors of the gradient, recomputed every `update_interval` steps.

    Formula: `G = U S Vᵀ`, `R = V[:, :rank]`, `L = U[:, :rank]`; `down = G R` or `Lᵀ G` or `Lᵀ G R`, `up = D Rᵀ` or `L D` or
    `L D Rᵀ`.

    State: `right_basis (n, rank)` and/or `left_basis (m, rank)`, computed in float32 or better and kept in the parameter's
    dtype, in which all products with them run; and `energy`, the share of `‖G‖²` that the subspace held when it was chosen,
    and `overlap`, the share of it that was in the previous one (1 at first), both 0-dim.

    Args:
        svd: `"exact"`, `"randomized"` (warm-started from the old basis), or `"auto"`: exact for small matrices.
        rotates: keep the tensors that `rotation` needs (for compositions that transform moments; not with `"full"`).
    """

    rank: int
    update_interval: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    svd: str = "auto"
    seed: int = 0
    rotates: bool = False

    @property
    def interval(self) -> int:
        """Steps between two choices."""
        return self.update_interval

    def sides(self, shape: tuple[int, ...]) -> tuple[Side, ...]:
        """Which sides of a matrix of this shape are projected."""
        m, n = shape
        if self.proj_type in ("right", "left"):
            return ("right",) if self.proj_type == "right" else ("left",)
        if self.proj_type == "full":
            return ("right", "left")
        return ("right",) if (m >= n) == (self.proj_type == "std") else ("left",)

    def due(self, state: State, step: int) -> bool:
        """At steps 0, T, 2T, …, earlier by the state's `phase` (if any)."""
        return (step + state.get("phase", 0)) % self.update_interval == 0 or not (
            "right_basis" in state or "left_basis" in state
        )

    def prepare(self, a: Tensor, state: State, step: int) -> bool:
        """Decompose the gradient if due. A gradient with NaN or infinity keeps the old basis; without one: ValueError."""
        if not self.due(state, step):
            return False
        full = sharded.gather(a).detach()
        if not is_finite(full):
            if "right_basis" in state or "left_basis" in state:
                return False
            raise ValueError("the gradient has NaN or infinite entries, and there is no basis from an earlier step to keep")
        for side in self.sides(tuple(full.shape)):
            key = f"{side}_basis"
            old = state.get(key)
            basis, energy = self._choose(full.mT if side == "right" else full, old, step, side, a)
            turn = None if old is None else old.to(basis.dtype).mT @ basis
            if self.rotates and turn is not None:
                state["rotation"] = turn
            state[key], state["energy"], state["overlap"] = self.kept(basis, a), energy, overlap(turn, energy)
        return True

    def kept(self, basis: Tensor, like: Tensor) -> Tensor:
        """The basis as stored between steps."""
        return basis.to(like.dtype)

    def _choose(self, matrix: Tensor, old: Tensor | None, step: int, side: Side, like: Tensor) -> tuple[Tensor, Tensor]:
        if sharded.owner(like):
            generator = stream_on(matrix.device, self.seed, "subspace", step, side, *matrix.shape)
            basis, energy = leading_vectors(matrix, self.rank, method=self.svd, start=old, generator=generator)
            energy = energy.to(torch.float32)
        else:
            basis = matrix.new_empty((matrix.shape[0], self.rank), dtype=compute_dtype(matrix.dtype))
            energy = matrix.new_empty((), dtype=torch.float32)
        sharded.broadcast(basis, like)
        sharded.broadcast(energy, like)
        return basis, energy

    def down(self, a: Tensor, state: State) -> Tensor:
        """`a R`, `Lᵀ a` or `Lᵀ a R`; products run in the gradient's dtype."""
        low = a
        if (right := state.get("right_basis")) is not None:
            low = low @ sharded.replicate(right.to(a.dtype), a)
        if (left := state.get("left_basis")) is not None:
            low = sharded.replicate(left.to(a.dtype).mT, a) @ low
        return sharded.settle(low)

    def up(self, low: Tensor, state: State) -> Tensor:
        """`low Rᵀ`, `L low` or `L low Rᵀ`."""
        if (left := state.get("left_basis")) is not None:
            low = sharded.replicate(left.to(low.dtype), low) @ low
        if (right := state.get("right_basis")) is not None:
            low = low @ sharded.replicate(right.to(low.dtype).mT, low)
        return low

    def add_up(self, weight: Tensor, low: Tensor, state: State, *, alpha: float, beta: float = 1.0) -> None:
        """One multiply-add onto the weight; the update itself is never built."""
        left, right = state.get("left_basis"), state.get("right_basis")
        dtype = weight.dtype
        low = low.to(dtype)
        if left is None:
            assert right is not None
            sharded.add_product(weight, low, right.to(dtype).mT, alpha=alpha, beta=beta)
        elif right is None:
            sharded.add_product(weight, left.to(dtype), low, alpha=alpha, beta=beta)
        else:
            sharded.add_product(weight, left.to(dtype) @ sharded.gather(low), right.to(dtype).mT, alpha=alpha, beta=beta)

    def rotation(self, state: State) -> tuple[Tensor, Side] | None:
        """`(old basis)ᵀ (new basis)`; called once per change."""
        R = state.pop("rotation", None)
        if R is None or ("left_basis" in state and "right_basis" in state):
            return None
        return R, "right" if "right_basis" in state else "left"

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(m, rank)`, `(rank, n)` or `(rank, rank)`."""
        sides = self.sides(shape)
        return self.rank if "left" in sides else shape[0], self.rank if "right" in sides else shape[1]

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The bases, and the energy."""
        length = {"right": shape[1], "left": shape[0]}
        bases = {f"{side}_basis": ((length[side], self.rank), dtype) for side in self.sides(shape)}
        return {**bases, "energy": ((), torch.float32), "overlap": ((), torch.float32)}


def overlap(turn: Tensor | None, like: Tensor) -> Tensor:
    """`‖oldᵀ new‖²_F / r` from `oldᵀ new`: 1 for the same subspace, 0 for an orthogonal one; 1 if there was none before."""
    if turn is None:
        return torch.ones_like(like)
    return (turn.square().sum() / turn.shape[1]).clamp(max=1.0).to(like.dtype)


@dataclass(frozen=True)
class TuckerProjector(Projector):
    """One orthonormal factor per mode, for tensors of more than two dimensions (convolutions).

    Formula: `g = G ×_i F_iᵀ`, `up = D ×_i F_i`; the factors by HOSVD, then HOOI.

    State: `factor0 (d_0, r_0)`, `factor1`, … in the parameter's dtype, and `energy`.

    Args:
        rank: one number, limited to each dimension, or one per dimension.
    """

    rank: int | tuple[int, ...]
    update_interval: int = 200
    scale: float = 0.25

    @property
    def interval(self) -> int:
        """Steps between two choices."""
        return self.update_interval

    def due(self, state: State, step: int) -> bool:
        """At steps 0, T, 2T, …, earlier by the state's `phase` (if any)."""
        return (step + state.get("phase", 0)) % self.update_interval == 0 or "factor0" not in state

    def prepare(self, a: Tensor, state: State, step: int) -> bool:
        """Decompose the gradient if due. A gradient with NaN or infinity keeps the old factors; without them: ValueError."""
        if not self.due(state, step):
            return False
        full = sharded.gather(a).detach()
        if not is_finite(full):
            if "factor0" in state:
                return False
            raise ValueError("the gradient has NaN or infinite entries, and there are no factors from an earlier step to keep")
        core, factors = tucker(full, self.low_shape(tuple(full.shape)))
        for mode, factor in enumerate(factors):
            factor = factor.contiguous()
            sharded.broadcast(factor, a)
            state[f"factor{mode}"] = factor.to(a.dtype)
        total = torch.linalg.vector_norm(full.to(core.dtype)).square()
        share = torch.linalg.vector_norm(core).square() / total
        state["energy"] = torch.where(total > 0, share, 1.0).clamp(max=1.0).to(torch.float32)
        return True

    def _factors(self, state: State, dtype: torch.dtype) -> list[Tensor]:
        count = sum(key.startswith("factor") for key in state)
        return [state[f"factor{mode}"].to(dtype) for mode in range(count)]

    def down(self, a: Tensor, state: State) -> Tensor:
        """The core of `a` in these factors."""
        full = sharded.gather(a)
        return mode_products(full, self._factors(state, full.dtype))

    def up(self, low: Tensor, state: State) -> Tensor:
        """The tensor with this core."""
        return mode_products(low, self._factors(state, low.dtype), transpose=False)

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks."""
        ranks = (self.rank,) * len(shape) if isinstance(self.rank, int) else self.rank
        return tuple(min(rank, size) for rank, size in zip(ranks, shape))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The factors, and the energy."""
        ranks = self.low_shape(shape)
        factors = {f"factor{i}": ((d, r), dtype) for i, (d, r) in enumerate(zip(shape, ranks))}
        return {**factors, "energy": ((), torch.float32)}


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, in one pass without a mask of the tensor's size. A forecast's tensor counts as finite."""
    if not has_numbers(tensor) or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
