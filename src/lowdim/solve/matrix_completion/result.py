"""The result of matrix completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lowdim.results import Result

__all__ = ["CompletionResult"]


@dataclass(frozen=True)
class CompletionResult(Result):
    """Factors of a completed matrix `U Vᵀ` and how they were found. Arrays are numpy or torch, as the input was."""

    left_out: ClassVar[tuple[str, ...]] = ("U", "V")

    U: Any  # (m, k), not orthonormalised
    V: Any  # (n, k), orthonormal columns
    errors: list[float]  # relative error on the observed entries, one per round
    iterations: int
    converged: bool
    reason: str  # why it stopped
    underdetermined_rows: int  # rows with fewer entries than the rank (none included): not identified
    underdetermined_cols: int
    flops: float  # floating point operations of all rounds, counted as executed
    inner_steps: float  # mean conjugate-gradient steps of a sketched system; 0 if all were solved exactly

    def entries(self, rows: Any, cols: Any) -> Any:
        """The completed matrix at these positions, without building it."""
        return (self.U[rows] * self.V[cols]).sum(-1)

    def to_dict(self) -> dict[str, Any]:
        """The fields without the factors, and their sizes, as strict JSON."""
        return {**super().to_dict(), "shape": [len(self.U), len(self.V)], "rank": int(self.U.shape[1])}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each round: its relative error on the observed entries."""
        return [{"round": i, "error": error} for i, error in enumerate(self.errors, 1)]

    @property
    def summary(self) -> str:
        """One line."""
        shape = f"{len(self.U)} x {len(self.V)}, rank {self.U.shape[1]}"
        return f"{shape}: {self.reason} after {self.iterations} rounds, observed error {self.errors[-1]:.3g}"
