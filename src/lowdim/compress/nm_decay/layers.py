"""Layers of which N of every M weights stay while the others fade."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from lowdim.compress.core.schedule import Scheduled
from lowdim.compress.nm_decay.schedule import NMDecayConfig, Pattern
from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost, nm_mask
from lowdim.modules import MaskedLinear, Rebuildable
from lowdim.modules.geometry import ConvGeometry
from lowdim.surgery import describe

__all__ = ["NMConv2d", "NMLinear"]


class _InUse(torch.autograd.Function):
    """`W (mask + (1 - mask) a)`, with the gradient that the config asks for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, value: float, shrink: float, masked: bool) -> Tensor:
        return _scaled(weight, mask, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, mask, ctx.value, ctx.shrink, ctx.masked = inputs
        ctx.save_for_backward(weight if ctx.shrink else None, output if ctx.shrink else None, mask if ctx.masked else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, output, mask = ctx.saved_tensors
        grad = _scaled(grads[0], mask, ctx.value) if ctx.masked else grads[0]
        if ctx.shrink:  # the mask value is 0 then, so that W - W_eff is (1 - mask) W
            grad = torch.add(grad, weight - output, alpha=ctx.shrink)
        return grad, None, None, None, None


def _scaled(values: Tensor, mask: Tensor, value: float) -> Tensor:
    """Exact on both sides: the kept entries as they are, the others times `value`."""
    return values * mask if value == 0 else torch.where(mask.bool(), values, values * value)


class _Thinned(Scheduled):
    """Mask and weight in use of a layer whose weight is `grouped`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    config: NMDecayConfig
    system: ClassVar[str] = "N:M decay"

    def _follow(self, config: NMDecayConfig) -> None:
        found = config.frames()  # raises without total_steps
        weight, dim = self._grouped
        size, needed = weight.shape[dim], math.lcm(*(m for _, m in found.values()))
        if size % needed:
            worst = next(m for _, m in sorted(found.values(), key=lambda pattern: -pattern[1]) if size % m)
            side = "inputs" if dim else "outputs"
            raise ValueError(
                f"groups of m={worst} must divide the {side} of a weight {tuple(self.weight.shape)}; got {size}, which "
                f"is not a multiple of {worst}. Leave the layer out (exclude, target_modules) or choose another m or dim"
            )
        self.start_counting()

    @property
    def _grouped(self) -> tuple[Tensor, int]:
        """The weight with its outputs first, and the dimension along which it is grouped: 0 or another."""
        raise NotImplementedError

    @torch.no_grad()
    def mask(self) -> Tensor:
        """1 where a weight is kept by the current pattern and 0 elsewhere, in the weight's dtype; ones while dense."""
        pattern = self.config.pattern(self.finished)
        return torch.ones_like(self._grouped[0]) if pattern is None else self._mask(pattern)

    def _mask(self, pattern: Pattern) -> Tensor:
        weight, dim = self._grouped
        return nm_mask(weight, *pattern, dim)

    def _in_use(self) -> Tensor:
        """The weight that the forward pass uses now."""
        config, step = self.config, self.finished
        weight, pattern = self._grouped[0], config.pattern(step)
        if pattern is None:
            return weight
        shrink = config.srste_lambda if config.method == "srste" else 0.0
        return cast(
            Tensor, _InUse.apply(weight, self._mask(pattern), config.mask_value(step), shrink, config.gradient == "masked")
        )

    def _final(self) -> Tensor:
        """The weight with the last pattern, and exact zeros elsewhere."""
        return (self._grouped[0] * self._mask(self.config.patterns[-1])).to(self.weight.dtype).contiguous()

    def description(self) -> dict[str, Any]:
        """The schedule; the count of steps is among the tensors."""
        return self.config.description()

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A layer without numbers of its own that follows the described schedule."""
        return cast(Any, cls)(layer, NMDecayConfig(**description))

    def inference_cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use where only the kept weights and their places are read and multiplied, by a sparse kernel.

        Formula: for a matrix `(out, in)` and T rows, `flops_forward = 2 T out in n / m`, `bytes_forward = itemsize (T in
        + T out + out in n / m) + ⌈out in n / m · ⌈log2 m⌉ / 8⌉`.
        """
        check_int("tokens", tokens, 0)
        n, m = self.config.patterns[-1]
        out, inputs = self.weight.shape[0], self.weight[0].numel()
        if getattr(self, "transposed", False):
            out, inputs = inputs, out
        kept = out * inputs * n // m
        bias = 0 if self.bias is None else self.bias.numel()
        places = -(-kept * (m - 1).bit_length() // 8)
        traffic = itemsize * (tokens * inputs + tokens * out + kept) + places
        return Cost(kept + bias, 2 * tokens * kept, 0, traffic, 0)

    def extra_repr(self) -> str:
        """Sizes and pattern, for `print(model)`."""
        n, m = self.config.patterns[-1]
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}, {n}:{m}, {self.finished} steps"


class NMLinear(_Thinned, MaskedLinear):
    """A linear layer that trains towards n weights in every m.

    Formula: `y = W_eff x + bias`, `W_eff = W (mask + (1 - mask) a)`, with the N:M mask of the current W and the mask value a of
    `NMDecayConfig`. The gradient of W is that of W_eff ("straight_through"), the same times `mask + (1 - mask) a` ("masked"),
    and with `method="srste"` (a = 0) it has `srste_lambda (1 - mask) W` in addition. Groups run along axis `dim` of the weight
    as the layer stores it: 0 is the outputs of an nn.Linear and the inputs of a Conv1D.

    Args:
        layer: an nn.Linear or transformers' Conv1D; its parameters are shared, and trained dense.
        config: the schedule.

    Raises:
        TypeError: another layer, or one whose weight is computed or quantized.
        ValueError: the grouped dimension is not a multiple of m, `total_steps` is None.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import NMDecayConfig, NMLinear
        >>> linear = nn.Linear(4, 1, bias=False)
        >>> linear.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> layer = NMLinear.from_linear(linear, NMDecayConfig(2, 4, total_steps=10, decay="linear", decay_coef=0.5))
        >>> layer.step()
        >>> layer.mask().tolist(), layer.dense_weight().tolist(), layer.weight is linear.weight
        ([[0.0, 1.0, 1.0, 0.0]], [[0.5, -3.0, 2.0, 0.25]], True)

    Training saves nothing: products are dense, and the mask costs time. The mask is taken of the current weight at every
    forward; `step` only moves the schedule.

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", arXiv 2402.04744.
    """

    def __init__(self, layer: nn.Module, config: NMDecayConfig):
        super().__init__(layer)
        self.config = config
        self._follow(config)

    @classmethod
    def from_linear(cls, layer: nn.Module, config: NMDecayConfig) -> Self:
        """The constructor, under the name that every layer has."""
        return cls(layer, config)

    @property
    def _grouped(self) -> tuple[Tensor, int]:
        inputs = (self.config.dim == 0) == self.transposed  # the stored axis; Conv1D stores (in, out)
        return self.matrix, 1 if inputs else 0

    def dense_weight(self) -> Tensor:
        """`W_eff`, `(out, in)`, differentiable."""
        return self._in_use()

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """The plain layer at the end: the last pattern, and exact zeros, whatever the count; nn.Linear or Conv1D."""
        return self._plain(self._linear(self._final()))


class NMConv2d(_Thinned, ConvGeometry, Rebuildable):
    """A convolution that trains towards n weights in every m, grouped by channels; see `NMLinear`.

    The kernel `(out, in, kh, kw)` is grouped along its input channels (`dim=-1`), for each kernel position alone, or along its
    output channels (`dim=0`).

    Args:
        conv: its parameters are shared, and trained dense.
        config: the schedule.

    Raises:
        TypeError: not an nn.Conv2d, a grouped one, or one whose weight is computed.
        ValueError: the grouped channels are not a multiple of m, `total_steps` is None.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import NMConv2d, NMDecayConfig
        >>> layer = NMConv2d.from_conv(nn.Conv2d(8, 4, 3, padding=1), NMDecayConfig(1, 4, total_steps=10))
        >>> layer(torch.zeros(1, 8, 5, 5)).shape, float(layer.mask().sum(1).mean())
        (torch.Size([1, 4, 5, 5]), 2.0)

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", arXiv 2402.04744.
    """

    def __init__(self, conv: nn.Module, config: NMDecayConfig):
        super().__init__()
        if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
            raise TypeError(f"conv must be nn.Conv2d with groups=1; got {describe(conv)}")
        if "weight" not in conv._parameters:
            raise TypeError(
                f"the weight of {describe(conv)} is computed (weight_norm or a parametrization?); remove that first"
            )
        self.copy_geometry(conv)
        self.weight = cast(nn.Parameter, conv.weight)
        self.bias = cast("nn.Parameter | None", conv.bias)
        self.config = config
        self.train(conv.training)
        self._follow(config)

    @classmethod
    def from_conv(cls, conv: nn.Module, config: NMDecayConfig) -> Self:
        """The constructor, under the name that every convolution has."""
        return cls(conv, config)

    @property
    def _grouped(self) -> tuple[Tensor, int]:
        return self.weight, 1 if self.config.dim else 0

    def dense_weight(self) -> Tensor:
        """`W_eff`, `(out, in, kh, kw)`, differentiable."""
        return self._in_use()

    def forward(
        self,
        x: Tensor,  # (batch, in_channels, height, width)
    ) -> Tensor:
        """`(batch, out_channels, height', width')`."""
        return self.convolve(x, self.dense_weight(), self.bias)

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """A plain layer with the weight that is used now; it shares no tensor with this one."""
        return self._plain(self.dense_weight().clone())

    @torch.no_grad()
    def to_plain(self) -> nn.Conv2d:
        """The plain layer at the end: the last pattern, and exact zeros, whatever the count."""
        return self._plain(self._final())

    def _plain(self, kernel: Tensor) -> nn.Conv2d:
        conv = self.plain_conv(kernel, self.bias, requires_grad=self.weight.requires_grad)
        if conv.bias is not None and self.bias is not None:
            conv.bias.requires_grad_(self.bias.requires_grad)
        return conv

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The cost of one use in training at `tokens` output positions: a dense product of channels times kernel."""
        check_int("tokens", tokens, 0)
        out, inputs = self.weight.shape[0], self.weight[0].numel()
        parameters = sum(p.numel() for p in self.parameters())
        return chain_cost([(out * inputs, inputs, out)], tokens, parameters=parameters, itemsize=itemsize)
