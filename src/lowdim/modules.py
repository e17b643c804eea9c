"""The few modules that more than one family swaps in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_int
from lowdim.linalg import Cost, chain_cost, truncated_svd

__all__ = ["LowRankLinear"]

_INITS = ("kaiming", "orthogonal", "zero")


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product of two thin matrices.

    Formula: `y = c · B (A x) + bias`, `A (rank, in)`, `B (out, rank)`, `c = alpha / rank` (1 where alpha is None).

    Args:
        rank: inner size, in [1, min(in, out)].
        alpha: numerator of the scale; None means scale 1.
        init: `"kaiming"`: each factor uniform in ±1/√fan_in, so that the product of two has the variance of a Kaiming layer
            times the factors' own; `"orthogonal"`: A with orthonormal rows, B with orthonormal columns; `"zero"`: A Kaiming, B zero.
        seed, generator: where random numbers come from; a generator wins.

    Raises:
        ValueError: sizes or rank out of range, unknown init.

    Example:
        >>> import torch
        >>> from lowdim.modules import LowRankLinear
        >>> layer = LowRankLinear(6, 4, rank=2, seed=0)
        >>> layer(torch.zeros(3, 6)).shape, layer.dense_weight().shape
        (torch.Size([3, 4]), torch.Size([4, 6]))

    Use it to shrink a layer; where the weight must stay full rank take a structured layer such as Monarch.
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
        seed: int | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("rank", rank, 1, min(in_features, out_features))
        check_choice("init", init, _INITS)
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        if generator is None and seed is not None:
            generator = torch.Generator().manual_seed(seed)
        self.reset_parameters(init, generator)

    @property
    def scale(self) -> float:
        """`alpha / rank`, or 1."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @torch.no_grad()
    def reset_parameters(self, init: str = "kaiming", generator: torch.Generator | None = None) -> None:
        """Draw fresh factors (and a bias uniform in ±1/√in)."""
        if init == "orthogonal":
            for factor in (self.A.mT, self.B):
                draw = torch.empty(factor.shape, dtype=torch.float32).normal_(generator=generator)
                factor.copy_(torch.linalg.qr(draw).Q)
        else:
            _uniform(self.A, 1 / math.sqrt(self.in_features), generator)
            _uniform(self.B, 1 / math.sqrt(self.rank), generator)
            if init == "zero":
                self.B.zero_()
        if self.bias is not None:
            _uniform(self.bias, 1 / math.sqrt(self.in_features), generator)

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`; the dense weight is never built."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension; got shape {tuple(x.shape)}")
        hidden = F.linear(x, self.A)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return F.linear(hidden, self.B, self.bias)

    def dense_weight(self) -> Tensor:
        """The exact dense equivalent `(out, in)`."""
        return self.scale * (self.B @ self.A)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function, dtype and device; the product is taken in float32 or better."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        wide = torch.promote_types(self.A.dtype, torch.float32)
        product = self.scale * (self.B.to(wide) @ self.A.to(wide))
        linear.weight = nn.Parameter(product.to(self.A.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """What one use on `tokens` rows costs."""
        r, n_in, n_out = self.rank, self.in_features, self.out_features
        parameters = sum(p.numel() for p in self.parameters())
        return chain_cost([(r * n_in, n_in, r), (n_out * r, r, n_out)], tokens, parameters=parameters, itemsize=itemsize)

    @classmethod
    def from_factors(cls, A: Tensor, B: Tensor, bias: Tensor | None = None) -> LowRankLinear:
        """A layer with these factors (`A (rank, in)`, `B (out, rank)`), copied, scale 1."""
        if A.ndim != 2 or B.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(f"A must be (rank, in) and B (out, rank); got {tuple(A.shape)} and {tuple(B.shape)}")
        if bias is not None and bias.shape != (B.shape[0],):
            raise ValueError(f"bias must have shape ({B.shape[0]},); got {tuple(bias.shape)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.rank, layer.alpha = A.shape[1], B.shape[0], A.shape[0], None
        layer.A, layer.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, rank: int) -> LowRankLinear:
        """The best rank-`rank` approximation of a trained layer: `A = √S Vᵀ`, `B = U √S`, bias copied."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be nn.Linear; got {type(linear).__name__}")
        u, s, vh = truncated_svd(linear.weight, rank)
        root = s.sqrt()
        dtype = linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_factors((root[:, None] * vh).to(dtype), (u * root).to(dtype), bias)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
        )


def _uniform(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    if tensor.is_meta or generator is None or generator.device == tensor.device:
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))
