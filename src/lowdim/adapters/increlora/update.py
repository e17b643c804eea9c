"""The update of IncreLoRA: lists of factors that grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.thin import ThinUpdate
from lowdim.linalg import add_product, draw_normal, gather, many_processes, mean_over_processes, replicate, slices, wide

__all__ = ["STD", "IncreLoRAUpdate"]

STD = 0.02  # of new rows
_FIRST_E = 1e-5  # of a reserve whose A and B learn in advance
_CHUNK = 2**20  # entries of the dense gradient that are computed at a time


class IncreLoRAUpdate(ThinUpdate):
    """`ΔW = alpha / (ranknum + 1e-5) · B diag(E) A` over lists that grow.

    `A[0] (rank, in)`, `E[0] (rank, 1)`, `B[0] (out, rank)`; later entries have one row each. The newest `rank_step` entries
    are the reserve, which `ranknum` does not count. `grown` holds the calls of the allocator that added a reserve here, so it
    determines the length of the lists and the optimizer group of each parameter.
    """

    ranknum: Tensor
    grown: Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        alpha: float,
        *,
        rank_step: int,
        advance: bool,
        dtype: Any,
        device: Any,
    ):
        super().__init__(out_features, in_features, rank)
        self.first, self.alpha, self.rank_step, self.advance = rank, alpha if alpha > 0 else float(rank), rank_step, advance
        new: dict[str, Any] = {"dtype": dtype, "device": device}
        self.A = nn.ParameterList([torch.empty(rank, in_features, **new)])
        self.E = nn.ParameterList([torch.zeros(rank, 1, **new)])
        self.B = nn.ParameterList([torch.empty(out_features, rank, **new)])
        self.register_buffer("ranknum", torch.tensor(float(rank), device=device))
        self.register_buffer("grown", None)
        self.times: list[int] = []  # the values of `grown`, readable without a device synchronisation
        self.scoring = True
        self.score: Tensor | None = None
        self._settle([])
        self._listen()

    @property
    def active(self) -> int:
        """The active rank, as `ranknum`."""
        return self.first + self.rank_step * max(0, len(self.times) - 1)

    def down(self) -> Tensor:
        """All of `A`, `(r, in)`."""
        return _joined(self.A, 0)

    def up(self) -> Tensor:
        """All of `B` times `E`, `(out, r)`."""
        return _joined(self.B, 1) * _joined(self.E, 0).mT

    def forward(self, x: Tensor) -> Tensor:
        """`scaling · B diag(E) A x`."""
        return self.add_to(x.new_zeros(*x.shape[:-1], self.out_features), x)

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused onto `y`; while scores are collected, the backward pass stores the layer's score in `score`."""
        down, up = self.down(), self.up()
        hidden = F.linear(x, down)
        if self.scoring and torch.is_grad_enabled():
            flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (y, hidden, x)]
            return _AddScored.apply(*flat, up, down, self.scaling, self._probe).view(y.shape)
        return add_product(y, hidden, up, self.scaling, inplace=inplace)

    def frames(self) -> tuple[Tensor, Tensor]:
        """All of `A (r, in)` and all of `Bᵀ (r, out)`, whose rows the regularizer keeps close to orthonormal."""
        return self.down(), _joined(self.B, 1).mT

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """The factors without the ranks whose `E` is 0 (an inactive reserve), but at least one rank."""
        kept = _joined(self.E, 0).squeeze(1).nonzero().squeeze(1)
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=kept.device)
        return wide(self.down()[kept]), self.scaling * (wide(_joined(self.B, 1)) * wide(_joined(self.E, 0).mT))[:, kept]

    def grow(self, call: int, generator: torch.Generator | None) -> None:
        """Activate the reserve, and add a new one, drawn from `generator` or, for loading, uninitialised.

        Args:
            call: of the allocator; growths come in the order of their calls.
        """
        for parameter in self.reserve():
            parameter.requires_grad_(True)
        for _ in range(self.rank_step):
            self._append(self.A, (1, self.in_features), generator)
            self._append(self.B, (self.out_features, 1), generator)
            self._append(self.E, (1, 1), None)
        self._settle([*self.times, call])
        if many_processes():  # DDP and FSDP2 do not know parameters that are added later
            for parameter in self.joined(call):
                parameter.register_hook(mean_over_processes)

    def reserve(self) -> list[nn.Parameter]:
        """The parameters of the reserve that are not trained yet."""
        lists = [self.E] if self.advance else [self.A, self.E, self.B]
        return [p for each in lists for p in list(each)[1:][-self.rank_step :]]

    def joined(self, call: int) -> list[nn.Parameter]:
        """The parameters whose training began with the growth at this call."""
        if call not in self.times:
            return []
        place = self.times.index(call)
        lists = [(self.E, place - 1)] if self.advance else [(self.A, place - 1), (self.E, place - 1), (self.B, place - 1)]
        lists += [(self.A, place), (self.B, place)] if self.advance else []
        n = self.rank_step
        return [p for each, block in lists if block >= 0 for p in list(each)[1 + n * block : 1 + n * (block + 1)]]

    @torch.no_grad()
    def silence(self) -> None:
        """Set `E` of the reserve to 0."""
        for parameter in list(self.E)[1:][-self.rank_step :]:
            parameter.zero_()

    def meta(self) -> dict[str, Any]:
        """When the lists grew."""
        return {"grown": list(self.times)}

    def restore(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take a checkpoint, with lists as long as its own."""
        if "grown" in tensors:
            self.resize(tensors["grown"].tolist())
        super().restore(tensors, weight)

    def resize(self, times: list[int]) -> None:
        """Resize the lists to their length after growths at these calls; the numbers are loaded afterwards."""
        if len(times) < len(self.times):
            keep = 1 + self.rank_step * len(times)
            self.A, self.E, self.B = (nn.ParameterList(list(each)[:keep]) for each in (self.A, self.E, self.B))
            self._settle(self.times[: len(times)])
            for parameter in self.reserve():
                parameter.requires_grad_(False)
        for call in times[len(self.times) :]:
            self.grow(call, None)
        self._settle(list(times))

    def _append(self, parts: nn.ParameterList, shape: tuple[int, int], generator: torch.Generator | None) -> None:
        like = self.A[0]
        values = torch.full(shape, _FIRST_E * self.advance, dtype=like.dtype, device=like.device)
        if parts is not self.E and generator is not None:
            draw_normal(values, STD, generator)
        parts.append(nn.Parameter(replicate(values, like), requires_grad=self.advance and parts is not self.E))

    def _settle(self, times: list[int]) -> None:
        self.times = times
        self.grown = torch.tensor(times, dtype=torch.int64, device=self.ranknum.device)
        self.rank = self.first + self.rank_step * len(times)
        self.scaling = self.alpha / (self.active + 1e-5)
        self.ranknum.fill_(self.active)

    def _listen(self) -> None:
        # The backward pass returns the score as the gradient of this tensor: unlike an assignment, that can be compiled.
        # It is not a parameter, so neither optimizers nor gradient clipping see it.
        self._probe = torch.zeros((), dtype=wide(self.A[0]).dtype, device=self.ranknum.device, requires_grad=True)
        self._probe.register_post_accumulate_grad_hook(self._hear)

    def _hear(self, probe: Tensor) -> None:
        self.score, probe.grad = probe.grad, None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._listen()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_probe", "score")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.score = None
        self._listen()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Before the lists are loaded, which are children of this module; a trainer builds the optimizer after that.
        if prefix + "grown" in state_dict:
            self.resize(state_dict[prefix + "grown"].tolist())
        super()._load_from_state_dict(state_dict, prefix, *args)


class _AddScored(torch.autograd.Function):
    """`y + scale · up hidden`; the backward pass also gives `probe` the score of `ΔW = scale · up · down` as its gradient."""

    @staticmethod
    def forward(y: Tensor, hidden: Tensor, x: Tensor, up: Tensor, down: Tensor, scale: float, probe: Tensor) -> Tensor:
        # Not a view: a view that a custom function returns cannot be changed in place afterwards.
        if y.dtype == hidden.dtype == up.dtype:
            return torch.addmm(y, hidden, up.mT, alpha=scale)
        return y + scale * F.linear(hidden, up).to(y.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, hidden, x, up, down, ctx.scale, _ = inputs
        ctx.save_for_backward(hidden, x, up, down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        hidden, x, up, down = ctx.saved_tensors
        for_hidden = ctx.scale * (grad @ up.to(grad.dtype))
        for_up = ctx.scale * (grad.mT @ hidden.to(grad.dtype))
        with torch.no_grad():
            score = abs(ctx.scale) * _score(grad, x.to(grad.dtype), up, down)
        return grad, for_hidden, None, for_up, None, None, score


def _score(
    grad: Tensor,  # (rows, out)
    x: Tensor,  # (rows, in)
    up: Tensor,  # (out, r)
    down: Tensor,  # (r, in)
) -> Tensor:
    """`Σ |up down ∘ gradᵀ x| / √(out·in)`, a few rows of the matrices at a time."""
    out, n = len(up), x.shape[1]
    total, turned = torch.zeros((), dtype=wide(up).dtype, device=up.device), grad.mT
    for rows in slices(out, max(1, _CHUNK // n), up):
        part = (up[rows] @ down).mul_(turned[rows] @ x)
        total = total + torch.linalg.vector_norm(part, 1, dtype=total.dtype)
    return total / math.sqrt(out * n)


def _joined(parts: nn.ParameterList, dim: int) -> Tensor:
    return gather(parts[0]) if len(parts) == 1 else torch.cat([gather(part) for part in parts], dim)
