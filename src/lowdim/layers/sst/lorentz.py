"""Linear layers of hyperbolic networks in the Lorentz model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowdim.errors import check_float
from lowdim.linalg import compute_dtype

__all__ = ["LorentzLinear"]


class LorentzLinear(nn.Module):
    """A linear map onto the hyperboloid `−t² + ‖s‖² = −1`, around any module that maps features to features.

    Formula: `z = linear(x)`, `t = exp(log_scale) · sigmoid(z₀) + 1.1`, `s = z₁… · √((t² − 1) / max(‖z₁…‖², 1e-8))`; the output
    is `(t, s)`, time coordinate first. It is not linear, so such layers can follow each other directly.

    Args:
        linear: for example nn.Linear or `lowdim.layers.SSTLinear`, with at least 2 outputs.
        scale: largest time coordinate (less 1.1) at first; trained as its logarithm, `log_scale (1,)`.
        fix_scale: do not train the scale.

    Raises:
        ValueError: scale not a finite number above 0.

    Example:
        >>> import torch
        >>> from lowdim.layers import LorentzLinear, SSTLinear
        >>> layer = LorentzLinear(SSTLinear(9, 6, rank=2))
        >>> t, s = layer(torch.randn(4, 9)).split([1, 5], dim=-1)
        >>> bool(torch.allclose(-t.square() + s.square().sum(-1, keepdim=True), torch.tensor(-1.0), atol=1e-3))
        True

    Not for Euclidean networks, whose features are not points of a hyperboloid. Compute distances between its outputs in
    float32 or better, since `t²` and `‖s‖²` nearly cancel.

    Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
    arXiv 2405.15481; the layer is that of Chen et al., "Fully Hyperbolic Neural Networks", ACL 2022, arXiv 2105.14686.
    """

    def __init__(self, linear: nn.Module, *, scale: float = 10.0, fix_scale: bool = False):
        super().__init__()
        check_float("scale", scale, 0.0, low_open=True)
        self.linear = linear
        first = next(linear.parameters(), torch.empty(()))
        values = torch.full((1,), math.log(scale), dtype=first.dtype, device=first.device)  # FSDP2 rejects scalars
        self.log_scale = nn.Parameter(values, requires_grad=not fix_scale)

    def forward(
        self,
        x: Tensor,  # (..., in_features), time coordinate first
    ) -> Tensor:
        """`(..., out_features)`, points of the hyperboloid, computed in float32 or better and rounded once."""
        z = self.linear(x)
        if z.ndim == 0 or z.shape[-1] < 2:
            raise ValueError(f"linear must have at least 2 outputs, time and space; its output has shape {tuple(z.shape)}")
        wide = z.to(compute_dtype(z.dtype))
        time, space = wide[..., :1], wide[..., 1:]
        time = time.sigmoid() * self.log_scale.to(wide.dtype).exp() + 1.1
        length = space.square().sum(-1, keepdim=True).clamp_min(1e-8)
        return torch.cat([time, space * ((time.square() - 1) / length).sqrt()], -1).to(z.dtype)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"fix_scale={not self.log_scale.requires_grad}"
