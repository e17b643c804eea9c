"""DCT-AdamW: Adam on the columns of a fixed cosine basis that a gradient aligns with most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import compute_dtype, dct, dct_columns, has_numbers
from lowdim.optim.core import sharded
from lowdim.optim.core.checking import check_limiter, check_matrix, check_schedule
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.inner import AdamWRule
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import Layout, NoResidual, Parts, Projector, ResidualRule, Side, State
from lowdim.optim.core.projectors import Identity
from lowdim.optim.core.residuals import ErrorFeedback, NormScaledResidual, few_rows

__all__ = ["DCTAdamW", "DCTProjector"]


@dataclass(frozen=True)
class DCTProjector(Projector):
    """The columns of a cosine basis with the largest scores; only their indices are stored.

    Formula: Q orthogonal, `Cᵀ` (`"dct2"`: `A Q` is the DCT-II of A's rows) or `C` (`"dct3"`) with `C = dct_matrix(s)`,
    `s = min(m, n)`. `S = A Q` (m >= n; else `Qᵀ A`), score of column (row) j `‖S_j‖`; the `rank` largest, ties to the lower
    index, in ascending order; `down = A Q[:, idx]`, `up = D Q[:, idx]ᵀ`, or the same from the left.

    The transform is a product for short sides and an FFT for long ones, a few rows at a time; columns of Q are computed when
    they are needed. State: `indices (rank,)` int32. Matrices with a side of `max_dim` or more are not projected.

    Args:
        norm: of the scores: 1, or 2, which gives the best columns for the squared error.
        rotates: keep the tensors that `rotation` needs.
    """

    rank: int
    update_interval: int = 1
    basis: str = "dct3"
    norm: int = 1
    rotates: bool = True
    max_dim: int | None = 32000
    scale: float = 1.0

    @property
    def interval(self) -> int:
        """Steps between two choices."""
        return self.update_interval

    def sides(self, shape: tuple[int, ...]) -> tuple[Side, ...]:
        """The projected side of a matrix of this shape: the shorter one; none for a huge matrix."""
        if self.max_dim is not None and max(shape) >= self.max_dim:
            return ()
        return ("right",) if shape[0] >= shape[1] else ("left",)

    def due(self, state: State, step: int) -> bool:
        """At the first step, and after T − 1, 2T − 1, … steps (the state's `phase`, if any, steps before)."""
        return (step + 1 + state.get("phase", 0)) % self.update_interval == 0 or "indices" not in state

    def prepare(self, a: Tensor, state: State, step: int) -> bool:
        """Choose columns if due. If scores are not finite, the old columns are kept; without old ones: ValueError."""
        sides = self.sides(tuple(a.shape))
        if not sides or not self.due(state, step):
            return False
        scores = self._scores(a, sides[0])
        new, old = _largest(scores, self.rank), state.get("indices")
        if old is not None:
            new = torch.where(scores.isfinite().all(), new, old)  # decided on the device, without synchronisation
        elif has_numbers(scores) and not bool(scores.isfinite().all()):
            raise ValueError("the gradient has NaN or infinite entries, and there are no columns from an earlier step to keep")
        sharded.broadcast(new, a)
        if self.rotates and old is not None:
            R = (old[:, None] == new).to(compute_dtype(a.dtype))
            state["rotation"] = sharded.replicate(R, a), sides[0]
        state["indices"], state["length"] = new, min(a.shape)
        return True

    def _scores(self, a: Any, side: Side) -> Tensor:
        """`‖S_j‖₁` or `‖S_j‖₂²`, in float32 or better, whole on every process."""
        placements: list[Any] = []
        if sharded.is_sharded(a):  # each process transforms its own whole rows (or columns); only scores are communicated
            from torch.distributed.tensor import Partial, Replicate, Shard

            axis = 0 if side == "right" else 1
            a = a.redistribute(placements=[Shard(axis) if p.is_shard() else Replicate() for p in a.placements])
            placements = [Partial() if p.is_shard() else Replicate() for p in a.placements]
        piece = sharded.local(a).detach()
        rows = piece if side == "right" else piece.mT
        scores = rows.new_zeros(rows.shape[1], dtype=compute_dtype(rows.dtype))
        for some in few_rows(rows, rows.shape[1]):
            S = dct(some.to(scores.dtype), kind=2 if self.basis == "dct2" else 3)
            scores += S.abs_().sum(0) if self.norm == 1 else S.square_().sum(0)
        if placements:
            from torch.distributed.tensor import DTensor

            scores = DTensor.from_local(scores, a.device_mesh, placements, run_check=False).full_tensor()
        return scores

    def columns(self, state: State, dtype: torch.dtype) -> Tensor:
        """`Q[:, idx]`, (s, rank)."""
        return dct_columns(state["length"], state["indices"], kind=3 if self.basis == "dct2" else 2, dtype=dtype)

    def down(self, a: Tensor, state: State) -> Tensor:
        """`a Q[:, idx]` or `Q[:, idx]ᵀ a`."""
        sides = self.sides(tuple(a.shape))
        if not sides:
            return a
        Q = sharded.replicate(self.columns(state, a.dtype), a)
        return sharded.settle(a @ Q if sides == ("right",) else Q.mT @ a)

    def up(self, low: Tensor, state: State) -> Tensor:
        """`low Q[:, idx]ᵀ` or `Q[:, idx] low`."""
        if "indices" not in state:
            return low
        Q = sharded.replicate(self.columns(state, low.dtype), low)
        return Q @ low if _from_left(low, state) else low @ Q.mT

    def add_up(self, weight: Tensor, low: Tensor, state: State, *, alpha: float, beta: float = 1.0) -> None:
        """One multiply-add onto the weight."""
        if "indices" not in state:
            return super().add_up(weight, low, state, alpha=alpha, beta=beta)
        Q, low = self.columns(state, weight.dtype), low.to(weight.dtype)
        left, right = (Q, low) if _from_left(low, state) else (low, Q.mT)
        sharded.add_product(weight, left, right, alpha=alpha, beta=beta)

    def rotation(self, state: State) -> tuple[Tensor, Side] | None:
        """`Q[:, old]ᵀ Q[:, new]`: a one where a column stayed, else zeros. Called once per change."""
        return state.pop("rotation", None)

    def low_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(m, rank)` or `(rank, n)`; the shape itself if nothing is projected."""
        sides = self.sides(shape)
        if not sides:
            return shape
        return (shape[0], self.rank) if sides == ("right",) else (self.rank, shape[1])

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The indices."""
        return {"indices": ((self.rank,), torch.int32)} if self.sides(shape) else {}


def _from_left(low: Tensor, state: State) -> bool:
    """Whether it is `(rank, n)`: projected from the left, a matrix is wider than the rank."""
    return low.shape[1] > len(state["indices"])


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest, ties to the lower index, ascending, int32."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.sort(order[:count]).values.to(torch.int32)


@dataclass(frozen=True)
class PickingAdamW(AdamWRule):
    """AdamW that moves its moments to new columns by indexing instead of multiplying, where the change of basis allows."""

    def rotate(self, state: State, R: Tensor, side: Side) -> None:
        """`m R`, `|v R|` for an R with one 1 or none in each column."""
        if sharded.is_sharded(R):
            return super().rotate(state, R, side)
        stays, old = R.max(0)
        dim = 1 if side == "right" else 0
        stays = stays if dim else stays[:, None]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].index_select(dim, old).mul_(stays)


class DCTAdamW(ProjectedOptimizer):
    """Adam in a subspace that is selected at every step from a fixed cosine basis: no SVD, no basis in the state.

    Formula: `S = A Q` with a fixed orthogonal Q (m >= n; else `Qᵀ A`), A the gradient, or gradient plus carried error; the
    `rank` columns (rows) of S with the largest norm are the low gradient a; when the selected columns change, the
    moments of those that stay are kept and the new ones start at zero; `W ← (1 − lr · weight_decay) W`,
    `m ← β₁ m + (1−β₁) a`, `v ← β₂ v + (1−β₂) a²`, `W ← W − lr √(1−β₂ᵏ)/(1−β₁ᵏ) · up(m / (√v + eps √(1−β₂ᵏ)))`.
    Composition: DCTProjector × AdamWRule("inside") × (NoResidual | ErrorFeedback | NormScaledResidual) × DenseStore.

    Args:
        params: groups as `lowdim.optim.param_groups(model, rank=…)` makes them, or anything torch accepts. Every keyword up to
            `limiter` can be set per group. Vectors, groups with `rank=None` and matrices with a side of `max_dim` or more use
            torch's AdamW.
        lr: as for AdamW: there is no scale.
        rank: number of columns kept.
        update_interval: steps between choices, T; a choice costs about as much as a few passes over the gradient.
        basis: `"dct3"` or `"dct2"`: Q is the cosine matrix or its transpose.
        norm: of the scores, 1 or 2.
        max_dim: matrices with a side of this many or more are not projected; None projects all.
        rotate: move moments with their columns. Otherwise they keep their positions, and are used for other columns.
        error_feedback: False; True: the unused part of a step is added to the next gradient (a tensor of the parameter's size
            and dtype); 8: the same in one byte per entry.
        residual: `"none"`, or `"norm_scaled"`: the rest of the gradient is scaled and added, as in `Fira`.
        limiter: Fira's.
        layerwise: update inside the backward pass and free each gradient at once.
        accumulate: micro-batches per step with `layerwise`; only without error feedback and residual.
        max_norm, replicas, stagger, foreach: as in `GaLore`.

    State of a parameter: `step`, `length` (of a column; ints), `indices (rank,)` int32, `exp_avg`, `exp_avg_sq` of the low
    gradient's shape, float32 where parameters have half precision; `ef` with error feedback (uint8, `ef_low`, `ef_scale` in 8
    bits), `residual_norm`.

    Raises:
        ValueError: a hyperparameter out of range; rank above the smaller side of a matrix; a rank on a group with tensors of
            more than two dimensions; error feedback together with a residual; the first gradient is not finite.
        TypeError: sparse gradients.

    Example:
        >>> import torch
        >>> from lowdim.optim import DCTAdamW, param_groups
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
        >>> optimizer = DCTAdamW(param_groups(model, rank=4), lr=0.01)
        >>> x, y, losses = torch.randn(64, 16), torch.randn(64, 8), []
        >>> for _ in range(100):
        ...     loss = (model(x) - y).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     losses.append(loss.item())
        >>> losses[-1] < 0.7 * losses[0]
        True

    Not where the gradient's energy must be captured well at a small rank: half of the energy of singular vectors is typical.
    GaLore computes these, at the cost of an occasional SVD.

    Source: "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models" (later versions: "FFT-based Dynamic
    Subspace Selection …"), arXiv 2505.17967.
    """

    method = "DCT-AdamW"
    structural = ("rank", "basis", "error_feedback", "residual", "max_dim")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank: int | None = 128,
        update_interval: int = 1,
        basis: str = "dct3",
        norm: int = 1,
        rotate: bool = True,
        error_feedback: bool | int = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_dim: int | None = 32000,
        residual: str = "none",
        limiter: float | None = 1.01,
        **how: Unpack[TrainingOptions],
    ):
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_interval": update_interval,
            "basis": basis,
            "norm": norm,
            "rotate": rotate,
            "error_feedback": error_feedback,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_dim": max_dim,
            "residual": residual,
            "limiter": limiter,
        }
        super().__init__(params, defaults, **how)

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The composition for parameters of `ndim` dimensions."""
        betas = tuple(group["betas"])
        if group["rank"] is None or ndim < 2:
            return Parts(Identity(), AdamWRule(betas, group["eps"], "inside"), decay="before")
        rule = (PickingAdamW if group["rotate"] else AdamWRule)(betas, group["eps"], "inside")
        projector = DCTProjector(
            group["rank"], group["update_interval"], group["basis"], group["norm"], group["rotate"], group["max_dim"]
        )
        return Parts(projector, rule, _residual(group), decay="before", rotate=group["rotate"])

    def check_group(self, group: dict[str, Any]) -> None:
        """Every hyperparameter, and the rank against every shape."""
        check_schedule(group)
        check_float("eps", group["eps"], 0.0)
        check_choice("basis", group["basis"], ("dct2", "dct3"))
        check_choice("residual", group["residual"], ("none", "norm_scaled"))
        check_limiter(group["limiter"])
        if isinstance(group["norm"], bool) or group["norm"] not in (1, 2):
            raise ValueError(f"norm must be 1 or 2; got {group['norm']!r}")
        if not isinstance(group["rotate"], bool):
            raise ValueError(f"rotate must be True or False; got {group['rotate']!r}")
        feedback = group["error_feedback"]
        if not isinstance(feedback, bool) and feedback != 8:
            raise ValueError(f"error_feedback must be False, True or 8 (bits); got {feedback!r}")
        if feedback and group["residual"] != "none":
            raise ValueError(
                f"error_feedback={feedback!r} and residual={group['residual']!r} would use the rest of the gradient twice; "
                "switch one of them off"
            )
        if group["max_dim"] is not None:
            check_int("max_dim", group["max_dim"], 1)
        for p in group["params"]:
            if p.ndim >= 2:
                check_matrix(group["rank"], tuple(p.shape))
            elif group["rank"] is not None:
                check_int("rank", group["rank"], 1)


def _residual(group: dict[str, Any]) -> ResidualRule:
    if group["residual"] == "norm_scaled":
        return NormScaledResidual(group["limiter"])
    if group["error_feedback"]:
        return ErrorFeedback(None if group["error_feedback"] is True else 8, group["max_dim"])
    return NoResidual()
