"""SLTrain: a weight that is the sum of a low-rank and a sparse matrix, trained from scratch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

from lowdim.errors import check_float, check_int
from lowdim.linalg import Cost, balance_factors_, draw_uniform, gather, stream, truncated_svd
from lowdim.modules import StructuredLinear
from lowdim.surgery import plain_weight

__all__ = ["SLTrainLinear"]

_SEEDS = 2**63 - 1
_GIVEN = -1  # instead of a seed: the support itself is saved


class SLTrainLinear(StructuredLinear):
    """A linear layer whose weight is a product of two thin matrices plus a sparse matrix on a fixed random support.

    Formula: `y = x Wᵀ + bias`, `W = c · B A + S`, `c = alpha / rank`, `A (rank, in)`, `B (out, rank)`; S `(out, in)` holds
    `values (nnz,)` at the flat row-major positions `indices (nnz,)`, `nnz = int(density · out · in)`, drawn uniformly without
    replacement and then kept. The weight keeps full rank with about `rank (in + out) + nnz` numbers. It is built for each use
    and freed: autograd keeps `x` and the parameters, the backward pass builds one `(out, in)` matrix at a time.

    Args:
        rank: inner size of the product, in [1, min(in, out)].
        density: share of the weight's entries that S holds, in (0, 1).
        alpha: numerator of the scale; it acts only on the product.
        seed: determines the support and the initial numbers; a checkpoint stores it instead of the support. Layers of one
            model should not share it (`swap_linear` gives each its own); None draws one from torch's default generator.
        indices: a given support, flat positions in ascending order; saved in checkpoints.
        generator: source of the seed; has priority over `seed`.
        index_dtype: torch.int64, or torch.int32 (half the memory of the support) where `out · in < 2³¹`.

    Raises:
        ValueError: sizes, rank, density, alpha or seed out of range; indices that are not strictly ascending or lie outside
            [0, out · in).

    Example:
        >>> import torch
        >>> from lowdim.layers import SLTrainLinear
        >>> layer = SLTrainLinear(20, 30, rank=2, density=0.3, alpha=2)
        >>> layer(torch.zeros(3, 20)).shape, layer.values.shape, int(torch.linalg.matrix_rank(layer.dense_weight()))
        (torch.Size([3, 30]), torch.Size([180]), 20)

    It saves memory of weights, gradients and optimizer state, not arithmetic: a pass multiplies by a dense matrix. For few
    tokens at a time, as in generation, turn it into a plain layer (`to_linear`). The product starts at zero, so only S
    changes in the first step; if a weight is known to be of low rank, use LowRankLinear.

    Source: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    NeurIPS 2024, arXiv 2406.02214.
    """

    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float = 32.0,
        seed: int | None = 0,
        indices: Tensor | None = None,  # (nnz,)
        generator: torch.Generator | None = None,
        index_dtype: torch.dtype = torch.int64,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        check_int("rank", rank, 1, min(in_features, out_features))
        check_float("density", density, 0.0, 1.0, low_open=True, high_open=True)
        check_float("alpha", alpha, 0.0, low_open=True)
        total = in_features * out_features
        if index_dtype not in (torch.int64, torch.int32) or (index_dtype == torch.int32 and total >= 2**31):
            raise ValueError(f"index_dtype must be torch.int64, or torch.int32 where out · in < 2**31; got {index_dtype}")
        self.in_features, self.out_features, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.scaling, self.density, self.index_dtype = alpha / rank, density, index_dtype
        self.seed = _seed(seed, generator)
        nnz = int(density * total) if indices is None else len(_checked(indices, total))
        if nnz != int(density * total):
            self.density = nnz / total
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(rank, in_features, **made))
        self.B = nn.Parameter(torch.empty(out_features, rank, **made))
        self.values = nn.Parameter(torch.empty(nnz, **made))
        self.bias = nn.Parameter(torch.empty(out_features, **made)) if bias else None
        if indices is not None:
            indices = indices.to(device=self.A.device, dtype=index_dtype, copy=True)
        self.register_buffer("indices", self._draw_support() if indices is None else indices, persistent=indices is not None)
        self._draw_numbers()

    # Initial numbers, and the support in checkpoints.

    def reset_parameters(self) -> None:
        """Draw from the seed: the support, `B = 0`, all else uniform in ±1/√in. A given support is kept."""
        if not self._given:
            self.indices = self._draw_support()
        self._draw_numbers()

    @property
    def _given(self) -> bool:
        """Whether the caller gave the support, instead of the seed."""
        return "indices" not in self._non_persistent_buffers_set

    def _draw_numbers(self) -> None:
        draw, bound = stream(self.seed, "sltrain", "numbers"), 1 / math.sqrt(self.in_features)
        for parameter in (self.A, self.values, self.bias):
            if parameter is not None:
                draw_uniform(parameter, bound, draw)
        nn.init.zeros_(self.B)

    def _draw_support(self) -> Tensor:
        total, nnz, device = self.in_features * self.out_features, self.values.numel(), self.A.device
        if device.type == "meta" or active_fake_mode() is not None:
            return torch.empty(nnz, dtype=self.index_dtype, device=device)
        drawn = _sample(total, nnz, stream(self.seed, "sltrain", "support"))
        return drawn.to(device=device, dtype=self.index_dtype)

    def get_extra_state(self) -> Tensor:
        """The seed of the support, 8 bytes; -1 where `indices` is saved."""
        return torch.tensor(_GIVEN if self._given else self.seed)

    def set_extra_state(self, state: Tensor) -> None:
        """Draw the support of this seed again."""
        if int(state) != _GIVEN:
            self.seed = int(state)
            self.register_buffer("indices", self._draw_support(), persistent=False)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Either form of the support loads into either kind of layer; without one a given support is kept."""
        seed, given = state_dict.get(f"{prefix}_extra_state"), state_dict.get(f"{prefix}indices")
        if given is not None:
            try:
                _checked(given, self.in_features * self.out_features)
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}{error}")
                return
            self.register_buffer("indices", self.indices, persistent=True)  # filled below
        elif seed is not None:
            self.register_buffer("indices", self.indices, persistent=False)  # drawn again by set_extra_state
        lacking: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lacking, unexpected, errors)
        known = self._given or seed is not None
        missing += [key for key in lacking if not (known and key in (f"{prefix}_extra_state", f"{prefix}indices"))]

    # The weight.

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        self.check_input(x)
        x, A, B, values, bias = _autocast(x, self.A, self.B, self.values, self.bias)
        return _Product.apply(x, A, B, values, self.indices, bias, self.scaling)  # type: ignore[return-value]

    def dense_weight(self) -> Tensor:
        """`c · B A + S`, `(out, in)`."""
        A, B, values = gather(self.A), gather(self.B), gather(self.values)
        flat = (self.scaling * (B @ A)).flatten()
        return flat.index_add(0, self.indices, values.to(flat.dtype)).view(self.out_features, self.in_features)

    def refactorize(self) -> None:
        """Make `A` and `B` balanced and orthogonal in place; the weight, and S, stay. See `lowdim.optim.Restart`."""
        balance_factors_(self.A, self.B)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float = 32.0,
        seed: int | None = 0,
        generator: torch.Generator | None = None,
        index_dtype: torch.dtype = torch.int64,
    ) -> SLTrainLinear:
        """A start for tuning a trained layer: the best product of this rank, balanced, and the remainder on the support.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: as the constructor, and NaN or infinity in the weight.
        """
        weight, total = plain_weight(linear), linear.weight.numel()
        shape = linear.in_features, linear.out_features, linear.bias is not None
        how: dict[str, Any] = {"rank": rank, "density": density, "alpha": alpha, "index_dtype": index_dtype}
        layer = cls(*shape, **how, seed=seed, generator=generator, device="meta", dtype=weight.dtype)
        u, s, vh = truncated_svd(weight, rank, method="exact")
        root = (s / layer.scaling).sqrt()
        layer.A, layer.B = (nn.Parameter(t.to(weight.dtype).contiguous()) for t in (root[:, None] * vh, u * root))
        layer.indices = layer._draw_support()
        rest = weight.to(s.dtype) - layer.scaling * (layer.B.to(s.dtype) @ layer.A.to(s.dtype))  # of the rounded factors
        layer.values = nn.Parameter(rest.reshape(total).index_select(0, layer.indices).to(weight.dtype))
        return layer.with_rest_of(linear)

    # Cost.

    def products(self) -> list[tuple[int, int, int]]:
        """The two thin factors, and the sparse matrix, which is multiplied as a dense one."""
        total = self.in_features * self.out_features
        thin = [(self.A.numel(), self.in_features, self.rank), (self.B.numel(), self.rank, self.out_features)]
        return [*thin, (total, self.in_features, self.out_features)]

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use on `tokens` rows, from shapes alone; see `_thin` for the two ways to compute it."""
        check_int("tokens", tokens, 0)
        total, thin, nnz = self.in_features * self.out_features, self.A.numel() + self.B.numel(), self.values.numel()
        rows, few = tokens * (self.in_features + self.out_features), _thin(tokens, self.in_features, self.out_features)
        small = 2 * tokens * thin if few else 2 * total * self.rank  # for B A, or for the thin products
        large = 2 * tokens * total
        back = 2 * small + 2 * large + (2 * tokens * self.A.numel() if few else small)
        support = self.indices.element_size() * nnz
        traffic = itemsize * (rows + thin + 3 * nnz + 2 * total + (2 * tokens * self.rank if few else 0)) + support
        again = 2 * rows + total + 4 * tokens * self.rank if few else rows + 3 * total
        again = itemsize * (again + 2 * thin + 2 * nnz) + support
        parameters = sum(p.numel() for p in self.parameters())
        return Cost(parameters, small + large, back, traffic, traffic + again)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}, density={self.density:g}, alpha={self.alpha:g}"


def _thin(tokens: int, in_features: int, out_features: int) -> bool:
    """Whether `B (A x)` takes fewer operations than `B A`: `tokens · rank (in + out)` against `rank · in · out`.

    The same inequality decides whether the gradients of A and B use thin products of the rows or the gradient of W.
    """
    return tokens * (in_features + out_features) < in_features * out_features


class _Product(torch.autograd.Function):
    """`x Wᵀ + bias` with `W = c B A + S`; keeps x and the parameters, never an `(out, in)` matrix.

    With `G = gᵀ x` the gradient of W: `dvalues = G[indices]`, `dB = c G Aᵀ`, `dA = c Bᵀ G`, `dx = g W`. For few rows
    (`_thin`) `c B A` is not built: `dB = c gᵀ (x Aᵀ)`, `dA = c (g B)ᵀ x`, `dx = g S + c (g B) A`.
    """

    @staticmethod
    def forward(x: Tensor, A: Tensor, B: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """`(..., out)`."""
        rows = x.reshape(-1, A.shape[1])
        few = _thin(len(rows), A.shape[1], B.shape[0])
        weight = _weight(A, B, values, indices, scale, sparse=few)
        y = rows @ weight.mT if bias is None else torch.addmm(bias, rows, weight.mT)
        if few:
            y = torch.addmm(y, rows @ A.mT, B.mT, alpha=scale)
        return y.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, A, B, values, indices, _, ctx.scale = inputs
        ctx.rows = x.shape[:-1].numel()
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, A, B, values, indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, indices = ctx.saved_tensors
        need_x, need_a, need_b, need_values, _, need_bias, _ = ctx.needs_input_grad
        c, few, g = ctx.scale, _thin(ctx.rows, A.shape[1], B.shape[0]), grad.reshape(-1, B.shape[0])
        by_rows = few or not need_values
        dx = dA = dB = dvalues = None
        rows: Any = None if x is None else x.reshape(-1, A.shape[1])
        back: Any = None  # g B
        with _no_autocast(grad.device.type):
            if (few and need_x) or (by_rows and need_a):
                back = g @ B
            if need_x:
                dx = g @ _weight(A, B, values, indices, c, sparse=few)
                if few:
                    dx = torch.addmm(dx, back, A, alpha=c)
                dx = dx.view(*grad.shape[:-1], A.shape[1])
            if need_values:
                full = g.mT @ rows
                dvalues = full.view(-1).index_select(0, indices)
                if not by_rows:
                    dA = _scaled(c, B.mT, full) if need_a else None
                    dB = _scaled(c, full, A.mT) if need_b else None
                del full
            if by_rows:
                dA = _scaled(c, back.mT, rows) if need_a else None
                dB = _scaled(c, g.mT, rows @ A.mT) if need_b else None
            dbias = g.sum(0) if need_bias else None
        return dx, dA, dB, dvalues, None, dbias, None


def _weight(A: Tensor, B: Tensor, values: Tensor, indices: Tensor, scale: float, *, sparse: bool) -> Tensor:
    """`c B A + S`, or S alone."""
    weight = A.new_zeros(B.shape[0], A.shape[1]) if sparse else _scaled(scale, B, A)
    weight.view(-1).index_add_(0, indices, values)
    return weight


def _scaled(scale: float, left: Tensor, right: Tensor) -> Tensor:
    """`scale · left right`, the scale inside of the product."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)


