"""Frozen factors of the pre-trained weight around a trained diagonal, which keeps its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import CheckpointError
from lowdim.linalg import wide

__all__ = ["DiagonalUpdate"]


class DiagonalUpdate(ThinUpdate):
    """`up diag(d) down`: `up (out, r)` and `down (r, in)` frozen, `d (r,)` trained from a start subtracted from the base.

    A subclass names the tensors as in its paper and computes the frozen ones from the weight; a checkpoint then holds only
    the trained diagonal. Products, residual, exact factors of ΔW and restoring are implemented here.
    """

    #: Attribute names of the left factor, the trained diagonal, its start and the right factor.
    names: ClassVar[tuple[str, str, str, str]]

    def __init__(self, out_features: int, in_features: int, rank: int, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank)
        up, trained, start, down = self.names
        self.register_parameter(trained, nn.Parameter(torch.empty(rank, dtype=dtype, device=device)))
        self.register_buffer(start, torch.empty(rank, dtype=dtype, device=device))
        self.register_buffer(up, torch.empty(out_features, rank, dtype=dtype, device=device))
        self.register_buffer(down, torch.empty(rank, in_features, dtype=dtype, device=device))
        self.unique = True  # whether the weight alone determines the frozen factors

    def recompute(self, weight: Tensor) -> None:
        """Set everything that is not `kept()` from the layer's weight."""
        raise NotImplementedError(f"{type(self).__name__} must define recompute(weight)")

    def kept(self) -> tuple[str, ...]:
        """Names of the tensors that a checkpoint holds if the weight determines the rest."""
        return (self.names[1],)

    def diagonal(self) -> Tensor:
        """The diagonal between the factors, `(r,)`."""
        return getattr(self, self.names[1])

    def exact_diagonal(self) -> Tensor:
        """`diagonal()` in float32 or better."""
        return wide(getattr(self, self.names[1]))

    def start_diagonal(self) -> Tensor:
        """The diagonal that was subtracted from the base, in float32 or better."""
        return wide(getattr(self, self.names[2]))

    def down(self) -> Tensor:
        """The right factor."""
        return getattr(self, self.names[3])

    def inner(self, hidden: Tensor) -> Tensor:
        """`d ⊙ h`."""
        return hidden * self.diagonal()

    def up(self) -> Tensor:
        """The left factor."""
        return getattr(self, self.names[0])

    def start_up(self) -> Tensor:
        """`up diag(d at the start)`."""
        return wide(self.up()) * self.start_diagonal()

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`down` and `up diag(d − d at the start)`: the difference is computed before the product, so nothing cancels."""
        return wide(self.down()), wide(self.up()) * (self.exact_diagonal() - self.start_diagonal())

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The product of the exact factors."""
        down, up = self.low_rank_delta()
        return up @ down

    def saved(self) -> dict[str, Tensor]:
        """The trained numbers; the frozen factors only if the weight does not determine them."""
        state = self.state_dict()
        return {name: state[name] for name in self.kept()} if self.unique else state

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Load the trained numbers; the frozen factors come from the file or from the weight."""
        if set(tensors) != set(self.kept()):
            self.unique = False
            return super().restore(tensors, weight)
        for name, value in tensors.items():
            own: Tensor = getattr(self, name)
            if value.shape != own.shape:
                raise CheckpointError(f"{name} has shape {tuple(value.shape)} in the file; this layer's is {tuple(own.shape)}")
            own.copy_(value)
        self.recompute(weight)
