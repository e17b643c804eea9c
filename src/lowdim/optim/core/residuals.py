"""Rules for the part of the gradient outside the subspace: scaled and added (Fira), or carried to the next step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import has_numbers
from lowdim.optim.core import sharded
from lowdim.optim.core.parts import Layout, Projector, ResidualRule, State, moment_dtype

__all__ = ["ErrorFeedback", "NormScaledResidual", "few_rows"]

_TINY = 1e-8  # the authors' value, in both quotients
_LEVELS = 255
_ROWS = 16
#: Entries processed at a time, to avoid a temporary of the matrix's size.
_CHUNK = {"cpu": 2**17}
_OTHER_CHUNK = 2**24


@dataclass(frozen=True)
class NormScaledResidual(ResidualRule):
    """The rest of the gradient, scaled as the inner rule scaled the low gradient (Fira).

    Formula, with α the projector's scale: `φ = ‖D‖ / (‖g‖ + 1e-8)` for each row of D (each column where D has fewer rows than
    columns), `S = φ ⊙ (G − α up(g))`. With a limiter γ, from the second step on: `c = max(‖S‖ / (‖S_prev‖ + 1e-8), γ) / γ`,
    `S ← S / c`; `‖S‖ / c` is kept. A residual that is zero up to rounding cannot limit the next one: the previous norm is
    kept, and without one the next step is not limited either.

    Where φ runs along the side that is not projected (all but square matrices of full rank on the left), no S is built:
    `‖S‖² = Σ φᵢ² (‖Gᵢ‖² − (2α − α²) ‖gᵢ‖²)` for an orthonormal basis, and `up(φ ⊙ g) = φ ⊙ up(g)`, so that
    `α up(D) + S/c = α up(D − φ/c ⊙ g) + φ/c ⊙ G`: one product and one scaled addition onto the weight.

    State: `residual_norm` (0-dim) with a limiter.
    """

    limiter: float | None = 1.01

    def after(self, a: Tensor, low: Tensor, D: Tensor, projector: Projector, state: State) -> Tensor | None:
        """S / c, of full size."""
        if not _has_rest(a, low, projector):
            self._keep(torch.zeros((), dtype=moment_dtype(a.dtype), device=a.device), state)
            return None
        by_row = _by_row(a, low)
        phi = _ratio(D, low, by_row)
        wide = moment_dtype(a.dtype)
        S = sharded.match(projector.up(low.to(wide), state), a).mul_(-projector.scale).add_(a)
        S.mul_(sharded.replicate(phi, a))
        size = sharded.gather(torch.linalg.vector_norm(S))
        total = _squares(a, by_row).mul_(phi.square()).sum()
        c = self._limit(size, total, a.dtype, state)
        return S if c is None else S.div_(sharded.replicate(c, a))

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
        """`weight ← beta · weight − step_size · (α up(D) + S)` in place, without a tensor of its size.

        Returns:
            False, with nothing changed, where φ does not run along the free side of an orthonormal basis.
        """
        sides = getattr(projector, "sides", None)
        if sides is None or a is None or a.ndim != 2 or a.dtype == torch.float16:  # φ overflows there
            return False
        by_row, alpha = _by_row(a, low), projector.scale
        if sides(tuple(a.shape)) != (("right",) if by_row else ("left",)) or not _has_rest(a, low, projector):
            return False
        whole, inside = _squares(a, by_row), _squares(low, by_row)
        phi = _ratio(D, low, by_row, inside)
        weights = phi.square()
        total = weights.mul(whole).sum()
        size = weights.mul_(whole.sub_(inside, alpha=2 * alpha - alpha * alpha)).sum().clamp_(min=0).sqrt_()
        c = self._limit(size, total, a.dtype, state)
        factor = phi if c is None else phi.div_(c)
        rest = D - sharded.replicate(factor, D) * low.to(D.dtype)
        projector.add_up(weight, rest, state, alpha=-step_size * alpha, beta=beta)
        weight.addcmul_(a.to(weight.dtype), sharded.replicate(factor.to(weight.dtype), weight), value=-step_size)
        return True

    def _limit(self, size: Tensor, total: Tensor, dtype: torch.dtype, state: State) -> Tensor | None:
        """The divisor of S, None for 1; the kept norm is replaced."""
        if self.limiter is None:
            return None
        size = size.to(moment_dtype(dtype))  # independent of the inner rule's dtype
        rounding = max(8 * torch.finfo(size.dtype).eps, torch.finfo(dtype).eps ** 2)
        size = torch.where(size.square() > rounding * total, size, 0.0)
        before = state.get("residual_norm")
        if before is None:
            self._keep(size, state)
            return None
        c = size.div(before + _TINY).clamp_(min=self.limiter).div_(self.limiter)
        c = torch.where(before > 0, c, 1.0)
        self._keep(torch.where(size > 0, size / c, before), state)
        return c

    def _keep(self, norm: Tensor, state: State) -> None:
        if self.limiter is not None:
            state["residual_norm"] = norm

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The limiter's norm."""
        return {} if self.limiter is None else {"residual_norm": ((), moment_dtype(dtype))}


def _has_rest(a: Tensor, low: Tensor, projector: Projector) -> bool:
    """Whether anything is outside the subspace: not if it is the whole space and the scale is 1."""
    return a.shape != low.shape or projector.scale != 1.0


def _by_row(a: Tensor, low: Tensor) -> bool:
    """One factor per row or per column; the authors decide by D's shape. A factor must also fit the gradient."""
    return low.shape[0] >= low.shape[1] and low.shape[0] == a.shape[0]