def _no_autocast(kind: str) -> Any:
    """A backward pass under autocast would round the products."""
    return torch.autocast(kind if torch.amp.is_autocast_available(kind) else "cpu", enabled=False)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """The casts that autocast applies to a plain product; inside an autograd.Function it does nothing."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None:
        check_int("seed", seed, 0, _SEEDS - 1)
    if generator is None and seed is not None:
        return seed
    drawn = torch.randint(_SEEDS, (), generator=generator, device="cpu" if generator is None else generator.device)
    return 0 if active_fake_mode() is not None else int(drawn)


def _sample(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the numbers below `total`, ascending: each set is as likely as any other.

    Draws with replacement until enough differ; surplus ones are then removed at random. A full permutation costs `8 · total`
    bytes and takes ten times as long if few are drawn.
    """
    if 4 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = (count - len(found)) * total // (total - count) + 16
        found = torch.cat([found, torch.randint(total, (more,), generator=generator)]).unique()
    kept = torch.ones(len(found), dtype=torch.bool)
    kept[torch.randperm(len(found), generator=generator)[: len(found) - count]] = False
    return found[kept]


def _checked(indices: Any, total: int) -> Tensor:
    """The support, checked."""
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        what = f"{indices.dtype}, shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be a tensor (nnz,) of int64 or int32; got {what}")
    if indices.is_meta or active_fake_mode() is not None or not len(indices):
        return indices
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= total or not bool((indices[1:] > indices[:-1]).all()):
        step = (indices[1:] <= indices[:-1]).nonzero().flatten()
        where = f"; entry {int(step[0]) + 1} is not above the one before it" if len(step) else ""
        raise ValueError(f"indices must be strictly increasing in [0, out · in) = [0, {total}); got {first} … {last}{where}")
    return indices
