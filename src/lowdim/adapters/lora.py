"""LoRA, the baseline of every comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.adapters.core.method import Method, Stats
from lowdim.errors import check_float, check_int
from lowdim.linalg import draw_uniform

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation: the update of a frozen weight is a product of two thin trained matrices.

    Formula: `y = W x + scaling · B (A x)`, `scaling = alpha / rank` (`alpha / √rank` with `rank_stabilized`),
    `A ~ U(±1/√in)` (Kaiming uniform with a = √5), `B = 0`.

    Args:
        rank: inner size; it may exceed the layer's sides.
        alpha: numerator of the scale.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`); None selects every linear layer but the head.
        rank_stabilized: divide alpha by √rank, which keeps the update's size at high ranks.

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> import torch, lowdim
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=2, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        32

    Where memory is the limit and the frozen A is acceptable, LaMDA keeps less for the backward pass.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"linear", "conv2d", "embedding"})
    ranks_by_layer: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: Any = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> LoRAUpdate:
        """Allocate `A` and `B`; `stats["rank"]` is a rank of the layer's own, at the same scale (a folder of PEFT's)."""
        scaling = self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
        rank = stats.get("rank", self.rank)
        update = LoRAUpdate(out_features, in_features, rank, scaling, dtype=dtype, device=device)
        update.has_own_rank = rank != self.rank
        return update

    def initialise(self, update: LoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A`; `B` is zero, so the output does not change."""
        draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)
