"""RandLoRA: a full-rank update from frozen random bases, of which only diagonal scalings are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.common import check_rank
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.update import WeightUpdate
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import add_product, stream
from lowdim.surgery import is_conv1d, matrix_shape

__all__ = ["RandLoRA", "RandLoRAUpdate"]

_BASES = ("uniform", "sparse", "very_sparse")


class Bases:
    """One pair of random bases, `A (rank, d)` and `B (D, n, rank)`, that every layer of a model slices."""

    def __init__(self, kind: str, seed: int, rank: int, sizes: tuple[int, int, int], dtype: Any, device: Any):
        self.kind, self.seed, self.rank, self.sizes = kind, seed, rank, sizes
        self.A, self.B = self._draw(dtype, device)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a model that changes device or dtype; leaving the meta device means drawing."""
        A, B = fn(self.A), fn(self.B)
        if self.A.is_meta and not A.is_meta:
            A, B = self._draw(A.dtype, A.device)
        self.A, self.B = A, B

    def _draw(self, dtype: Any, device: Any) -> tuple[Tensor, Tensor]:
        n, d, D = self.sizes
        return self._basis("A", (self.rank, d), dtype, device), self._basis("B", (D, n, self.rank), dtype, device)

    def _basis(self, name: str, shape: tuple[int, ...], dtype: Any, device: Any) -> Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        # In float32 on the CPU, so that the numbers are the same for every dtype and machine.
        basis = torch.rand(shape, generator=stream(self.seed, "RandLoRA", name))
        if self.kind == "uniform":
            basis = 2 * basis - 1
        else:
            tail = 1 / 6 if self.kind == "sparse" else 1 / (2 * math.sqrt(self.sizes[1]))
            basis = (basis > 1 - tail).float() - (basis < tail).float()
        deviation = basis.double().std(correction=min(1, basis.numel() - 1)).float()
        basis = basis / torch.where(deviation > 0, deviation, 1.0)  # a few equal entries have deviation 0
        return basis.to(dtype=dtype, device=device)


class SharedBases:
    """The bases of one model, drawn once for each dtype and device that its layers have."""

    def __init__(self, kind: str, seed: int, rank: int, sizes: tuple[int, int, int]):
        self.kind, self.seed, self.rank, self.sizes = kind, seed, rank, sizes
        self._made: dict[tuple[Any, Any], Bases] = {}

    def get(self, dtype: Any, device: Any) -> Bases:
        """The pair for this dtype and device."""
        key = (dtype, torch.device(device))
        if key not in self._made:
            self._made[key] = Bases(self.kind, self.seed, self.rank, self.sizes, *key)
        return self._made[key]


