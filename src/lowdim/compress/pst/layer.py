"""A linear layer whose frozen weight is moved and thinned out by few trained numbers."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lowdim.compress.core.schedule import Scheduled
from lowdim.compress.pst.config import PSTConfig
from lowdim.errors import check_int
from lowdim.linalg import Cost, draw_normal, smallest_mask, stream, wide, without_autocast
from lowdim.modules import MaskedLinear
from lowdim.surgery import freeze

__all__ = ["PSTLinear"]

#: What a layer trains.
TRAINED = ("weight_U", "weight_V", "mask_scores_A", "mask_scores_B", "mask_scores_R", "mask_scores_C")


class _InUse(torch.autograd.Function):
    """`mask ⊙ W'`, with the gradient of the scores passed through the mask; the backward pass computes W' again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor, mask: Tensor, *factors: float):
        return (_moved(W, U, V, factors[0]) * mask).to(W.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.beta, ctx.alpha1, ctx.alpha2 = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W, U, V, A, B, R, C, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needed)
        with without_autocast(W.device.type):
            grad, moved = wide(grads[0]), _moved(W, U, V, ctx.beta)
            if any(needed[:3]):
                to_weight = grad * (mask + moved.abs())  # the second: (G ⊙ W') ⊙ sign(W'), since the scores have |W'|
                found[0] = to_weight.to(W.dtype) if needed[0] else None
                found[1] = ctx.beta * (to_weight @ wide(V).mT).to(U.dtype) if needed[1] else None
                found[2] = ctx.beta * (wide(U).mT @ to_weight).to(V.dtype) if needed[2] else None
            if any(needed[3:7]):
                to_scores = grad * moved
                found[3] = ctx.alpha1 * (to_scores @ wide(B).mT).to(A.dtype) if needed[3] else None
                found[4] = ctx.alpha1 * (wide(A).mT @ to_scores).to(B.dtype) if needed[4] else None
                found[5] = ctx.alpha2 * to_scores.sum(1).to(R.dtype) if needed[5] else None
                found[6] = ctx.alpha2 * to_scores.sum(0).to(C.dtype) if needed[6] else None
        return tuple(found)


def _moved(W: Tensor, U: Tensor, V: Tensor, beta: float) -> Tensor:
    """`W' = W + beta U V`, in float32 or better."""
    with without_autocast(W.device.type):
        return torch.addmm(wide(W), wide(U), wide(V), alpha=beta)


