"""Sparse Spectral Training: a layer stored as its full singular value decomposition; few directions train at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_int
from lowdim.linalg import Cost, broadcast, compute_dtype, draw_uniform, gather, local, match, stream, svd
from lowdim.modules import StructuredLinear
from lowdim.surgery import plain_weight

__all__ = ["SSTLinear"]


class SSTLinear(StructuredLinear):
    """A linear layer as `U diag(S) Vh` of full rank, whose singular values train always and `rank` singular vectors at a time.

    Formula: `h = x Vhᵀ`, `y = (h · S) Uᵀ + bias`, with `d = min(in, out)`, `U (out, d)`, `S (d,)`, `Vh (d, in)`. All of `S` has
    its exact gradient. Of `U` and `Vh` only the active columns and rows `k` are trained, by the enhanced gradient, which
    lacks the factor `S_k` so that directions with a small singular value learn too: with `G = ∂L/∂W`, `G v_k` for `u_k` and
    `u_kᵀ G` for `v_k`. The parameters `U_active (out, rank)`, `Vh_active (rank, in)` replace the columns and rows
    `active (rank,)` of the buffers `U` and `Vh`, which are stale there until `write_back()`.

    Args:
        rank: number of active directions, in [1, min(in, out)]; the paper uses about `d / 16`.
        seed: of the fresh weight (uniform, as nn.Linear's), and of `resample()` without a generator; None uses torch's default
            generator. New layers of one shape and one seed start alike.

    Raises:
        ValueError: sizes below 1, rank outside [1, min(in, out)].

    Example:
        >>> import torch
        >>> from lowdim.layers import SSTLinear
        >>> layer = SSTLinear(64, 96, rank=4)
        >>> layer(torch.zeros(2, 64)).shape, layer.dense_weight().shape
        (torch.Size([2, 96]), torch.Size([96, 64]))
        >>> sum(p.numel() for p in layer.parameters())  # 4 (96 + 64) + 64 + the bias; a dense layer trains 6240
        800

    The optimizer alone is not enough: `lowdim.layers.SSTScheduler` clips, normalises, draws the active directions and restores
    orthogonality. Not for saving weights or arithmetic (both are those of a whole SVD, about twice a square dense layer's;
    turn it into a plain layer with `to_linear()` afterwards), only the optimizer's state and the gradients are small. The
    enhanced gradient is not the gradient of any loss: do not use line searches and second-order methods.

    Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
    arXiv 2405.15481.
    """

    U: Tensor
    Vh: Tensor
    active: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        seed: int | None = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        self._allocate(in_features, out_features, bias, rank, seed, device=device, dtype=dtype)
        self.reset_parameters()

    def _allocate(self, in_features: int, out_features: int, bias: bool, rank: int, seed: int | None, **place: Any) -> None:
        nn.Module.__init__(self)
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        size = min(in_features, out_features)
        check_int("rank", rank, 1, size)
        if seed is not None:
            check_int("seed", seed, 0)
        self.in_features, self.out_features, self.rank, self.seed = in_features, out_features, rank, seed
        self._draws = 0
        self.S = nn.Parameter(torch.empty(size, **place))
        self.U_active = nn.Parameter(torch.empty(out_features, rank, **place))
        self.Vh_active = nn.Parameter(torch.empty(rank, in_features, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None
        self.register_buffer("U", torch.empty(out_features, size, **place))
        self.register_buffer("Vh", torch.empty(size, in_features, **place))
        self.register_buffer("active", torch.arange(rank, device=self.S.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The SVD of a weight drawn as nn.Linear's, uniform in ±1/√in as the bias; the first `rank` directions are active."""
        if self.S.is_meta:
            return
        torch.arange(self.rank, out=self.active)
        generator = None if self.seed is None else stream(self.seed, "sst", "weight")
        bound = 1 / math.sqrt(self.in_features)
        shape = self.out_features, self.in_features
        weight = torch.empty(shape, device=self.U.device, dtype=compute_dtype(self.U.dtype))
        draw_uniform(weight, bound, generator)
        self._decompose(weight)
        if self.bias is not None:
            bias = torch.empty(self.out_features, device=self.U.device, dtype=compute_dtype(self.U.dtype))
            draw_uniform(bias, bound, generator)
            _assign(self.bias, bias)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; keeps `x` and `h (..., d)` for the backward pass."""
        self.check_input(x)
        cast = None
        if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            cast = torch.get_autocast_dtype(x.device.type)
        given = x, self.S, self.U_active, self.Vh_active, self.bias, self.U, self.Vh, self.active, cast
        return _Spectral.apply(*given) if torch.is_grad_enabled() else _multiply(*given)[0]  # type: ignore[no-any-return]

    def dense_weight(self) -> Tensor:
        """`U diag(S) Vh` with the active vectors in their places, `(out, in)`; `U` and `Vh` need not be orthogonal."""
        S, U_active, Vh_active = gather(self.S), gather(self.U_active), gather(self.Vh_active)
        rest = (self.U * S.index_fill(0, self.active, 0)) @ self.Vh
        return torch.addmm(rest, U_active * S.index_select(0, self.active), Vh_active)

    @torch.no_grad()
    def post_step(self) -> None:
        """After each optimizer step: negative singular values become 0, active vectors get length 1."""
        self.S.clamp_(min=0)
        _normalise(self.U_active, 0)
        _normalise(self.Vh_active, 1)

    @torch.no_grad()
    def sampling_probabilities(self) -> Tensor:
        """`½ (1/d + S_k / Σ S)`, `(d,)`, in float32 or better; uniform where all singular values are 0."""
        S = gather(self.S).detach()
        S = S.to(compute_dtype(S.dtype)).clamp(min=0)
        total = S.sum()
        uniform = torch.full_like(S, 1 / len(S))
        return 0.5 * (uniform + torch.where(total > 0, S / total, uniform))

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the active vectors into their columns of `U` and rows of `Vh`."""
        self.U.index_copy_(1, self.active, gather(self.U_active).to(self.U.dtype))
        self.Vh.index_copy_(0, self.active, gather(self.Vh_active).to(self.Vh.dtype))

    @torch.no_grad()
    def resample(self, generator: torch.Generator | None = None, indices: Sequence[int] | Tensor | None = None) -> None:
        """Write back, and activate other directions; the dense weight does not change, the optimizer's state becomes invalid.

        Args:
            generator: draws `rank` distinct directions by `sampling_probabilities()`; None uses the layer's own stream, whose
                position is not in the state dict.
            indices: the directions to activate instead, in any order.

        Raises:
            ValueError: duplicate indices, outside [0, d), or not `rank` of them.
        """
        chosen = self._draw(generator) if indices is None else self._checked(indices)
        self.write_back()
        self.active.copy_(chosen)
        self._activate()

    @torch.no_grad()
    def reinitialize(self) -> None:
        """Write back and decompose the dense weight again: orthogonal vectors, the same weight, the same active positions.

        Raises:
            ValueError: NaN or infinity in the weight.
        """
        parts = [gather(self.S), gather(self.U_active), gather(self.Vh_active), self.U, self.Vh]
        wide = compute_dtype(self.U.dtype)
        S, U_active, Vh_active, U, Vh = (part.to(wide) for part in parts)
        U = U.index_copy(1, self.active, U_active)
        self._decompose((U * S) @ Vh.index_copy(0, self.active, Vh_active))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int, seed: int | None = 0) -> SSTLinear:
        """The same function as a plain layer's, decomposed; the first `rank` directions are active, the bias is copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: rank outside [1, min(in, out)], NaN or infinity in the weight.
        """
        weight, sizes = plain_weight(linear), (linear.in_features, linear.out_features)
        layer = cls.__new__(cls)  # no random draw: the weight is given
        layer._allocate(*sizes, linear.bias is not None, rank, seed, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer._decompose(weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    def products(self) -> list[tuple[int, int, int]]:
        """`Vh` and `U`, then their active parts, which replace those columns."""
        n_in, n_out, d, r = self.in_features, self.out_features, self.S.numel(), self.rank
        return [(d * n_in, n_in, d), (d * n_out, d, n_out), (r * n_in, n_in, r), (r * n_out, r, n_out)]

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use; frozen vectors get no gradient, so a backward pass costs little more than a forward pass."""
        cost = super().cost(tokens, itemsize=itemsize)
        n_in, n_out, r = self.in_features, self.out_features, self.rank
        flops = 2 * tokens * r * (n_in + n_out)
        traffic = itemsize * (tokens * (n_in + n_out + 2 * r) + r * (n_in + n_out))
        return cost._replace(flops_backward=cost.flops_forward + flops, bytes_backward=cost.bytes_forward + traffic)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def _decompose(self, weight: Tensor) -> None:
        U, S, Vh = (part.contiguous() for part in svd(weight))
        for part in (U, S, Vh):
            broadcast(part, self.S)
        self.U.copy_(U)
        self.Vh.copy_(Vh)
        _assign(self.S, S)
        self._activate()

    def _activate(self) -> None:
        _assign(self.U_active, self.U.index_select(1, self.active))
        _assign(self.Vh_active, self.Vh.index_select(0, self.active))

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        if generator is None and self.seed is not None:
            generator = stream(self.seed, "sst", "active", self._draws)
        self._draws += 1
        weights = self.sampling_probabilities()
        if generator is not None:
            weights = weights.to(generator.device)
        return torch.multinomial(weights.double(), self.rank, generator=generator).sort().values

    def _checked(self, indices: Sequence[int] | Tensor) -> Tensor:
        given = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        size = self.S.numel()
        good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size for i in given)
        if not good or len(set(given)) != len(given) or len(given) != self.rank:
            raise ValueError(f"indices must be {self.rank} distinct ints in [0, {size}); got {given}")
        return torch.tensor(sorted(given), device=self.active.device)


class _Spectral(torch.autograd.Function):
    """The product, with exact gradients except for the active vectors, whose gradients lack the factor S."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        y, *kept = _multiply(*given)
        x, S, U_active, Vh_active, _, U, Vh, active, _ = given
        for_x, for_S, for_U, for_Vh, *_ = ctx.needs_input_grad
        rows, hidden = kept[0] if for_Vh else None, kept[1] if for_S or for_U else None
        ctx.save_for_backward(rows, hidden, S, U_active, Vh_active, U, Vh if for_x else None, active)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # (..., out)
        rows, hidden, S, U_active, Vh_active, U, Vh, active = ctx.saved_tensors
        for_x, for_S, for_U, for_Vh, for_bias, *_ = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        found: list[Tensor | None] = [None] * 9
        with nullcontext() if grad.is_meta else torch.autocast(grad.device.type, enabled=False):
            if for_bias:
                found[4] = grad.sum(0).to(S.dtype)
            if for_U:
                found[2] = (grad.mT @ hidden.index_select(1, active)).to(S.dtype)
            if for_x or for_S or for_Vh:
                thin = grad @ U_active.to(grad.dtype)  # (rows, rank)
            if for_Vh:
                found[3] = (thin.mT @ rows).to(S.dtype)
            if for_x or for_S:
                wide = grad @ U.to(grad.dtype)  # (rows, d)
            if for_S:
                wide.index_copy_(1, active, thin)
                found[1] = (hidden * wide).sum(0).to(S.dtype)
            if for_x:
                values = S.to(grad.dtype)
                grad_x = wide.mul_(values.index_fill(0, active, 0)) @ Vh.to(grad.dtype)
                thin = thin * values.index_select(0, active)
                torch.addmm(grad_x, thin, Vh_active.to(grad.dtype), out=grad_x)
                found[0] = grad_x.view(ctx.shape).to(ctx.dtype)
        return tuple(found)


def _multiply(
    x: Tensor,  # (..., in)
    S: Tensor,  # (d,)
    U_active: Tensor,  # (out, rank)
    Vh_active: Tensor,  # (rank, in)
    bias: Tensor | None,  # (out,)
    U: Tensor,  # (out, d)
    Vh: Tensor,  # (d, in)
    active: Tensor,  # (rank,)
    cast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y (..., out)`, the rows of `x` as they were multiplied, and `h (rows, d)`.

    The buffers' stale columns are multiplied by singular values of 0; two thin products add the active part without a copy.
    """
    dtype = S.dtype if cast is None else cast
    rows = x.reshape(-1, x.shape[-1])
    if cast is not None:
        rows, U_active, Vh_active = rows.to(cast), U_active.to(cast), Vh_active.to(cast)
    values = S.to(dtype)
    thin = rows @ Vh_active.mT
    hidden = rows @ Vh.to(dtype).mT
    hidden.index_copy_(1, active, thin)
    scaled = hidden * values.index_fill(0, active, 0)
    matrix = U.to(dtype).mT
    y = scaled @ matrix if bias is None else torch.addmm(bias.to(dtype), scaled, matrix)
    torch.addmm(y, thin * values.index_select(0, active), U_active.mT, out=y)
    if x.ndim != 2:  # FSDP2 warns of outputs that are views
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return y, rows, hidden


def _normalise(vectors: Any, axis: int) -> None:
    wide = compute_dtype(vectors.dtype)
    length = torch.linalg.vector_norm(vectors, dim=axis, keepdim=True, dtype=wide)
    vectors.div_(length.clamp_min(torch.finfo(wide).tiny))


def _assign(parameter: Any, values: Tensor) -> None:
    local(parameter).copy_(local(match(values.to(parameter.dtype), parameter)))
