"""ALLoRA: LoRA without dropout and scale; the larger a row has become, the slower it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.convolution import is_grouped
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import add_product, draw_uniform, local, match, wide

__all__ = ["ALLoRA", "ALLoRAUpdate"]

_APPLY = ("gradient", "step")


@torch.no_grad()
def row_coefficients(
    A: Tensor,  # (rank, in)
    B: Tensor,  # (out, rank)
    eta: float,
) -> Tensor:
    """`1 / √(‖(B A)_i‖ + 1/η²)` for each row i, `(out,)`, in float32 or better, from the Gram matrix `A Aᵀ`."""
    with torch.autocast(A.device.type, enabled=False):
        A, B = wide(A), wide(B)
        squares = (B @ (A @ A.mT) * B).sum(1).clamp_min(0)  # rounding may take a zero below zero
        return (squares.sqrt() + eta**-2).rsqrt()


class _ScaledGradient(torch.autograd.Function):
    """`y + B h`, or `B h` alone; the gradient that flows into the product is first multiplied by the rows' coefficients.

    They are recomputed from `A` and `B` in the backward pass, so nothing is kept beyond what LoRA keeps.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor | None, hidden: Tensor, A: Tensor, B: Tensor, eta: float) -> Tensor:
        B = B.to(hidden.dtype)
        return F.linear(hidden, B) if y is None else add_product(y, hidden, B)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, hidden, A, B, ctx.eta = inputs
        ctx.save_for_backward(hidden, A, B)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, A, B = ctx.saved_tensors
        grad = grads[0].to(hidden.dtype)
        coefficients = row_coefficients(A, B, ctx.eta)[:, None]
        # (g ⊙ κ) B = g (diag(κ) B) and (g ⊙ κ)ᵀ h = diag(κ) (gᵀ h): no second tensor of the output's size.
        dhidden = grad @ (coefficients * B).to(hidden.dtype) if ctx.needs_input_grad[1] else None
        dB = None
        if ctx.needs_input_grad[3]:
            dB = grad.reshape(-1, grad.shape[-1]).mT @ hidden.reshape(-1, hidden.shape[-1])
            dB = (coefficients * dB).to(B.dtype)
        return grads[0] if ctx.needs_input_grad[0] else None, dhidden, None, dB, None


class ALLoRAUpdate(ThinUpdate):
    """`ΔW = B A`: `A (rank, in)`, `B (out, rank)`, both trained."""

    def __init__(self, out_features: int, in_features: int, rank: int, eta: float, apply_to: str, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank)
        self.eta, self.apply_to = eta, apply_to
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        # For "step": the coefficients and B from the first forward after a step, kept until the next step.
        self._seen: tuple[Tensor, Tensor] | None = None
        # B after the last step, or as loaded: unrounded, unlike `_seen` where forward runs in a narrower dtype (FSDP2).
        self._exact: Tensor | None = None

    def coefficients(self) -> Tensor:
        """The current factor κ of each row's learning rate, `(out,)`, in float32 or better."""
        return row_coefficients(self.A, self.B, self.eta)

    def down(self) -> Tensor:
        """`A`."""
        return self.A

    def up(self) -> Tensor:
        """`B`."""
        if self.apply_to == "step" and self._seen is None and torch.is_grad_enabled():
            self._seen = self.coefficients(), self.B.detach().clone()
        return self.B

    def expand(self, hidden: Tensor) -> Tensor:
        """`B h`."""
        if not self._scales_gradient():
            return super().expand(hidden)
        return self._scaled(None, hidden)

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused: one multiply-add onto the base's output."""
        if not self._scales_gradient():
            return super().add_to(y, x, inplace=inplace)
        return self._scaled(y, F.linear(x, self.A))

    @torch.no_grad()
    def step(self) -> None:
        """For "step": undo the share of the optimizer's change of `B` that the coefficients do not allow."""
        if self._seen is None:
            return
        coefficients, before = (local(match(tensor, self.B)) for tensor in self._seen)
        B = local(self.B)
        rounded = before.dtype != B.dtype
        if rounded and self._exact is not None:
            exact = self._exact if self._exact.shape == B.shape else local(match(self._exact, self.B))
            before = torch.where(exact.to(before.dtype) == before, exact, before.to(exact.dtype))
        before = wide(before)
        B.copy_(before + coefficients[:, None] * (wide(B) - before))
        self._seen, self._exact = None, B.clone() if rounded else None

    def _scales_gradient(self) -> bool:
        return self.apply_to == "gradient" and torch.is_grad_enabled()

    def _scaled(self, y: Tensor | None, hidden: Tensor) -> Tensor:
        return _ScaledGradient.apply(y, hidden, self.A, self.B, self.eta)  # type: ignore[return-value]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.apply_to == "step" and prefix + "B" in state_dict:
            self._seen, self._exact = None, local(self.B).detach().clone()


@dataclass(frozen=True)
class ALLoRA(Method):
    """LoRA without dropout and scale, with a learning rate for each row that falls as the row grows.

    Formula: `y = W x + B A x`, `A (r, in) ~ U(±1/√in)`, `B (out, r) = 0`; the rate of row i is
    multiplied by `κ_i = 1 / √(‖(B A)_i‖ + 1/η²)`: `η` at the start, less as the row grows.

    `apply_to="gradient"` (the paper) multiplies the gradient that reaches the update's output by κ. Adam divides each gradient
    by its running magnitude, which cancels a coefficient that changes slowly: with Adam it trains like a LoRA of scale 1,
    with SGD it has its full effect. `apply_to="step"` multiplies the optimizer's change of `B` instead, which acts under every
    optimizer. It needs `adapted.step()` after each optimizer step, and reads κ and B at the first forward pass after the
    previous step, so gradients may be accumulated.

    Args:
        rank: inner size; it may exceed the layer's sides.
        eta: the factor of the rate at the start, above 0.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        apply_to: `"gradient"` or `"step"`.

    Raises:
        TypeError: `alpha` or `dropout`, which it does not have (here); a grouped convolution with `"gradient"` (at attach).
        ValueError: a hyperparameter out of range.

    Example:
        >>> import torch, lowdim
        >>> method = lowdim.adapters.ALLoRA(rank=2, apply_to="step")
        >>> adapted = lowdim.adapt(torch.nn.Sequential(torch.nn.Linear(6, 4)), method)
        >>> adapted.layers["0"].update.coefficients()
        tensor([2., 2., 2., 2.])

    It replaces choosing LoRA's scale; where the scale and the rate of a LoRA are tuned anyway, it gains nothing.

    Source: Huang, Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", arXiv 2410.09692.
    """

    ranks_by_layer: ClassVar[bool] = True

    rank: int = 8
    eta: float = 2.0
    target_modules: Any = None
    apply_to: str = "gradient"

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("eta", self.eta, 0.0, low_open=True)
        check_choice("apply_to", self.apply_to, _APPLY)

    def accepts(self, layer: nn.Module) -> bool:
        """Not grouped convolutions, which are computed through the dense kernel, where the gradient cannot be scaled."""
        return super().accepts(layer) and not (is_grouped(layer) and self.apply_to == "gradient")

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> ALLoRAUpdate:
        """Allocate `A` and `B`."""
        rank = stats.get("rank", self.rank)
        return ALLoRAUpdate(out_features, in_features, rank, self.eta, self.apply_to, dtype=dtype, device=device)

    def initialise(self, update: ALLoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A`; `B` is zero, so the output does not change."""
        draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)
