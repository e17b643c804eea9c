"""The trained part of an adapted layer, which every adapter subclasses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import CheckpointError
from lowdim.linalg import wide

__all__ = ["WeightUpdate"]


class WeightUpdate(nn.Module):
    """The trained part of an adapted layer: a matrix `(out, in)` that is never built to be applied.

    Subclasses name their parameters and buffers as in their paper and define `forward` and `dense`; they override the rest
    where the structure allows something better than the default.
    """

    #: Names of parameters on which weight decay would pull the pre-trained weight itself towards zero.
    no_decay: frozenset[str] = frozenset()
    #: The row of an embedding that is not trained, as `padding_idx` of nn.Embedding says; set by the adapted layer.
    padding_idx: int | None = None

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """The term that the update adds to the layer's output, `(..., out_features)`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x)")

    def dense(self) -> Tensor:
        """The matrix `(out, in)` that `forward` applies, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define dense()")

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """`y + forward(x)`; override to fuse the addition. `inplace=True` allows `y` to be overwritten."""
        return y + self(x).to(y.dtype)

    def rebase(self, weight: Tensor) -> Tensor | None:
        """The frozen base matrix for this update when `weight (out, in)` is the layer's own, or None to keep it.

        Called once after initialising or loading, so both give the same bits.
        """
        return None

    def start(self) -> Tensor | None:
        """The part that `rebase` subtracted from the weight, `(out, in)`; None if the base is the weight itself."""
        return None

    @torch.no_grad()
    def exact(self) -> Tensor:
        """`dense()` with its products computed in float32 or better, without gradient; for merging, which rounds last."""
        narrow = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in self.parameters())
        return wide((copy.deepcopy(self).float() if narrow else self).dense())

    def exact_rows(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]] | None:
        """`weight + exact()` by blocks of rows, with the same bits, each in the memory of the last; None if it cannot."""
        return None

    @torch.no_grad()
    def delta(self) -> Tensor:
        """`W_eff − W₀ (out, in)`, in float32 or better, without gradient."""
        dense, start = self.exact(), self.start()
        return dense if start is None else dense - wide(start)

    def low_rank_delta(self) -> tuple[Tensor, Tensor] | None:
        """Factors `A (r, in)`, `B (out, r)` with `delta() = B A` exactly, or None where the delta has full rank."""
        return None

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor | None:
        """The term that the update adds to a convolution's output, or None to use `forward` on patches."""
        return None

    def columns(self, index: Tensor) -> Tensor:
        """Rows `dense()[:, index].T`, `(*index, out)`, for embeddings; not all methods support it."""
        raise NotImplementedError(f"{type(self).__name__} cannot adapt an embedding")

    def clear_column(self, index: int) -> None:
        """Make column `index` of a fresh update zero, for an embedding's `padding_idx`; updates that adapt embeddings do."""

    def meta(self) -> dict[str, Any]:
        """What `Method.blank` needs besides the shapes to allocate this update again (JSON)."""
        return {}

    def saved(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return self.state_dict()

    def restore(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Load the tensors of a checkpoint; `weight` is the layer's own, for tensors recomputed from it."""
        own = self.saved()
        wrong = sorted(set(own) ^ set(tensors)) or [k for k, v in own.items() if v.shape != tensors[k].shape]
        if wrong:
            raise CheckpointError(
                f"{type(self).__name__} does not fit the file: {', '.join(wrong)} missing, unexpected or of the wrong shape"
            )
        self.load_state_dict(dict(tensors), strict=False)

    def start_forward(self, x: Tensor) -> Tensor:
        """The output of `start()`, `(..., out_features)`; only called if `start()` is not None."""
        start = self.start()
        assert start is not None
        return F.linear(x, start.to(x.dtype))

    def connect(self, shared: nn.Module, name: str) -> None:
        """Connect to the method's `shared` module for layer `name`; called once, before the first forward."""

    def step(self) -> None:
        """After each optimizer step: schedules, proximal steps."""

    def regularizer(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None
