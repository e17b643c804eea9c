"""FLoRA: the update of an N-dimensional weight is a Tucker product with a small core."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.common import CAP
from lowdim.adapters.core.convolution import Convolution
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import check_float, check_int
from lowdim.linalg import draw_normal, mode_products, tucker_reconstruct
from lowdim.surgery import matrix_shape

__all__ = ["FLoRA", "FLoRAUpdate"]

KERNEL_RANK = 2  # of each kernel axis where `ranks` is one number


class FLoRAUpdate(ThinUpdate):
    """`scaling · G ×_in U[0] ×_out U[1] ×_i U[i]`, flattened to `(out, in · kernel)`; all of `G` and `U` trained.

    `G (r_0, r_1, r_2, ...)`: in, out, kernel axes. `U[0] (in, r_0)`, `U[1] (out, r_1)`, `U[i] (k_i, r_i)`.
    """

    def __init__(self, sizes: tuple[int, ...], ranks: tuple[int, ...], scaling: float, *, dtype: Any, device: Any):
        super().__init__(sizes[1], sizes[0] * math.prod(sizes[2:]), ranks[0] if len(sizes) == 2 else ranks[1], scaling)
        self.ranks = ranks
        self.G = nn.Parameter(torch.zeros(ranks, dtype=dtype, device=device))
        self.U = nn.ParameterList([torch.empty(size, r, dtype=dtype, device=device) for size, r in zip(sizes, ranks)])

    def down(self) -> Tensor:
        """`U[0]ᵀ (r_0, in)`; with kernel axes the core times all factors but the output's, `(r_1, in · kernel)`."""
        if self.G.ndim == 2:
            return self.U[0].mT
        return mode_products(self.G, list(self.U), transpose=False, skip=1).transpose(0, 1).flatten(1)

    def up(self) -> Tensor:
        """`U[1] Gᵀ (out, r_0)`, so that autograd keeps one thin product for each row and not two; with kernel axes `U[1]`."""
        return self.U[1] @ self.G.mT if self.G.ndim == 2 else self.U[1]

    def convolve(self, x: Tensor, conv: Convolution) -> Tensor:
        """`r_0` channels at each place, the small kernel `(r_1, r_0, ...)`, and `out` channels at each place."""
        kernel = self.G
        for factor in list(self.U)[2:]:  # contracting axis 2 and appending the result, once per axis, keeps their order
            kernel = torch.tensordot(kernel, factor, dims=([2], [1]))  # type: ignore[arg-type]
        point = (1,) * len(conv.kernel_size)
        mix = (F.conv1d, F.conv2d, F.conv3d)[len(point) - 1]
        narrow = mix(x, self.U[0].mT.reshape(*self.U[0].mT.shape, *point))
        hidden = conv._conv_forward(narrow, self.scaling * kernel.transpose(0, 1), None)
        return mix(hidden, self.U[1].reshape(*self.U[1].shape, *point))

    def dense(self) -> Tensor:
        """The whole product, `(out, in · kernel)`."""
        return self.scaling * tucker_reconstruct(self.G, list(self.U)).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`down` and `scaling · up`, multiplied in float32 or better."""
        narrow = self.G.dtype.itemsize < 4
        return super(FLoRAUpdate, copy.deepcopy(self).float() if narrow else self).low_rank_delta()

    def meta(self) -> dict[str, Any]:
        """The kernel's sizes, which cannot be seen from the matrix."""
        return {"kernel": [factor.shape[0] for factor in list(self.U)[2:]]}


