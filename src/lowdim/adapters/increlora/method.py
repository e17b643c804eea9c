"""IncreLoRA: ranks grow during training, in the layers where they matter most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.method import Method, Stats, open_field
from lowdim.adapters.increlora.growth import Allocator, IncreLoRAAdapted
from lowdim.adapters.increlora.update import STD, IncreLoRAUpdate
from lowdim.errors import check_float, check_int
from lowdim.linalg import draw_normal
from lowdim.surgery import model_device

__all__ = ["IncreLoRA"]


@dataclass(frozen=True)
class IncreLoRA(Method):
    """LoRA that starts at a small rank everywhere and gets more ranks, step by step, in the layers that need them.

    Formula: `y = W x + s · B diag(E) A x`, `s = alpha / (ranknum + 1e-5)`; `A, B ~ N(0, 0.02²)`, `E = 0`. A layer's score in a
    step is `S = Σ |ΔW ∘ ∂L/∂ΔW| / √(out·in)`, smoothed to `I` (`beta1`) and its spread `U` (`beta2`); its importance `I · U`.
    Every `update_interval` steps after `init_warmup` the `top_h` most important layers grow by `rank_step`, until the ranks
    add up to `target_total`. Each layer holds a reserve of `rank_step` ranks, whose `A` and `B` are trained in advance at `E =
    1e-5`.

    Args:
        rank: of every layer at the start; it may exceed the layer's sides.
        target_rank: mean rank at the end.
        alpha: numerator of the scale; 0 or less means `rank`.
        dropout: on the update's input, while training.
        rank_step: ranks that a layer gets at a time; None means `max(1, target_rank // 2)`.
        top_h: layers that grow at a time (more in a tie); None: as many as needed to reach the target by the middle of
            `total_steps`.
        init_warmup, update_interval: when they grow, in calls of `adapted.step(optimizer)`; None: a tenth and a twentieth of
            `total_steps`.
        beta1, beta2: memory of the importance, in (0, 1).
        advance_learn: whether the reserve's `A` and `B` are trained before it is active.
        orth_weight: weight of `adapted.regularizer()`, which keeps the rows of `A` and the columns of `B` close to orthonormal.
        target_total: sum of all ranks at the end; None means `target_rank` times the number of layers.
        weight_decay: of the parameters that are added during training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        total_steps: optimizer steps of the training, for the values left None above; `lowdim.train` fills it in.

    Raises:
        ValueError: a hyperparameter out of range, or `step()` without an optimizer.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> method = lowdim.adapters.IncreLoRA(target_total=3, init_warmup=1, update_interval=2, top_h=1)
        >>> adapted = lowdim.adapt(model, method)
        >>> optimizer = torch.optim.AdamW(adapted.param_groups(lr=1e-2))
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     (model(torch.ones(1, 8)).square().mean() + adapted.regularizer()).backward()
        ...     optimizer.step()
        ...     adapted.step(optimizer)  # adds parameter groups
        >>> adapted.total_rank, len(optimizer.param_groups)
        (3, 3)

    Until the target is reached a step needs a third product of each layer's size, for the gradient of `ΔW`; then it costs as
    much as LoRA. A growth also rescales ΔW (from rank 1 to 2 it halves it), by design. The learning rate of
    later groups: `increlora_lr_lambda`, `adapted.follow`. If all layers can have the same rank, use LoRA.

    Source: Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
    arXiv 2308.12043.
    """

    adapted_type: ClassVar[type[IncreLoRAAdapted]] = IncreLoRAAdapted

    takes: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 1
    target_rank: int = 2
    alpha: float = 32
    dropout: float = 0.0
    rank_step: int | None = None
    top_h: int | None = 3
    init_warmup: int | None = 100
    update_interval: int | None = 100
    beta1: float = 0.85
    beta2: float = 0.85
    advance_learn: bool = True
    orth_weight: float = 0.1
    target_total: int | None = None
    weight_decay: float = 0.0
    target_modules: Any = None
    total_steps: int | None = open_field()

    @classmethod
    def at_rank(cls, options: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """The rank at the start, with the target scaled by the same factor."""
        start, target = options.get("rank", cls.rank), options.get("target_rank", cls.target_rank)
        return {**options, "rank": rank, "target_rank": max(rank, round(rank * target / start))}

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_int("target_rank", self.target_rank, self.rank)
        check_float("alpha", self.alpha)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        for name, least in (("rank_step", 1), ("target_total", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1)
        for name, least in (("top_h", 1), ("init_warmup", 0), ("update_interval", 1)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least)
            elif self.total_steps is None:
                raise ValueError(f"{name}=None is derived from total_steps, which must then be given; got None")
        for name in ("beta1", "beta2"):
            check_float(name, getattr(self, name), 0.0, 1.0, low_open=True, high_open=True)
        check_float("orth_weight", self.orth_weight, 0.0)
        check_float("weight_decay", self.weight_decay, 0.0)

    @property
    def growth(self) -> tuple[int, int, int]:
        """The call after which layers grow, the number of calls between growths, and the call that reaches the target."""
        total = self.total_steps or 0
        first = total // 10 if self.init_warmup is None else self.init_warmup
        every = max(1, total // 20) if self.update_interval is None else self.update_interval
        return first, every, total // 2

    @property
    def ranks_at_a_time(self) -> int:
        """Ranks that a layer gets when it grows."""
        return max(1, self.target_rank // 2) if self.rank_step is None else self.rank_step

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> IncreLoRAUpdate:
        """Allocate the lists, as long as `stats["grown"]` says."""
        update = IncreLoRAUpdate(
            out_features,
            in_features,
            self.rank,
            self.alpha,
            rank_step=self.ranks_at_a_time,
            advance=self.advance_learn,
            dtype=dtype,
            device=device,
        )
        update.resize(list(stats.get("grown", ())))
        return update

    def initialise(self, update: IncreLoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A` and `B`; `E` is zero, so the output does not change."""
        draw_normal(update.A[0], STD, generator)
        draw_normal(update.B[0], STD, generator)

    def shared(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> Allocator:
        """The call counter, and each layer's `I` and `U`."""
        return Allocator(len(layers), model_device(next(iter(layers.values()))))
