"""Block-LoRA: one down-projection shared by all blocks of a LoRA that is cut along its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.errors import check_float, check_int
from lowdim.linalg import draw_uniform, wide

__all__ = ["BlockLoRA", "BlockLoRAUpdate"]


class BlockLoRAUpdate(ThinUpdate):
    """`ΔW = scaling · (Σ_i B[i]) A`: `A (rank / blocks, in)`, `B (blocks, out, rank / blocks)`, both trained."""

    def __init__(self, out_features: int, in_features: int, rank: int, blocks: int, scaling: float, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features, rank // blocks, scaling)
        self.A = nn.Parameter(torch.empty(self.rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(blocks, out_features, self.rank, dtype=dtype, device=device))

    def down(self) -> Tensor:
        """`A`."""
        return self.A

    def up(self) -> Tensor:
        """`Σ_i B[i]`."""
        return self.B.sum(0) if len(self.B) > 1 else self.B[0]

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`A` and `scaling · Σ_i B[i]`, summed in float32 or better."""
        return wide(self.A.detach()), self.scaling * wide(self.B.detach()).sum(0)


@dataclass(frozen=True)
class BlockLoRA(Method):
    """LoRA cut along its rank into blocks that share one down-projection.

    Formula: `y = W x + c · (Σ_i B_i) (A x)`, `c = alpha / rank`, `q = rank / blocks`, `A (q, in) ~ U(±1/√in)`, every
    `B_i (out, q)` starts at zero. Trained numbers: `q·in + rank·out`.

    It is a LoRA of rank q: all blocks get the same gradient, so under SGD and Adam their differences never change and their sum
    moves as one matrix with `blocks` times the step. A `LoRA(rank=q)` of the same scale whose B learns `blocks` times as fast
    trains identically with fewer numbers; the blocks are kept because the paper counts them, and weight decay acts on each.

    Args:
        rank: of all blocks together; the update's own rank is `rank / blocks`, which may exceed the layer's sides.
        blocks: the number of blocks; must divide `rank`.
        alpha: numerator of the scale, whose denominator is `rank`.
        dropout: on the update's input, while training; one mask for all blocks.
        target_modules: which layers (see `lowdim.surgery.find_layers`). The paper: query, key and value of every layer. torch's
            `nn.MultiheadAttention` packs these into one weight, which no pattern reaches: use transformers' CLIP.

    Raises:
        ValueError: a hyperparameter out of range, or `blocks` not a divisor of `rank`.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.BlockLoRA(rank=8, blocks=4))
        >>> sum(p.numel() for p in adapted.trainable().values()), adapted.layers["0"].update.rank
        (160, 2)

    Where an update of rank q is not enough, use LoRA with the whole rank: more blocks train faster but fit no better.

    Source: Zhou et al., "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
    arXiv 2501.16720.
    """

    rank: int = 8
    blocks: int = 8
    alpha: float = 1.0
    dropout: float = 0.25
    target_modules: Any = None

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_int("blocks", self.blocks, 1)
        if self.rank % self.blocks:
            raise ValueError(f"rank must be a multiple of blocks; got rank={self.rank}, blocks={self.blocks}")
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> BlockLoRAUpdate:
        """Allocate `A` and the blocks of `B`."""
        scaling = self.alpha / self.rank
        return BlockLoRAUpdate(out_features, in_features, self.rank, self.blocks, scaling, dtype=dtype, device=device)

    def initialise(self, update: BlockLoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A`; `B` is zero, so the output does not change."""
        draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)
