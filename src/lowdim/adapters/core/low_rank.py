"""The product of two thin trained matrices: the update of LoRA and of methods with another initialisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.thin import ThinUpdate

__all__ = ["LoRAUpdate"]


class LoRAUpdate(ThinUpdate):
    """`ΔW = scaling · B A`: `A (rank, in)`, `B (out, rank)`, both trained."""

    #: Whether its rank is not that of its method.
    has_own_rank = False

    def __init__(self, out_features: int, in_features: int, rank: int, scaling: float, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank, scaling)
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))

    def meta(self) -> dict[str, Any]:
        """The rank, where it is not the method's."""
        return {"rank": self.rank} if self.has_own_rank else {}

    def down(self) -> Tensor:
        """`A`."""
        return self.A

    def up(self) -> Tensor:
        """`B`."""
        return self.B

    def columns(self, index: Tensor) -> Tensor:
        """`scaling · B A[:, index]` for an embedding; the column of `padding_idx` gets no gradient."""
        return self.expand(F.embedding(index, self.A.T, padding_idx=self.padding_idx))

    @torch.no_grad()
    def clear_column(self, index: int) -> None:
        """`A[:, index] ← 0`."""
        self.A[:, index] = 0.0