def _ratio(D: Tensor, low: Tensor, by_row: bool, inside: Tensor | None = None) -> Tensor:
    """φ; `inside` are the squares of `low` if they are known."""
    inside = _squares(low, by_row) if inside is None else inside
    return _squares(D, by_row).sqrt_().div_(inside.sqrt().add_(_TINY))


def _squares(matrix: Any, by_row: bool) -> Tensor:
    """Squared norms of rows `(m, 1)` or of columns `(1, n)`, in float32 or better, whole on every process."""
    piece = sharded.local(matrix)
    wide, dim = moment_dtype(piece.dtype), int(by_row)
    if by_row or piece.device.type != "cpu" or not has_numbers(piece):
        found = torch.linalg.vector_norm(piece, dim=dim, keepdim=True, dtype=wide).square_()
    else:  # a CPU reduces a column entry by entry; a few rows at a time it adds along them
        sums = torch.zeros(min(_ROWS, piece.shape[0]), piece.shape[1], dtype=wide, device=piece.device)
        for rows in piece.split(_ROWS) if piece.numel() else ():
            rows = rows.to(wide)
            sums[: len(rows)].addcmul_(rows, rows)
        found = sums.sum(0, keepdim=True)
    if not sharded.is_sharded(matrix):
        return found
    from torch.distributed.tensor import DTensor, Partial

    shape = (matrix.shape[0], 1) if by_row else (1, matrix.shape[1])
    places = [Partial() if p.is_shard(dim) else p for p in matrix.placements]
    return DTensor.from_local(
        found, matrix.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    ).full_tensor()


@dataclass(frozen=True)
class ErrorFeedback(ResidualRule):
    """The part that the subspace lost is added to the next gradient.

    Formula: `A = G + E`, `E ← A − up(down(A))`, E = 0 at first. With 8 bits E is kept as `E ≈ low + q · scale`, q a byte,
    `low = min`, `scale = (max − min) / 255` of each row.

    State: `ef`, of the parameter's shape, in its dtype or as bytes; in 8 bits `ef_low` and `ef_scale (m, 1)` too.

    Args:
        bits: 8, or None for the parameter's dtype.
        max_dim: matrices with a side this long are not projected, and have no error.
    """

    bits: int | None = None
    max_dim: int | None = None

    def before(self, grad: Tensor, state: State) -> Tensor:
        """`G + E`, in E's memory if it has the gradient's dtype: `after` stores the new error there."""
        if "ef" not in state:
            return grad
        error = state["ef"]
        if "ef_low" in state:
            error = error.to(state["ef_low"].dtype).mul_(state["ef_scale"]).add_(state["ef_low"]).to(grad.dtype)
        return error.add_(grad)

    def after(self, a: Tensor, low: Tensor, D: Tensor, projector: Projector, state: State) -> Tensor | None:
        """None: nothing is added to this step's update."""
        if self._idle(tuple(a.shape)):
            return None
        error = a if "ef" in state else a.clone()  # a gradient is not modified
        projector.add_up(error, low, state, alpha=-1.0)
        if self.bits is None:
            state["ef"] = error
        else:
            state["ef"], state["ef_low"], state["ef_scale"] = _to_bytes(error)
        return None

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """The error."""
        if self._idle(shape):
            return {}
        if self.bits is None:
            return {"ef": (shape, dtype)}
        rows = ((shape[0], 1), moment_dtype(dtype))
        return {"ef": (shape, torch.uint8), "ef_low": rows, "ef_scale": rows}

    def _idle(self, shape: tuple[int, ...]) -> bool:
        return self.max_dim is not None and max(shape) >= self.max_dim


def _to_bytes(error: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, minima and step sizes of the rows."""
    wide = moment_dtype(error.dtype)
    least, most = (_of_rows(f(1, keepdim=True), error) for f in (error.amin, error.amax))
    least = least.to(wide)
    step = (most.to(wide) - least).div_(_LEVELS)
    piece, low, unit = sharded.local(error), sharded.local(least), sharded.local(step)
    unit = torch.where(unit > 0, unit, 1.0)
    codes = torch.empty(piece.shape, dtype=torch.uint8, device=piece.device)
    for out, rows, start, width in zip(*(few_rows(x, piece.shape[1]) for x in (codes, piece, low, unit))):
        out.copy_((rows - start).div_(width).round_().clamp_(0, _LEVELS))
    if sharded.is_sharded(error):
        from torch.distributed.tensor import DTensor

        where: dict[str, Any] = {"run_check": False, "shape": error.shape, "stride": error.stride()}
        codes = DTensor.from_local(codes, error.device_mesh, error.placements, **where)
    return codes, least, step


def _of_rows(values: Any, like: Any) -> Any:
    """One number per row, on the process that holds a piece of that row."""
    if not sharded.is_sharded(like):
        return values
    from torch.distributed.tensor import Replicate

    return values.redistribute(placements=[p if p.is_shard(0) else Replicate() for p in like.placements])


def few_rows(matrix: Tensor, width: int) -> Iterable[Tensor]:
    """The rows of a matrix in chunks suited to this width; for a forecast only the first chunk."""
    count = max(1, _CHUNK.get(matrix.device.type, _OTHER_CHUNK) // max(1, width))
    if not len(matrix):
        return ()
    return matrix.split(count) if has_numbers(matrix) else (matrix[:count],)