class _ScaledInput(torch.autograd.Function):
    """`A♭ x` with `A♭[(k, j)] = lam[k, j] · A[k] ⊙ gamma[j]`; keeps the small factors and `x`, and makes `A♭` again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, lam, gamma)
        return F.linear(x, _scaled(A, lam, gamma))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, A, lam, gamma = ctx.saved_tensors
        grad = grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        dx = grad @ _scaled(A, lam, gamma) if ctx.needs_input_grad[0] else None
        dlam, dgamma = _scaling_grads(rows.mT @ x.reshape(-1, x.shape[-1]), A, lam, gamma)
        return dx, None, dlam, dgamma


class _ScaledOutput(torch.autograd.Function):
    """`A♭ᵀ h`, the same for the factor on the output's side."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(h, A, lam, gamma)
        return h @ _scaled(A, lam, gamma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, A, lam, gamma = ctx.saved_tensors
        grad = grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        dh = F.linear(grad, _scaled(A, lam, gamma)) if ctx.needs_input_grad[0] else None
        dlam, dgamma = _scaling_grads(h.reshape(-1, h.shape[-1]).mT @ rows, A, lam, gamma)
        return dh, None, dlam, dgamma


def _scaled(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """`A♭ (rank·n, d)`, rows ordered (k, j) with j fastest."""
    product = A[:, None, :] * gamma
    if torch.is_grad_enabled():  # in `dense`
        return (lam[:, :, None] * product).flatten(0, 1)
    return product.mul_(lam[:, :, None]).flatten(0, 1)


def _scaling_grads(
    grad: Tensor,  # (rank·n, d), of A♭; overwritten
    A: Tensor,  # (rank, d)
    lam: Tensor,  # (rank, n)
    gamma: Tensor,  # (n, d)
) -> tuple[Tensor, Tensor]:
    grad = grad.unflatten(0, lam.shape).mul_(A[:, None, :])
    return torch.einsum("kji,ji->kj", grad, gamma), torch.einsum("kji,kj->ji", grad, lam)


class RandLoRAUpdate(WeightUpdate):
    """`ΔW = c·B♭ A♭` (or its transpose where in > out), `A♭` scaled by the trained `lam (rank, n)` and `gamma (n, d)`.

    `A (rank, d)` and `B (D, n, rank)` are views of the model's bases; they are not part of any checkpoint.
    """

    def __init__(
        self, out_features: int, in_features: int, rank: int, scaling: float, bases: Bases, *, dtype: Any, device: Any
    ):
        super().__init__(out_features, in_features)
        small = min(out_features, in_features)
        terms = math.ceil(small / rank)
        self.rank, self.scaling, self.bases = rank, scaling, bases
        self.lam = nn.Parameter(torch.zeros(rank, terms, dtype=dtype, device=device))
        self.gamma = nn.Parameter(torch.empty(terms, small, dtype=dtype, device=device))
        self.register_buffer("A", None, persistent=False)
        self.register_buffer("B", None, persistent=False)
        self._slice()

    A: Tensor
    B: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Both factors one after the other; `A♭` and `B♭` are `(rank·n, d)` and `(D, rank·n)`."""
        hidden = self._first(x)
        return F.linear(hidden, self.B.flatten(1)) if self._scaled_first() else hidden

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused where the frozen basis comes last."""
        if self._scaled_first():
            return add_product(y, self._first(x), self.B.flatten(1), inplace=inplace)
        return super().add_to(y, x)

    def dense(self) -> Tensor:
        """`c·M` or `c·Mᵀ`."""
        product = self.B.flatten(1) @ _scaled(self.A, self.lam, self.gamma)
        return self.scaling * (product if self._scaled_first() else product.mT)

    def meta(self) -> dict[str, Any]:
        """The sizes (n, d, D) of the bases that this update slices."""
        return {"sizes": list(self.bases.sizes)}

    def _first(self, x: Tensor) -> Tensor:
        """`c·A♭ x` where in ≤ out, else all: `c·A♭ᵀ (B♭ᵀ x)`. The scale goes onto the smallest tensor, lam."""
        if self._scaled_first():
            return _call(_ScaledInput, x, self.A, self.lam * self.scaling, self.gamma)
        return _call(_ScaledOutput, F.linear(x, self.B.flatten(1).mT), self.A, self.lam * self.scaling, self.gamma)

    def _scaled_first(self) -> bool:
        return self.in_features <= self.out_features

    def _slice(self) -> None:
        terms, small = self.gamma.shape
        self.A = self.bases.A[: self.rank, :small]
        self.B = self.bases.B[: max(self.out_features, self.in_features), :terms, : self.rank]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The views must not become separate copies: move the bases, which is done once, and slice them again.
        self._buffers["A"] = self._buffers["B"] = None
        super()._apply(fn, recurse)
        self.bases.move(fn)
        self._slice()
        return self


def _call(function: Any, x: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return function.apply(x, A, lam, gamma)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return function.apply(*(tensor.to(dtype) for tensor in (x, A, lam, gamma)))


@dataclass(frozen=True)
class RandLoRA(Method):
    """A full-rank update: n frozen random products of rank `rank`, each scaled along two diagonals that are trained.

    Formula: `d = min(out, in)`, `D = max(out, in)`, `n = ⌈d / rank⌉`; `A (rank, d)`, `B (D, n, rank)` random and frozen;
    `A♭[(k, j)] = lam[k, j] · A[k] ⊙ gamma[j]`, `B♭ = B.flatten(1)`, `ΔW = c · B♭ A♭` (transposed where in > out),
    `c = alpha / rank / √n`. `lam = 0` and `gamma = 1 / max(n, d)` at the start, so the output does not change.

    Args:
        rank: of each term, in [1, min(out, in)]. A smaller one trains more numbers: `n·(rank + d)`.
        alpha: numerator of the scale.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        seed: of the bases, which all layers share and no checkpoint holds.
        base: `"uniform"`; `"sparse"`: −1, 0, 1 with probabilities 1/6, 2/3, 1/6; `"very_sparse"`: ±1 with `1/(2√d)` each.
        sqrt_scaling: divide the scale by √n (the authors' code); peft does not.

    Raises:
        ValueError: a hyperparameter out of range (here); rank beyond the layer, or a layer larger than the bases (at attach).

    Example:
        >>> import torch, lowdim
        >>> adapted = lowdim.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lowdim.adapters.RandLoRA(rank=4))
        >>> sum(p.numel() for p in adapted.trainable().values())
        24

    It costs two products with square factors for each token, about twice the frozen layer. If the required update has a
    decaying spectrum, LoRA reaches it with fewer numbers and in far less time.

    Source: Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", ICLR 2025,
    arXiv 2502.00987.
    """

    bounded_rank: ClassVar[bool] = True

    rank: int = 32
    alpha: float = 64
    dropout: float = 0.0
    target_modules: Any = None
    seed: int = 0
    base: str = "uniform"
    sqrt_scaling: bool = True

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_int("seed", self.seed, 0)
        check_choice("base", self.base, _BASES)

    def prepare(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> dict[str, dict[str, Any]]:
        """One pair of bases for the model, as large as its largest layers need."""
        shapes = [matrix_shape(layer) for layer in layers.values()]
        d, D = max(min(shape) for shape in shapes), max(max(shape) for shape in shapes)
        bases = self._bases((math.ceil(d / self.rank), d, D))
        return {name: {"bases": bases} for name in layers}

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> RandLoRAUpdate:
        """Allocate `lam` and `gamma`; use the shared bases, or make some of this layer's size."""
        rank = check_rank(stats.get("rank", self.rank), out_features, in_features)
        d, D = sorted((out_features, in_features))
        terms = math.ceil(d / rank)
        need, shared = (terms, d, D), stats.get("bases")
        sizes = tuple(stats.get("sizes", shared.sizes if shared is not None else need))
        if any(have < want for have, want in zip(sizes, need)):
            raise ValueError(f"the shared bases have sizes (n, d, D) = {sizes}; this layer needs at least {need}")
        if shared is None or shared.sizes != sizes:
            shared = self._bases(sizes)
        scaling = self.alpha / rank / (math.sqrt(terms) if self.sqrt_scaling else 1.0)
        bases = shared.get(dtype, device)
        return RandLoRAUpdate(out_features, in_features, rank, scaling, bases, dtype=dtype, device=device)

    def initialise(self, update: RandLoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """`gamma` is constant and `lam` zero."""
        update.gamma.fill_(1 / max(update.gamma.shape))

    def peft(self, adapted: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """PEFT's RandLoRA with saved projections; None if a convolution is adapted, which PEFT does not support."""
        layers: dict[str, AdaptedLayer] = adapted.layers
        if any(layer.kind != "linear" for layer in layers.values()):
            return None
        # PEFT sizes its bases by the largest out and the largest in, and has one scale for all layers: pad and fold.
        wide = min(max(layer.out_features for layer in layers.values()), max(layer.in_features for layer in layers.values()))
        bases: Bases = next(iter(layers.values())).update.bases  # type: ignore[assignment]
        n, d, _ = bases.sizes
        tensors = {
            "base_model.randlora_A": F.pad(bases.A, (0, wide - d))[:, None],
            "base_model.randlora_B": F.pad(bases.B, (0, 0, 0, math.ceil(wide / self.rank) - n)),
        }
        for name, layer in layers.items():
            update = layer.update
            assert isinstance(update, RandLoRAUpdate)
            fold = update.scaling * self.rank / self.alpha  # 1 / √n of this layer, or 1
            lam = F.pad(update.lam.detach() * fold, (0, 0, 0, self.rank - update.rank))  # of a layer with a capped rank
            tensors[f"base_model.model.{name}.randlora_lambda"] = lam
            tensors[f"base_model.model.{name}.randlora_gamma"] = update.gamma.detach()
        config = {
            "peft_type": "RANDLORA",
            "r": self.rank,
            "randlora_alpha": self.alpha,
            "projection_prng_key": self.seed,
            "save_projection": True,
            "sparse": self.base == "sparse",
            "very_sparse": self.base == "very_sparse",
            "randlora_dropout": self.dropout,
            "fan_in_fan_out": any(is_conv1d(layer.base) for layer in layers.values()),
            "init_weights": True,
        }
        return config, tensors

    def _bases(self, sizes: tuple[int, int, int]) -> SharedBases:
        return SharedBases(self.base, self.seed, self.rank, sizes)