class PSTLinear(Scheduled, MaskedLinear):
    """A linear layer with a frozen weight, of which a trained score leaves out more and more entries.

    Formula: `y = (mask ⊙ W') x + bias`, `W' = W + beta U V`, scores `s = |W'| + alpha1 A B + alpha2 (R_i + C_j)`; the mask is 0
    at the `int(out · in · sparsity)` smallest scores of the layer, of equal ones at the first. With G the gradient of
    `mask ⊙ W'`, that of `s` is `G ⊙ W'` (as if the mask were `s`) and that of `W'` is `G ⊙ mask + (G ⊙ W') ⊙ sign(W')`.

    U (out, weight_rank), V (weight_rank, in), A (out, mask_rank), B (mask_rank, in), R (out,) and C (in,) are trained; U and A
    start standard normal, the others at 0, so that the layer starts as the one that it replaces.

    Args:
        layer: an nn.Linear or transformers' Conv1D; its parameters are shared, and frozen.
        config: ranks, factors and schedule.
        seed: of U and A; None: the config's.

    Raises:
        TypeError: another layer, or one whose weight is computed or quantized.
        ValueError: `total_steps` is None.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import PSTConfig, PSTLinear
        >>> linear = nn.Linear(4, 1, bias=False)
        >>> linear.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> layer = PSTLinear.from_linear(linear, PSTConfig(total_steps=1, sparsity=0.5))
        >>> layer.step()
        >>> layer.sparsity, layer.mask().tolist(), layer.dense_weight().tolist(), layer.weight is linear.weight
        (0.5, [[0.0, 1.0, 1.0, 0.0]], [[0.0, -3.0, 2.0, 0.0]], True)

    The mask is a selection over the whole layer in every forward pass, and the gradient of `mask ⊙ W'` is formed in full: what
    is saved is the optimizer's state. The masked weight and a mask of one byte an entry are kept until the backward pass.

    Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022, arXiv 2205.11005.
    """

    system: ClassVar[str] = "PST"

    def __init__(self, layer: nn.Module, config: PSTConfig, *, seed: int | None = None):
        super().__init__(layer)
        self.config = config
        rows, columns, like = self.out_features, self.in_features, self.weight
        config.steps  # noqa: B018 (raises without them)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))

        self.weight_U, self.weight_V = parameter(rows, config.weight_rank), parameter(config.weight_rank, columns)
        self.mask_scores_A, self.mask_scores_B = parameter(rows, config.mask_rank), parameter(config.mask_rank, columns)
        self.mask_scores_R, self.mask_scores_C = parameter(rows), parameter(columns)
        seed = config.seed if seed is None else seed
        draw_normal(self.weight_U, 1.0, stream(seed, "pst", "weight"))
        draw_normal(self.mask_scores_A, 1.0, stream(seed, "pst", "mask"))
        self.start_counting()
        freeze(self)
        self.train_own()

    @classmethod
    def from_linear(cls, layer: nn.Module, config: PSTConfig, *, seed: int | None = None) -> Self:
        """The constructor, under the name that every layer has."""
        return cls(layer, config, seed=seed)

    def train_own(self) -> None:
        """Switch on the gradients of the six tensors that are trained."""
        for name in TRAINED:
            self.get_parameter(name).requires_grad_(True)

    @property
    def sparsity(self) -> float:
        """The share of zeros in use: 0 before the first step, then that of the schedule."""
        return self.config.sparsity_at(self.finished) if self.finished else 0.0

    def scores(self) -> Tensor:
        """`s`, `(out, in)`, in float32 or better; the smallest are left out."""
        with without_autocast(self.weight.device.type):
            A, B = wide(self.mask_scores_A), wide(self.mask_scores_B)
            ends = self.config.mask_alpha2 * (wide(self.mask_scores_R)[:, None] + wide(self.mask_scores_C))
            return torch.addmm(self.whole_weight().abs() + ends, A, B, alpha=self.config.mask_alpha1)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """0 where a weight is left out now and 1 elsewhere, `(out, in)`, in the weight's dtype."""
        return self._kept(self.sparsity).to(self.weight.dtype)

    def _kept(self, sparsity: float) -> Tensor:
        """True where a weight stays at this sparsity."""
        gone = int(self.out_features * self.in_features * sparsity)
        if not gone:
            return torch.ones(self.out_features, self.in_features, dtype=torch.bool, device=self.weight.device)
        with torch.no_grad():
            return ~smallest_mask(self.scores(), gone)

    def whole_weight(self) -> Tensor:
        """`W'`, `(out, in)`, before anything is left out, in float32 or better."""
        return _moved(self.matrix, self.weight_U, self.weight_V, self.config.weight_beta)

    def dense_weight(self) -> Tensor:
        """`mask ⊙ W'`, `(out, in)`, differentiable."""
        config = self.config
        return _InUse.apply(
            self.matrix, *(getattr(self, name) for name in TRAINED), self._kept(self.sparsity),
            config.weight_beta, config.mask_alpha1, config.mask_alpha2,
        )  # type: ignore[return-value]  # fmt: skip

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """The plain layer at the end: the final sparsity, and exact zeros, whatever the count; nn.Linear or Conv1D."""
        final = self.whole_weight() * self._kept(self.config.sparsity)
        return self._plain(self._linear(final.to(self.weight.dtype)))

    def description(self) -> dict[str, Any]:
        """Ranks, factors and schedule; the count of steps is among the tensors."""
        return self.config.description()

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A layer without numbers of its own that follows the described schedule."""
        return cls(layer, PSTConfig(**description))

    @classmethod
    def enter(cls, model: nn.Module) -> None:
        """A loaded model trains what `pst` left trainable."""
        if not any(isinstance(layer, cls) and layer.config.train_others for layer in model.modules()):
            freeze_others(model)

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use in training; `parameters` counts what is trained.

        Formula: with r the sum of both ranks and T rows, `parameters = (r + 1) (out + in)`,
        `flops_forward = 2 T out in + 2 out in r + 4 out in`,
        `bytes_forward = itemsize (T in + T out + 3 out in + r (out + in))`; backward is twice forward.
        """
        check_int("tokens", tokens, 0)
        rank, size = self.config.weight_rank + self.config.mask_rank, self.out_features * self.in_features
        ends = self.out_features + self.in_features
        flops = 2 * tokens * size + 2 * size * rank + 4 * size
        traffic = itemsize * (tokens * ends + 3 * size + rank * ends)
        return Cost(rank * ends + ends, flops, 2 * flops, traffic, 2 * traffic)

    def extra_repr(self) -> str:
        """Sizes and sparsity, for `print(model)`."""
        config = self.config
        ranks = f"weight_rank={config.weight_rank}, mask_rank={config.mask_rank}"
        return f"{super().extra_repr()}, {ranks}, sparsity={self.sparsity:.3g} of {config.sparsity:g}"


def freeze_others(model: nn.Module) -> None:
    """Freeze everything but what PST layers train."""
    freeze(model)
    for module in model.modules():
        if isinstance(module, PSTLinear):
            module.train_own()
