"""The low-rank layer that all families share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import balance_factors_, balanced_factors, compute_dtype, draw_normal, draw_uniform, seeded
from lowdim.modules.structured import RebuildableLinear
from lowdim.surgery import is_linear, plain_weight

__all__ = ["LowRankLinear"]

_INITS = ("kaiming", "orthogonal", "zero", "svd", "random")


class LowRankLinear(RebuildableLinear):
    """A linear layer whose weight is a product of two thin matrices.

    Formula: `y = c · B (A x) + bias`, `A (rank, in)`, `B (out, rank)`, `c = alpha / rank` (1 where alpha is None).

    Args:
        rank: inner size, in [1, min(in, out)].
        alpha: numerator of the scale; None means scale 1.
        init: how the factors start; the bias is uniform in ±1/√in with the first three and zero with the last two.
            `"kaiming"`: each factor uniform in ±1/√fan_in, the factor's own last dimension.
            `"orthogonal"`: A with orthonormal rows, B with orthonormal columns.
            `"zero"`: A as in `"kaiming"`, B zero.
            `"svd"`: a dense weight drawn normal with `std`, truncated to the rank, `√S` in each factor.
            `"random"`: each factor normal with `std`.
        std: for `"svd"` and `"random"`: a number, or `"xavier"` for 1/√fan_in of the drawn matrix.
        seed, generator: source of random numbers; the generator has priority, and without either torch's default one is used.

    Raises:
        ValueError: sizes or rank out of range, unknown init or std.

    Example:
        >>> import torch
        >>> from lowdim.modules import LowRankLinear
        >>> layer = LowRankLinear(6, 4, rank=2, seed=0)
        >>> layer(torch.zeros(3, 6)).shape, layer.dense_weight().shape
        (torch.Size([3, 4]), torch.Size([4, 6]))

    It pays off only where `rank < in · out / (in + out)`. Where the weight must keep full rank, use a structured layer
    such as Monarch instead.

    Source: Wei et al., "Building on Efficient Foundations", NeurIPS 2024, arXiv 2406.16450 (init `"svd"`, `"random"`);
    OptimAI-Lab's pretraining benchmark, arXiv 2505.22922 (`"kaiming"`, alpha, `refactorize`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        alpha: float | None = None,
        init: str = "kaiming",
        std: float | str = "xavier",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("rank", rank, 1, min(in_features, out_features))
        _check_alpha(alpha)
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters(init, seeded(seed, generator), std=std)

    @property
    def scale(self) -> float:
        """`alpha / rank`, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @torch.no_grad()
    def reset_parameters(
        self, init: str = "kaiming", generator: torch.Generator | None = None, *, std: float | str = "xavier"
    ) -> None:
        """Draw fresh factors and bias; see the class for `init` and `std`."""
        check_choice("init", init, _INITS)
        if std != "xavier":
            check_float("std", std, 0.0, low_open=True)
        bound = 1 / math.sqrt(self.in_features)
        if init == "svd":
            self._draw_svd(generator, bound if std == "xavier" else float(std))
        elif init == "random":
            for factor in (self.A, self.B):
                draw_normal(factor, factor.shape[1] ** -0.5 if std == "xavier" else float(std), generator)
        elif init == "orthogonal":
            self._draw_orthogonal(generator)
        else:
            draw_uniform(self.A, bound, generator)
            draw_uniform(self.B, 1 / math.sqrt(self.rank), generator)
            if init == "zero":
                self.B.zero_()
        if self.bias is not None:
            draw_uniform(self.bias, 0.0 if init in ("svd", "random") else bound, generator)

    def _draw_svd(self, generator: torch.Generator | None, std: float) -> None:
        if self.A.is_meta:
            return
        draw = torch.empty(self.out_features, self.in_features, dtype=compute_dtype(self.A.dtype), device=self.A.device)
        draw_normal(draw, std, generator)
        A, B = balanced_factors(draw, self.rank)
        self.A.copy_(A)
        self.B.copy_(B)

    def _draw_orthogonal(self, generator: torch.Generator | None) -> None:
        for factor in (self.A.mT, self.B):
            draw = torch.empty(factor.shape, device=factor.device)
            draw_normal(draw, 1.0, generator)
            factor.copy_(torch.linalg.qr(draw).Q)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; the dense weight is never built."""
        self.check_input(x)
        hidden = F.linear(x, self.A)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return F.linear(hidden, self.B, self.bias)

    def dense_weight(self) -> Tensor:
        """`c · B A`, `(out, in)`."""
        product = self.B @ self.A
        return product if self.scale == 1.0 else self.scale * product

    def products(self) -> list[tuple[int, int, int]]:
        """`A`, then `B`."""
        return [(self.A.numel(), self.in_features, self.rank), (self.B.numel(), self.rank, self.out_features)]

    def refactorize(self) -> None:
        """Make the factors balanced and orthogonal in place, `Bᵀ B = A Aᵀ = S` for `B A = U S Vᵀ`; the weight stays.

        Moments that an optimizer holds for them belong to the old factors: see `lowdim.optim.Restart`.
        """
        balance_factors_(self.A, self.B)

    @classmethod
    def from_factors(
        cls,
        A: Tensor,  # (rank, in)
        B: Tensor,  # (out, rank)
        bias: Tensor | None = None,  # (out,)
        *,
        alpha: float | None = None,
    ) -> LowRankLinear:
        """A layer with these factors, copied; the rank is theirs.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0] or A.shape[0] < 1:
            raise ValueError(f"A must be (rank, in) and B (out, rank); got {tuple(A.shape)} and {tuple(B.shape)}")
        if bias is not None and bias.shape != (B.shape[0],):
            raise ValueError(f"bias must have shape ({B.shape[0]},); got {tuple(bias.shape)}")
        _check_alpha(alpha)
        layer = cls.__new__(cls)  # no random draw: the numbers are given
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.rank, layer.alpha = A.shape[1], B.shape[0], A.shape[0], alpha
        layer.A, layer.B = _parameter(A), _parameter(B)
        layer.bias = None if bias is None else _parameter(bias)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int, alpha: float | None = None) -> LowRankLinear:
        """The best approximation of a trained layer at this rank: `A = √S Vᵀ`, `B = U √S` of `W / c`; the bias is copied.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: rank outside [1, min(in, out)], NaN or infinity in the weight.
        """
        weight = plain_weight(linear)
        check_int("rank", rank, 1, min(weight.shape))
        _check_alpha(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        A, B = balanced_factors(weight / scale if scale != 1.0 else weight, rank)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_factors(A.to(weight.dtype), B.to(weight.dtype), bias, alpha=alpha).train(linear.training)

    def description(self) -> dict[str, Any]:
        """Rank, whether there is a bias, and alpha where there is one."""
        return {"rank": self.rank, "bias": self.bias is not None} | ({} if self.alpha is None else {"alpha": self.alpha})

    @classmethod
    def recognise(cls, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Two matrices `A (rank, in)` and `B (out, rank)`; they do not show the scale, which is assumed to be 1."""
        A, B = tensors.get("A"), tensors.get("B")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or not is_linear(layer):
            return None
        return {"rank": A.shape[0], "bias": "bias" in tensors}

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        scale = "" if self.alpha is None else f", alpha={self.alpha:g}"
        return f"{super().extra_repr()}, rank={self.rank}{scale}"


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format))


def _check_alpha(alpha: float | None) -> None:
    if alpha is not None:
        check_float("alpha", alpha, 0.0, low_open=True)
