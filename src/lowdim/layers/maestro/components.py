"""Two factors whose components are ordered by importance: the base of the Maestro layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import CheckpointError, check_float, check_int
from lowdim.linalg import draw_uniform, gather, has_numbers, is_sharded, svd

__all__ = ["OrderedComponents"]


class OrderedComponents(nn.Module):
    """The base of both layers: two factors with ordered components, a current rank and, for one pass, a smaller one.

    A subclass defines `dense_shape`, the shape `(out, in)` of the equivalent matrix.
    """

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, out_features: int, v_shape: tuple[int, ...], bias: bool, device: Any, dtype: torch.dtype | None):
        super().__init__()
        d = min(out_features, math.prod(v_shape))
        self._rank = d
        self.sampled: int | None = None
        self.U = nn.Parameter(torch.empty(out_features, d, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(d, *v_shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def rank(self) -> int:
        """The number of components in use; saved in the state dict."""
        return self._rank

    @rank.setter
    def rank(self, value: int) -> None:
        check_int("rank", value, 0, self.U.shape[1])
        self._rank = value

    @property
    def weight(self) -> Tensor:
        """`dense_weight()`, computed at every access, for code that reads the weight of any layer."""
        return self.dense_weight()

    def dense_weight(self) -> Tensor:
        """The exact dense equivalent at the current rank, differentiable."""
        raise NotImplementedError

    @property
    def dense_shape(self) -> tuple[int, int]:
        """`(out, in)`; `in` counts the kernel's entries."""
        return self.U.shape[0], math.prod(self.V.shape[1:])

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weight and bias uniform in ±1/√in, as in nn.Linear and nn.Conv2d; the weight is then decomposed."""
        out_features, in_features = self.dense_shape
        if self.U.is_meta:
            return
        weight = torch.empty(
            out_features, in_features, dtype=torch.promote_types(self.U.dtype, torch.float32), device=self.U.device
        )
        draw_uniform(weight, in_features**-0.5, generator)
        u, v = _factors(weight)
        self.U.copy_(u)
        self.V.copy_(v.view(self.V.shape))
        if self.bias is not None:
            draw_uniform(self.bias, in_features**-0.5, generator)

    def initialise_from(self, weight: Tensor, bias: Tensor | None) -> None:
        """Decompose this weight `(out, ...)`; dtype and device are kept."""
        u, v = _factors(weight.detach().flatten(1))
        self.U = nn.Parameter(u.to(weight.dtype))
        self.V = nn.Parameter(v.view(self.V.shape).to(weight.dtype))
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone())

    def active(self, rank: int | None) -> int:
        """The rank of a pass: the requested one, else the sampled one, else the current one."""
        if rank is None:
            rank = self.sampled
        if rank is None:
            return self._rank
        check_int("rank", rank, 0, self._rank)
        return rank

    def prefix(self, rank: int) -> tuple[Tensor, Tensor]:
        """The first components; the others get a zero gradient instead of None."""
        if rank == self.U.shape[1]:
            return self.U, self.V
        return self.U[:, :rank], self.V[:rank]

    def group_lasso(self, hierarchical: bool = True) -> Tensor:
        """The penalty that empties the last components: `Σ_i ‖U[:, i:]‖ + ‖V[i:]‖`, a scalar in float32 or better.

        It covers all stored components, also unused ones, in one pass over the factors: the tails are a cumulative sum, from
        the end, of the columns' square norms. At an all-zero tail its gradient is 0. Works on sharded
        parameters; every process gets the same number.

        Args:
            hierarchical: False uses single columns and rows instead of tails.
        """
        return _norms(_columns(self.U), hierarchical).sum() + _norms(_rows(self.V), hierarchical).sum()

    @torch.no_grad()
    def importance(self, hierarchical: bool = True) -> Tensor:
        """`‖U[:, i:]‖ ‖V[i:]‖` of every stored component, `(d,)`, non-increasing; else of column and row `i`."""
        return _norms(_columns(self.U), hierarchical) * _norms(_rows(self.V), hierarchical)

    @torch.no_grad()
    def shrink(self, threshold: float, *, prune: bool = False) -> int:
        """Use only components whose hierarchical importance is at least `threshold`; the new rank, never above the old one.

        Args:
            prune: also remove the other components from the parameters. Only at the end of training: the optimizer still holds
                the old tensors.

        Raises:
            ValueError: threshold negative or not finite; `prune` while the parameters are sharded.
        """
        check_float("threshold", threshold, 0.0)
        if prune and is_sharded(self.U):
            raise ValueError("prune must be False while the parameters are sharded (DTensor); got True. Gather the model first")
        if has_numbers(self.U):  # a forecast cannot know which components are removed
            self._rank = min(self._rank, int((self.importance() >= threshold).sum()))
        if prune:
            self.prune()
        return self._rank

    @torch.no_grad()
    def prune(self) -> None:
        """Reduce the parameters to the current rank; build a new optimizer afterwards."""
        if self._rank < self.U.shape[1]:
            self._replace(self.U[:, : self._rank].clone(), self.V[: self._rank].clone())

    def _replace(self, u: Tensor, v: Tensor) -> None:
        for name, value in (("U", u), ("V", v)):
            setattr(self, name, nn.Parameter(value.contiguous(), requires_grad=getattr(self, name).requires_grad))

    # The rank is saved in the state dict; a state dict with another number of components can be loaded.

    def get_extra_state(self) -> Tensor:
        """The current rank."""
        return torch.tensor(self._rank)

    def set_extra_state(self, state: Any) -> None:
        """Set the rank from a state dict.

        Raises:
            CheckpointError: it is not a valid rank of this layer.
        """
        whole = isinstance(state, int) or (isinstance(state, Tensor) and state.numel() == 1 and not state.is_floating_point())
        rank = int(state) if whole else -1
        if not 0 <= rank <= self.U.shape[1]:
            raise CheckpointError(f"_extra_state must be a rank in [0, {self.U.shape[1]}]; got {state!r}")
        self._rank = rank

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved, key, wrong = state_dict.get(f"{prefix}U"), f"{prefix}_extra_state", len(error_msgs)
        if isinstance(saved, Tensor) and saved.ndim == 2 and not is_sharded(self.U):
            (out_features, d), v = saved.shape, self.V.new_empty(saved.shape[1], *self.V.shape[1:])
            fits = out_features == self.U.shape[0] and v.shape == getattr(state_dict.get(f"{prefix}V"), "shape", None)
            if fits and d != self.U.shape[1] and d <= min(self.dense_shape):  # of a pruned layer
                self._replace(self.U.new_empty(out_features, d), v)
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        except CheckpointError:
            if len(error_msgs) == wrong:  # otherwise tensors of another shape are the reason, and reported
                raise
        if saved is not None and key not in state_dict:  # written by other code: everything is in use
            self._rank = self.U.shape[1]
            if key in missing_keys:
                missing_keys.remove(key)


def _factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = svd(weight)
    root = s.sqrt()
    return u * root, root[:, None] * vh


def _columns(u: Tensor) -> Tensor:
    """Norms of the columns, whole on every process."""
    return gather(torch.linalg.vector_norm(u, dim=0, dtype=torch.promote_types(u.dtype, torch.float32)))


def _rows(v: Tensor) -> Tensor:
    dims = tuple(range(1, v.ndim))
    return gather(torch.linalg.vector_norm(v, dim=dims, dtype=torch.promote_types(v.dtype, torch.float32)))


def _norms(single: Tensor, hierarchical: bool) -> Tensor:
    """Norms of the tails, from those of the single columns; for an empty tail the gradient is 0, not NaN."""
    if not hierarchical:
        return single
    squares = single.square().flip(0).cumsum(0).flip(0)
    nothing = squares == 0
    return squares.masked_fill(nothing, 1).sqrt().masked_fill(nothing, 0)
