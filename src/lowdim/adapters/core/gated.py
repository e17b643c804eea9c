"""LoRA with a gate on its ranks, shared by SoRA and DiffoRA."""

from __future__ import annotations

from torch import Tensor

from lowdim.adapters.core.low_rank import LoRAUpdate

__all__ = ["GatedLoRAUpdate"]


class GatedLoRAUpdate(LoRAUpdate):
    """`ΔW = scaling · B diag(g) A`: `A (rank, in)`, `B (out, rank)`, and a gate `g` that a subclass defines.

    The gate scales the columns of `B`, not the thin product, so autograd keeps the same per input row as for LoRA: `x` and
    `A x`.
    """

    def gates(self) -> Tensor:
        """The gate, `(rank,)`, or 0-dim where all ranks share one."""
        raise NotImplementedError(f"{type(self).__name__} must define gates()")

    def up(self) -> Tensor:
        """`B diag(g)`."""
        return self.B * self.gates()
