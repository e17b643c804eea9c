"""NOLA: both factors of a LoRA are combinations of random bases; only the coefficients are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import combine_rows, derive_seed, random_rows, wide

__all__ = ["NOLA", "NOLAUpdate"]

_MATERIALIZE = ("recompute", "cache")
_BASES = ("A0", "bases_A", "bases_B")


class NOLAUpdate(ThinUpdate):
    """`ΔW = scaling · B A` with `A = A0 + Σ a_i bases_A[i] / √k`, `B = Σ b_i bases_B[i] / √k`; `a (k,)` and `b (k,)` trained.

    With `held` the random `A0 (rank, in)`, `bases_A (k, rank, in)` and `bases_B (k, out, rank)` are buffers that are not in
    the state dict; otherwise they are drawn from `seed` when they are needed, a few at a time.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        num_bases: int,
        scaling: float,
        *,
        seed: int,
        held: bool,
        dtype: Any,
        device: Any,
    ):
        super().__init__(out_features, in_features, rank, scaling)
        self.seed, self.held = seed, held
        self._seeds = {name: derive_seed(seed, "NOLA", name) for name in _BASES}
        self.a = nn.Parameter(torch.zeros(num_bases, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(num_bases, dtype=dtype, device=device))
        if held:
            shapes = ((rank, in_features), (num_bases, rank, in_features), (num_bases, out_features, rank))
            for name, shape in zip(_BASES, shapes):
                self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=False)
            self._draw()

    def A(self) -> Tensor:
        """The factor on the input's side, `(rank, in)`."""
        shape = self.rank, self.in_features
        start = self.get_buffer("A0") if self.held else self._start()
        return start + self._combination("bases_A", self.a, shape)

    def B(self) -> Tensor:
        """The factor on the output's side, `(out, rank)`."""
        return self._combination("bases_B", self.b, (self.out_features, self.rank))

    def down(self) -> Tensor:
        """`A()`."""
        return self.A()

    def up(self) -> Tensor:
        """`B()`."""
        return self.B()

    @torch.no_grad()
    def exact(self) -> Tensor:
        """The product in float32 or better of the two factors that `forward` applies."""
        return self.scaling * (wide(self.B()) @ wide(self.A()))

    def meta(self) -> dict[str, Any]:
        """The seed of this layer's bases."""
        return {"seed": self.seed}

    def _combination(self, name: str, coefficients: Tensor, shape: tuple[int, int]) -> Tensor:
        rows = self.get_buffer(name).flatten(1) if self.held else None
        scaled = coefficients / math.sqrt(len(coefficients))
        return combine_rows(scaled, math.prod(shape), seed=self._seeds[name], rows=rows).view(shape)

    def _start(self) -> Tensor:
        bound = torch.full((1,), 1 / math.sqrt(self.in_features), device=self.a.device)
        drawn = combine_rows(bound, self.rank * self.in_features, seed=self._seeds["A0"])
        return drawn.view(self.rank, self.in_features).to(self.a.dtype)

    @torch.no_grad()
    def _draw(self) -> None:
        """Fill the buffers."""
        self.get_buffer("A0").copy_(self._start())
        for name in _BASES[1:]:
            bases = self.get_buffer(name).flatten(1)
            for i in range(len(bases)):
                bases[i : i + 1] = random_rows(self._seeds[name], i, i + 1, bases.shape[1], device=bases.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        numberless = self.a.is_meta
        super()._apply(fn, recurse)
        if self.held and numberless and not self.a.is_meta:
            self._draw()
        return self


@dataclass(frozen=True)
class NOLA(Method):
    """The two factors of a LoRA as combinations of random matrices, whose coefficients alone are trained.

    Formula: `A = A0 + Σ_i a_i bases_A[i] / √k`, `B = Σ_i b_i bases_B[i] / √k`, `y = W x + c · B (A x)`, `c = alpha / rank`,
    `k = num_bases`; `bases_A (k, rank, in)` and `bases_B (k, out, rank)` are U(−1, 1), `A0 (rank, in)` is U(±1/√in), all
    frozen. `a` and `b` start at zero, so the output does not change. `2·k` trained numbers per layer, for every size and
    rank.

    Args:
        rank: inner size; it may exceed the layer's sides.
        num_bases: of each factor.
        alpha: numerator of the scale.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        seed: of all random matrices, which no checkpoint holds; each layer of a model gets its own from this and its name.
        materialize: `"recompute"` draws the random matrices in chunks, in the forward and again in the backward pass, and never
            holds more than one chunk; `"cache"` holds them, `k·rank·(in + out)` numbers per layer. Both give the same bits.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.NOLA(rank=4, num_bases=32))
        >>> sum(p.numel() for p in adapted.trainable().values())
        128

    For checkpoints of a few kilobytes. Each step draws or reads all random numbers again, `2·k·rank·(in + out)` per layer,
    which costs more than the layer itself on small batches: if LoRA's numbers are affordable, LoRA is faster. Merge before
        serving.

    Source: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", ICLR 2024, arXiv 2310.02556.
    """

    rank: int = 16
    num_bases: int = 512
    alpha: float = 4.0
    dropout: float = 0.0
    target_modules: Any = None
    seed: int = 0
    materialize: str = "recompute"

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_int("num_bases", self.num_bases, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_int("seed", self.seed, 0)
        check_choice("materialize", self.materialize, _MATERIALIZE)

    def prepare(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> dict[str, dict[str, Any]]:
        """A seed for each layer, from this method's own and the layer's name."""
        return {name: {"seed": derive_seed(self.seed, "NOLA", name)} for name in layers}

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> NOLAUpdate:
        """Allocate `a` and `b`, at zero; with `"cache"` draw the bases."""
        return NOLAUpdate(
            out_features,
            in_features,
            self.rank,
            self.num_bases,
            self.alpha / self.rank,
            seed=stats.get("seed", self.seed),
            held=self.materialize == "cache",
            dtype=dtype,
            device=device,
        )

    def initialise(self, update: NOLAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Nothing to draw: the coefficients are zero, and the bases are drawn from the seed."""
