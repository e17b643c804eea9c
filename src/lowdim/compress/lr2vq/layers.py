"""Layers whose weight is a table of subvectors, and codes that pick them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.compress.lr2vq.clustering import cluster, lowrank_subvectors
from lowdim.compress.lr2vq.coded import Coded
from lowdim.errors import check_int
from lowdim.linalg import Cost, chain_cost, stream
from lowdim.modules import StructuredLinear
from lowdim.modules.geometry import ConvGeometry
from lowdim.surgery import is_linear, matrix_shape, plain_weight

__all__ = ["LR2VQConv2d", "LR2VQLinear"]


class LR2VQLinear(Coded, StructuredLinear):
    """A linear layer whose weight is a list of codes: each names m consecutive entries of a row.

    Formula: `W[o, i·m : (i+1)·m] = P C[a[o, i]]`: basis `P (m, d̃)`, codebook `C (k, d̃)`, codes `a (out, in / m)`.
    `y = W x + bias`.

    Args:
        basis: `(m, d̃)`.
        codebook: `(k, d̃)`.
        codes: `(out, in / m)` integers below k; kept as uint8 where k <= 256, as int16 or int32 above.
        shape: `(out, in)`.
        bias: `(out,)` or None.

    Attributes:
        cached: keep the decoded weight between calls in evaluation mode without gradients (True). It then takes the memory
            of the dense layer; `LR2VQLinear.cached = False` decodes at every call.

    Raises:
        ValueError: shapes that do not fit, codes outside [0, k).
        TypeError: codes that are not integers.

    Example:
        >>> import torch
        >>> from lowdim.compress import LR2VQLinear
        >>> basis, codebook = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [10.0]])
        >>> layer = LR2VQLinear(basis, codebook, torch.tensor([[0, 1]]), (1, 4))
        >>> layer.dense_weight().tolist(), layer.compressed_bytes()
        ([[1.0, 2.0, 10.0, 20.0]], 17)

    No arithmetic is saved: the weight is decoded and multiplied as ever. Not where speed is wanted, nor at the memory of the
    codes alone unless `cached` is off.

    Source: Zhu et al., "Learning Low-Rank Representations for Model Compression", arXiv 2211.11397.
    """

    def __init__(
        self,
        basis: Tensor,  # (m, d)
        codebook: Tensor,  # (k, d)
        codes: Tensor,  # (out, in / m)
        shape: tuple[int, int],
        bias: Tensor | None = None,  # (out,)
    ):
        super().__init__()
        self._set(basis, codebook, codes, shape, bias)
        self.out_features, self.in_features = self.shape

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        self.check_input(x)
        return F.linear(x, self.decoded(), self.bias)

    def dense_weight(self) -> Tensor:
        """`P C[a]`, `(out, in)`."""
        return self.matrix()

    def products(self) -> list[tuple[int, int, int]]:
        """The dense product."""
        return [(self.in_features * self.out_features, self.in_features, self.out_features)]

    def cost(self, tokens: int, *, itemsize: int = 4) -> Cost:
        """The operations of a dense layer; of the weight, only codes and tables are read."""
        check_int("tokens", tokens, 0)
        numbers = sum(p.numel() for p in self.parameters())
        dense = chain_cost(self.products(), tokens, parameters=numbers, itemsize=itemsize)
        saved = itemsize * self.in_features * self.out_features - self.compressed_bytes(itemsize)
        return dense._replace(bytes_forward=dense.bytes_forward - saved, bytes_backward=dense.bytes_backward - 2 * saved)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, codebook_size: int, subvector_size: int, clustering_dim: int, seed: int = 0
    ) -> LR2VQLinear:
        """A trained layer in one shot: the leading eigenvectors as basis, k-means for codebook and codes; the bias is copied.

        Args:
            codebook_size: k, at most the number of subvectors; a larger one is taken as that.
            subvector_size: m, which must divide `in`.
            clustering_dim: d̃, in [1, m].
            seed: of k-means.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: a size out of range, NaN or infinity in the weight.
        """
        weight = plain_weight(linear)
        check_int("codebook_size", codebook_size, 1)
        z, basis = lowrank_subvectors(weight, subvector_size, clustering_dim)
        codebook, codes = cluster(z, codebook_size, stream(seed, "lr2vq", "layer"))
        tables = basis.to(weight.dtype), codebook.to(weight.dtype)
        shape = linear.out_features, linear.in_features
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(*tables, codes.view(shape[0], -1), shape, bias).train(linear.training)

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A layer on the meta device, without numbers, in the sizes and dtype of `layer`."""
        return cls(**cls._blank(layer, **description)).take_place_of(layer)._expect_packed()

    @classmethod
    def recognise(cls, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """`basis`, `codebook` and `codes`."""
        return cls._recognised(tensors) if is_linear(layer) else None


class LR2VQConv2d(Coded, ConvGeometry):
    """A convolution whose kernel, flattened to `(out, in / groups · kh · kw)`, is a list of codes; see `LR2VQLinear`.

    Args:
        conv: the convolution that it replaces, for its geometry.
        basis, codebook, codes, bias: as in `LR2VQLinear`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import LR2VQConfig, lr2vq
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        >>> model = lr2vq(model, LR2VQConfig(subvector_size=4, clustering_dim=2, codebook_size=8))
        >>> model[0].dense_weight().shape, model(torch.zeros(1, 4, 5, 5)).shape
        (torch.Size([8, 4, 3, 3]), torch.Size([1, 8, 5, 5]))

    Not to save arithmetic: the kernel is decoded.

    Source: Zhu et al., "Learning Low-Rank Representations for Model Compression", arXiv 2211.11397.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        basis: Tensor,  # (m, d)
        codebook: Tensor,  # (k, d)
        codes: Tensor,  # (out, in / m)
        bias: Tensor | None = None,  # (out,)
    ):
        super().__init__()
        self.copy_geometry(conv)
        self._set(basis, codebook, codes, matrix_shape(conv), bias)
        self.train(conv.training)

    def forward(
        self,
        x: Tensor,  # (batch, in_channels, height, width)
    ) -> Tensor:
        """`(batch, out_channels, height', width')`."""
        return self.convolve(x, self._kernel(self.decoded()), self.bias)

    def dense_weight(self) -> Tensor:
        """The kernel `(out, in / groups, kh, kw)`."""
        return self._kernel(self.matrix())

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """A plain nn.Conv2d with the same function, dtype and device."""
        trained = any(p.requires_grad for p in self.parameters())
        dtype = self.basis.dtype
        with torch.autocast(self.basis.device.type, enabled=False):
            weight = self.matrix(torch.promote_types(dtype, torch.float32)).to(dtype)
        return self.plain_conv(self._kernel(weight), self.bias, requires_grad=trained)

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A layer on the meta device, without numbers, in the geometry and dtype of `layer`."""
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"it must replace an nn.Conv2d; got {type(layer).__name__}")
        tensors = cls._blank(layer, **description)
        del tensors["shape"]
        return cls(layer, **tensors)._expect_packed()

    @classmethod
    def recognise(cls, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """`basis`, `codebook` and `codes`."""
        return cls._recognised(tensors) if isinstance(layer, nn.Conv2d) else None

    def _kernel(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.shape[0], -1, *self.kernel_size)
