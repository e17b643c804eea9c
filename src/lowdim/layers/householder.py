"""The Householder projector: a low-rank linear layer all of whose directions have the same gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_float, check_int, shown
from lowdim.linalg import (
    Cost,
    draw_normal,
    has_numbers,
    householder_product,
    householder_vectors,
    seeded,
    svd,
    without_autocast,
)
from lowdim.modules import RebuildableLinear
from lowdim.surgery import plain_weight

__all__ = ["HouseholderProjector"]

#: Of fresh reflectors; only their directions count.
_STD = 0.05


class HouseholderProjector(RebuildableLinear):
    """A linear layer of a given rank whose non-zero singular values are all equal, whatever is trained.

    Formula: `y = W x + bias`, `W = scale · P diag(signs) R`. `P (out, rank)` are the first columns of `Q(U)` and `R (rank, in)`
    the first rows of `Q(V)`; `Q(U)` is the product of the Householder reflectors `I - 2 u uᵀ / ‖u‖²` of the columns u of U
    (`lowdim.linalg.householder_product`). The rows of R are the directions that the layer sees: `directions()`.

    U (out, out), V (in, in) and the bias are trained; `signs (rank,)` is a buffer of ±1, all 1 in a fresh layer.

    Args:
        rank: number of directions, in [1, min(in, out)].
        scale: the gain of each direction.
        seed, generator: source of random numbers; the generator has priority, and without either torch's default one is used.

    Raises:
        ValueError: sizes or rank out of range, a scale that is no finite number.

    Example:
        >>> import torch
        >>> from lowdim.layers import HouseholderProjector
        >>> layer = HouseholderProjector(8, 16, rank=3, seed=0)
        >>> directions = layer.directions()
        >>> directions.shape, bool(torch.allclose(directions @ directions.T, torch.eye(3), atol=1e-6))
        (torch.Size([3, 8]), True)
        >>> bool(torch.allclose(torch.linalg.svdvals(layer.dense_weight())[:4], torch.tensor([1.0, 1, 1, 0]), atol=1e-6))
        True

    It holds more numbers than a dense layer, `out² + in²`: it is a constraint, not a compression; convert it once it is trained
    (`to_linear`). Weight decay only shrinks the reflectors, whose lengths do not count, and so raises the effective rate: use 0
    for U and V.

    Source: Song et al., "Householder Projector for Unsupervised Latent Semantics Discovery", ICCV 2023, arXiv 2307.08012.
    """

    signs: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 10,
        scale: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("rank", rank, 1, min(in_features, out_features))
        check_float("scale", scale)
        self.in_features, self.out_features, self.rank, self.scale = in_features, out_features, rank, float(scale)
        self.U = nn.Parameter(torch.empty(out_features, out_features, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(in_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("signs", torch.ones(rank, device=device, dtype=dtype))
        self._kept: tuple[Any, Tensor, Tensor] | None = None
        self.reset_parameters(seeded(seed, generator))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh reflectors, all signs 1, no bias."""
        draw_normal(self.U, _STD, generator)
        draw_normal(self.V, _STD, generator)
        self.signs.fill_(1.0)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int = 10, scale: float | str = 1.0) -> HouseholderProjector:
        """The nearest projector to a trained layer: its leading singular vectors, every singular value set to `scale`.

        Args:
            rank: how many singular directions are kept.
            scale: a number, or "mean" for the mean of the kept singular values.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: rank or scale out of range, NaN or infinity in the weight.
        """
        weight = plain_weight(linear)
        check_int("rank", rank, 1, min(weight.shape))
        if isinstance(scale, str) and scale != "mean":
            raise ValueError(f'scale must be a finite number or "mean"; got {shown(scale)}')
        u, s, vh = svd(weight)
        if isinstance(scale, str):
            scale = float(s[:rank].mean()) if has_numbers(s) else 1.0
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer = cls(*sizes, rank=rank, scale=scale, device="meta", dtype=weight.dtype)
        left, signs = householder_vectors(u[:, :rank])
        right, others = householder_vectors(vh[:rank].mT)
        layer.U = nn.Parameter(_completed(left).to(weight.dtype))
        layer.V = nn.Parameter(_completed(right).flip(1).to(weight.dtype))  # R is of Q(V) transposed: in the other order
        layer.signs = (signs * others).to(weight.dtype)
        return layer.with_rest_of(linear)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """`P (out, rank)` and `R (rank, in)` in float32 or better; without gradients they are kept until U or V changes."""
        if torch.is_grad_enabled():  # an optimizer's step may follow, and not every one of them raises a tensor's version
            self._kept = None
            return self._built()
        state = [(p.data_ptr(), p.dtype, p.device, p._version) for p in (self.U, self.V) if not _unversioned(p)]
        if len(state) < 2:
            return self._built()
        if self._kept is None or self._kept[0] != state:
            self._kept = state, *self._built()
        return self._kept[1:]

    def _built(self) -> tuple[Tensor, Tensor]:
        return householder_product(self.U, self.rank), householder_product(self.V, self.rank, transpose=True).mT

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; the dense weight is never built."""
        self.check_input(x)
        P, R = (end.to(self.U.dtype) for end in self._ends())
        hidden = F.linear(x, R)
        return F.linear(hidden * (self.scale * self.signs).to(hidden.dtype), P, self.bias)

    def dense_weight(self) -> Tensor:
        """`scale · P diag(signs) R`, `(out, in)`."""
        P, R = self._ends()
        with without_autocast(P.device.type):
            return ((P * (self.scale * self.signs.to(P.dtype))) @ R).to(self.U.dtype)

    @torch.no_grad()
    def directions(self, k: int | None = None) -> Tensor:
        """The first k directions that the layer sees, as orthonormal rows `(k, in)`, in float32 or better; all by default.

        A step `x + alpha · direction` changes the output by `scale · alpha`, in a direction of the output of its own.

        Raises:
            ValueError: k outside [1, rank].
        """
        check_int("k", self.rank if k is None else k, 1, self.rank)
        return self._ends()[1][:k].clone()

    def products(self) -> list[tuple[int, int, int]]:
        """`R`, then `P`."""
        sizes = self.in_features, self.out_features
        return [(self.rank * sizes[0], sizes[0], self.rank), (self.rank * sizes[1], self.rank, sizes[1])]

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use in training: the two products, and building P and R.

        Formula: in addition to the products `4 rank (out² + in²)` FLOPs and `itemsize (out² + in² + 2 rank (out + in))` bytes,
        once however many rows there are; backward is twice forward.
        """
        cost = super().cost(tokens, itemsize=itemsize)
        squares, ends = self.out_features**2 + self.in_features**2, self.out_features + self.in_features
        flops = cost.flops_forward + 4 * self.rank * squares
        traffic = cost.bytes_forward + itemsize * (squares + 2 * self.rank * ends)
        return Cost(cost.parameters, flops, 2 * flops, traffic, 2 * traffic)

    def description(self) -> dict[str, Any]:
        """Rank, scale, and whether there is a bias."""
        return {"rank": self.rank, "scale": self.scale, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Sizes, rank and scale, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}  # type: ignore[misc]


def _completed(
    v: Tensor,  # (d, r)
) -> Tensor:
    """The reflectors with unit columns behind them, `(d, d)`: these leave the first r columns of the product as they are."""
    return torch.cat([v, torch.eye(len(v), dtype=v.dtype, device=v.device)[:, v.shape[1] :]], 1)


def _unversioned(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.is_inference() or not has_numbers(tensor)
