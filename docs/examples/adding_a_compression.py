"""Activation-aware SVD: inputs that are large count more when a weight is cut to a rank (Yuan et al., arXiv 2312.05821)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowdim.calibrate import collect
from lowdim.compress import CompressedLayer, CompressionReport, attach_report
from lowdim.errors import check_float, check_int
from lowdim.linalg import balanced_factors
from lowdim.modules import LowRankLinear
from lowdim.surgery import Patterns, as_linear, find_layers, is_linear, matrix_shape, swap_layers, without_tied
from lowdim.testing.compress_case import CompressCase


@dataclass(frozen=True)
class ASVDConfig:
    """The rank of each layer; the exponent of its inputs' sizes; which layers, None for all but the head."""

    rank: int
    alpha: float = 0.5
    target_modules: Patterns = None

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, 1.0)


def asvd(model: nn.Module, config: ASVDConfig, batches: Iterable[Any] | None) -> nn.Module:
    """`W ≈ (W S)_r S⁻¹`, `S = diag(‖x_j‖^alpha)` over all samples, `(·)_r` the best approximation of rank r; in place.

    Raises:
        ValueError: no batches, nothing matched, a rank above a layer's smaller side. The model is then as it was.

    Source: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing LLMs", arXiv 2312.05821.
    """
    found = find_layers(model, config.target_modules, accept=is_linear)
    layers, _ = without_tied(model, found, named=config.target_modules is not None, within=True)
    stats = collect(model, layers, {"norms"}, batches)  # refuses missing batches, and layers that saw nothing or NaN
    rows = []

    def factor(name: str, layer: Any) -> nn.Module:
        linear = as_linear(layer)  # for transformers' Conv1D, too
        scale = stats[name]["norms"].clamp_min(1e-12) ** config.alpha
        A, B = balanced_factors(linear.weight.detach().to(scale) * scale, config.rank)
        A, B = (A / scale).to(linear.weight.dtype), B.to(linear.weight.dtype)
        lost = (linear.weight.detach() - B @ A).norm() / linear.weight.detach().norm()
        sizes = (sum(p.numel() for p in layer.parameters()), A.numel() + B.numel() + (0 if layer.bias is None else len(B)))
        what = {"what": f"rank {config.rank}", "replaced": True}
        rows.append(CompressedLayer(name, *matrix_shape(layer), config.rank, float(lost), *sizes, **what))
        return LowRankLinear.from_factors(A, B, linear.bias).take_place_of(layer)

    swap_layers(model, layers, factor)  # makes all before it swaps any: an error leaves the model whole
    attach_report(model, CompressionReport("ASVD", tuple(rows)))
    return model


class TestASVD(CompressCase):
    options = {"rank": 4}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 12}  # noqa: RUF012

    def compress(self, model, batches, **options):
        return asvd(model, ASVDConfig(**options), batches)

    def expected(self, layer, inputs, compressed):
        S = torch.diag(inputs.square().sum(0) ** 0.25)
        u, s, vh = torch.linalg.svd(layer.weight @ S, full_matrices=False)
        return inputs @ (u[:, :4] @ torch.diag(s[:4]) @ vh[:4] @ S.inverse()).T + layer.bias
