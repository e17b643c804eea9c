"""A short causal convolution of each channel, with the inputs that the next tokens need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Module):
    """`y_t = Σ_j weight[:, j] · x_{t − taps + 1 + j}`: the last tap is the current token, there is no bias.

    Source: Siems et al., "DeltaProduct", arXiv 2502.10297.
    """

    def __init__(self, channels: int, taps: int, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,  # (batch, length, channels)
        past: Tensor | None = None,  # (batch, taps - 1, channels)
    ) -> tuple[Tensor, Tensor]:
        """The output, and the last `taps - 1` inputs; None for `past` is zeros."""
        channels, taps = self.weight.shape
        seen = F.pad(x, (0, 0, taps - 1, 0)) if past is None else torch.cat([past.to(x.dtype), x], 1)
        y = F.conv1d(seen.mT, self.weight[:, None].to(x.dtype), groups=channels).mT
        return y, seen[:, seen.shape[1] - taps + 1 :].to(self.weight.dtype, copy=True)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return "channels={}, taps={}".format(*self.weight.shape)
