"""The product of a structured layer's factors, taken before use, for calls of few tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_int
from lowdim.modules import StructuredLinear

__all__ = ["PreMerged"]


class PreMerged(nn.Module):
    """A structured layer for inference that keeps its dense weight too, and uses it for calls of few tokens.

    Formula: `y = W x + bias` with `W = layer.dense_weight()` for at most `max_tokens` rows, else `layer(x)`. With few rows a
    layer's time is that of starting its products, and one product starts faster than two.

    Args:
        layer: a structured layer; it keeps its mode.
        max_tokens: largest number of rows for which the dense weight is used, >= 0; the number from which the factors are
            faster depends on the machine.

    Attributes:
        weight: `(out, in)`; not saved. It follows loaded tensors, but not changes in place: call `refresh` after them.

    Raises:
        TypeError: not a structured layer.
        ValueError: `max_tokens` negative.
        RuntimeError: from `forward`, in training mode: the dense weight would not be trained.

    Example:
        >>> import torch
        >>> from lowdim.layers import BlockDense, PreMerged
        >>> layer = PreMerged(BlockDense(8, 6, rank=4, nblocks=2).eval(), max_tokens=4)
        >>> layer(torch.ones(1, 8)).shape, layer(torch.ones(100, 8)).shape
        (torch.Size([1, 6]), torch.Size([100, 6]))

    Not where memory is short: it holds more numbers than the dense layer.

    Source: Wei et al., "Building on Efficient Foundations", NeurIPS 2024, arXiv 2406.16450 (in the text only).
    """

    weight: Tensor

    def __init__(self, layer: StructuredLinear, *, max_tokens: int = 16):
        super().__init__()
        if not isinstance(layer, StructuredLinear):
            raise TypeError(f"layer must be a structured layer such as BlockDense; got {type(layer).__name__}")
        check_int("max_tokens", max_tokens, 0)
        self.layer, self.max_tokens = layer, max_tokens
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", layer.to_linear().weight.detach(), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)
        self.train(layer.training)

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's."""
        return self.layer.bias

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        if self.training:
            raise RuntimeError("PreMerged is for inference: call eval() first, or train the layer inside it (.layer)")
        self.layer.check_input(x)
        few = x.numel() <= self.max_tokens * self.in_features
        return F.linear(x, self.weight, self.bias) if few else self.layer(x)

    def refresh(self) -> None:
        """Take the product again, after the factors have changed."""
        self.weight = self.layer.to_linear().weight.detach()

    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function, from the factors as they are now."""
        return self.layer.to_linear()

    def to_plain(self) -> nn.Module:
        """`to_linear`, or a Conv1D where the layer replaced one."""
        return self.layer.to_plain()

    def extra_repr(self) -> str:
        """The limit, for `print(model)`."""
        return f"max_tokens={self.max_tokens}"


def _refresh(module: Any, keys: Any) -> None:
    module.refresh()