@dataclass(frozen=True)
class FLoRA(Method):
    """The update of a weight with any number of axes is a small core times one factor for each axis (a Tucker product).

    Formula: `ΔW[o, i, h, w] = scale · Σ_abce G[a,b,c,e] U₀[i,a] U₁[o,b] U₂[h,c] U₃[w,e]`, without `h, w` for a linear layer
    (`ΔW = scale · U₁ Gᵀ U₀ᵀ`). `U_i ~ N(0, 0.5 / r_i)`, `G = 0`, so the output does not change; all are trained:
    `Π r_i + Σ d_i r_i` numbers. A convolution is applied as `r₀` channels, a small kernel, `out` channels.

    Args:
        ranks: `(r_in, r_out, r_kernel, ...)`, one for each axis of the weight; one number `r` means `(r, r)` and 2 for each
            kernel axis, or the kernel's size where that is smaller.
        scale: factor of the product. It scales the gradient of `G`, so a large one needs a smaller rate than LoRA's.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`): nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d.

    Raises:
        ValueError: a hyperparameter out of range (here); the number of ranks differs from that of axes, or a rank beyond its
            axis (at attach).
        TypeError: an embedding or another layer without such a weight (at attach).

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.FLoRA(ranks=(4, 4, 2, 2)))
        >>> sum(p.numel() for p in adapted.trainable().values())
        268

    `layer.delta()` is the matrix `(out, in · kernel)`, as everywhere in lowdim; `.view(weight.shape)` gives the kernel's
    axes. On linear layers it is LoRA with a square core between the factors: use it for convolutions.

    Source: Si et al., "FLoRA: Low-Rank Core Space for N-dimension", arXiv 2405.14739.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
    bounded_rank: ClassVar[bool] = True

    ranks: int | tuple[int, ...] = 8
    scale: float = 4.0
    dropout: float = 0.01
    target_modules: Any = None

    @classmethod
    def at_rank(cls, options: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """The same rank in every dimension."""
        return {**options, "ranks": rank}

    def __post_init__(self) -> None:
        if isinstance(self.ranks, (tuple, list)):
            object.__setattr__(self, "ranks", tuple(self.ranks))
            if len(self.ranks) < 2:
                raise ValueError(f"ranks must have one entry for each axis of the weight, at least two; got {self.ranks}")
            for axis, rank in enumerate(self.ranks):
                check_int(f"ranks[{axis}]", rank, 1)
        else:
            check_int("ranks", self.ranks, 1)
        check_float("scale", self.scale, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    def attach(self, layer: nn.Module, *, stats: Stats | None = None, **kwargs: Any) -> AdaptedLayer:
        """Wrap one layer; the kernel's sizes, which the weight matrix does not have, are passed to `blank`."""
        if self.accepts(layer):
            stats = {**(stats or {}), "kernel": list(_kernel(layer))}
        return super().attach(layer, stats=stats, **kwargs)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> FLoRAUpdate:
        """Allocate `G` and one factor for each axis."""
        sizes = _sizes(out_features, in_features, stats.get("kernel", ()))
        ranks = tuple(stats["rank"]) if "rank" in stats else self._ranks(sizes)
        for name, rank, size in zip(_axes(sizes), ranks, sizes):
            if not 1 <= rank <= size:
                raise ValueError(f"ranks: the rank of axis {name!r} must be an int in [1, {size}]; got {rank}; {CAP}")
        return FLoRAUpdate(sizes, ranks, self.scale, dtype=dtype, device=device)

    def capped_rank(self, layer: nn.Module, stats: Stats) -> Any:
        """The ranks, each at most its axis, where one of them is above it."""
        sizes = _sizes(*matrix_shape(layer), _kernel(layer))
        ranks = self._ranks(sizes)
        capped = [min(rank, size) for rank, size in zip(ranks, sizes)]
        return None if capped == list(ranks) else capped

    def initialise(self, update: FLoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw the factors (Kaiming normal with a = √3, fan-in the rank); `G` is zero."""
        for factor in update.U:
            draw_normal(factor, math.sqrt(0.5 / factor.shape[1]), generator)

    def _ranks(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(self.ranks, int):
            ranks = (self.ranks, self.ranks, *(min(KERNEL_RANK, size) for size in sizes[2:]))
        else:
            ranks = self.ranks
        if len(ranks) != len(sizes):
            raise ValueError(f"ranks must have {len(sizes)} entries ({', '.join(_axes(sizes))}) for this weight; got {ranks}")
        return ranks


def _sizes(out_features: int, in_features: int, kernel: Sequence[int]) -> tuple[int, ...]:
    """The sizes of the axes: in, out, kernel."""
    return (in_features // math.prod(kernel), out_features, *kernel)


def _kernel(layer: nn.Module) -> tuple[int, ...]:
    return tuple(cast(Tensor, layer.weight).shape[2:])


def _axes(sizes: Sequence[int]) -> list[str]:
    return ["in", "out", *(f"kernel axis {i}" for i in range(len(sizes) - 2))]
