"""SoRA: LoRA with a gate on each rank, which a threshold after each optimizer step makes sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.gated import GatedLoRAUpdate
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.shared import StepCounter
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import draw_normal, draw_uniform, gather, local, wide
from lowdim.surgery import model_device

__all__ = ["SoRA", "SoRAAdapted", "SoRAUpdate"]

# Name -> the scale on which the thresholds are evenly spaced, and back.
_SCHEDULES = {"linear": (float, float), "log_linear": (math.exp, math.log), "exp_linear": (math.log, math.exp)}
_OPERATORS = ("official", "soft")


class SoRAUpdate(GatedLoRAUpdate):
    """`ΔW = scaling · B diag(gate) A`: `A (rank, in)`, `B (out, rank)` and `gate (rank,)`, all trained."""

    def __init__(
        self, out_features: int, in_features: int, rank: int, scaling: float, *, proximal: str, dtype: Any, device: Any
    ):
        super().__init__(out_features, in_features, rank, scaling, dtype=dtype, device=device)
        self.proximal, self.full_rank = proximal, rank
        self.gate = nn.Parameter(torch.empty(rank, dtype=dtype, device=device))

    def gates(self) -> Tensor:
        """`gate`."""
        return self.gate

    def meta(self) -> dict[str, Any]:
        """The rank, where it is not the method's: once closed ranks have been cut, or as the layer's own."""
        return {"rank": self.rank} if self.rank != self.full_rank else {}

    @torch.no_grad()
    def cut(self) -> None:
        """Remove ranks whose gate is closed, for good; one is kept where all are. Existing optimizers hold the old tensors."""
        kept = self.gate.nonzero().squeeze(1)
        kept = kept if len(kept) else kept.new_zeros(1)
        if len(kept) == self.rank:
            return
        self.rank = len(kept)
        for name, value in (("A", self.A[kept]), ("B", self.B[:, kept]), ("gate", self.gate[kept])):
            setattr(self, name, nn.Parameter(value.clone(), requires_grad=getattr(self, name).requires_grad))

    @torch.no_grad()
    def proximal_step(self, t: float) -> None:
        """The threshold operator with threshold `t` on `gate`, in place."""
        if t == 0:
            return
        gate = local(self.gate)
        size = gate.abs()
        moved = gate.sign() * (size - t)
        if self.proximal == "soft":
            gate.copy_(moved.masked_fill(size <= t, 0.0))
        else:  # the official one also closes gates that the subtraction left below t; exactly t is kept
            moved = moved.where(size > t, gate)
            gate.copy_(moved.masked_fill(moved.abs() < t, 0.0))

    @torch.no_grad()
    def compact(self) -> tuple[Tensor, Tensor]:
        """`A' (nnz, in)` and `B' (out, nnz)` of the open gates only: `delta() = scaling · B' A'`."""
        kept = self.gate.nonzero().squeeze(1)
        return self.A[kept], self.B[:, kept] * self.gate[kept]

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """The factors of `compact()` with the scale in the second; one zero row where every gate is closed."""
        kept = self.gate.nonzero().squeeze(1)
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=self.gate.device)
        return wide(self.A[kept]), self.scaling * (wide(self.B[:, kept]) * wide(self.gate[kept]))


class SoRAAdapted(Adapted):
    """Returned by `lowdim.adapt(model, SoRA(...))`: its `step()` applies the threshold to every gate."""

    method: SoRA

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Apply the threshold of this call to every gate, and count the call."""
        super().step(optimizer)
        if not isinstance(self.shared, StepCounter):  # merged
            return
        t = self.method.threshold_at(self.shared.done)
        for layer in self.layers.values():
            update: Any = layer.update
            update.proximal_step(t)
        self.shared.count()

    def regularizer(self) -> Tensor | float:
        """`sparse_lambda · Σ|gate| / N` over the `N` gates of all layers, zeros included."""
        gates = list(self._gates().values())
        if not gates or self.method.sparse_lambda == 0:
            return 0.0
        sums = torch.stack([gather(gate).abs().sum().to(gates[0].device) for gate in gates])
        return self.method.sparse_lambda / sum(gate.numel() for gate in gates) * sums.sum()

    def param_groups(self, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups: the gates in a separate group without weight decay."""
        gates = {id(gate) for gate in self._gates().values()}
        groups = super().param_groups(lr, weight_decay)
        return [{**group, "weight_decay": 0.0} if id(group["params"][0]) in gates else group for group in groups]

    def compact(self) -> bool:
        """Cut closed ranks from every layer: what is saved then holds open ones only, and closed ones cannot open again."""
        for layer in self.layers.values():
            update: Any = layer.update
            update.cut()
        return False

    def found_ranks(self) -> dict[str, int]:
        """`effective_rank()`."""
        return self.effective_rank()

    def effective_rank(self) -> dict[str, int]:
        """The number of nonzero gates of each layer."""
        return {name: int(gather(gate.detach()).count_nonzero()) for name, gate in self._gates().items()}

    def _gates(self) -> dict[str, nn.Parameter]:
        updates: Mapping[str, Any] = {name: layer.update for name, layer in self.layers.items()}
        return {name: update.gate for name, update in updates.items()}


@dataclass(frozen=True)
class SoRA(Method):
    """LoRA that starts at a large rank and closes the gates of the ranks it does not need.

    Formula: `y = W x + s · B (gate ∘ (A x))`, `s = alpha / rank`; `A ~ U(±1/√in)`, `B = 0`, `gate ~ N(0, 1)`. The loss gets
    `sparse_lambda · mean |gate|` over all gates of the model. After each optimizer step `adapted.step()` moves every gate by
    the threshold `t` towards 0 and closes it where less than `t` is left: `|gate| < 2t` ends at 0 (`proximal="soft"`:
    `sign(g) · max(|g| − t, 0)`). A closed gate still gets a gradient and may open again.

    Args:
        rank: the largest rank; it may exceed the layer's sides.
        alpha: numerator of the scale, which stays at `alpha / rank` when gates close.
        dropout: on the update's input, while training.
        sparse_lambda: weight of the gates' mean size in `adapted.regularizer()`.
        threshold: `t`, not multiplied by the learning rate; 0 closes no gate.
        proximal: `"official"`, the released operator, or `"soft"`, the paper's.
        schedule, max_threshold, num_thresholds, schedule_interval: None, or how the threshold grows from `threshold` to
            `max_threshold` in `num_thresholds` values, each used for `schedule_interval` calls of `adapted.step()`:
            `"linear"`, `"log_linear"` (evenly spaced in `exp t`) or `"exp_linear"` (in `log t`).
        target_modules: which layers (see `lowdim.surgery.find_layers`).

    Raises:
        ValueError: a hyperparameter out of range.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.SoRA(rank=4, threshold=10.0))
        >>> adapted.effective_rank()
        {'0': 4}
        >>> adapted.step()  # after an optimizer step; so large a threshold closes every gate
        >>> adapted.effective_rank()
        {'0': 0}

    Export and merge drop closed ranks, training does not: it costs as much as LoRA at the full `rank`. If the required rank
    is known, use LoRA; if ranks should move between layers, IncreLoRA.

    Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696.
    """

    adapted_type: ClassVar[type[SoRAAdapted]] = SoRAAdapted

    takes: ClassVar[frozenset[str]] = frozenset({"linear", "conv2d", "embedding"})
    ranks_by_layer: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    sparse_lambda: float = 1e-3
    threshold: float = 1e-3
    proximal: str = "official"
    schedule: str | None = None
    max_threshold: float = 10.0
    num_thresholds: int = 10
    schedule_interval: int = 1000
    target_modules: Any = None

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_float("sparse_lambda", self.sparse_lambda, 0.0)
        check_float("threshold", self.threshold, 0.0)
        check_choice("proximal", self.proximal, _OPERATORS)
        check_int("num_thresholds", self.num_thresholds, 1)
        check_int("schedule_interval", self.schedule_interval, 1)
        if self.schedule is not None:
            check_choice("schedule", self.schedule, _SCHEDULES)
        logarithm, exponential = self.schedule == "exp_linear", self.schedule == "log_linear"
        check_float("max_threshold", self.max_threshold, 0.0, 700.0 if exponential else math.inf, low_open=logarithm)
        if logarithm:
            check_float("threshold", self.threshold, 0.0, low_open=True)

    def thresholds(self) -> list[float]:
        """The thresholds in the order in which they are used; `[threshold]` without a schedule."""
        if self.schedule is None:
            return [float(self.threshold)]
        there, back = _SCHEDULES[self.schedule]
        start, stop = there(self.threshold), there(self.max_threshold)
        step = (stop - start) / max(1, self.num_thresholds - 1)
        return [back(start + step * i) for i in range(self.num_thresholds)]

    def threshold_at(self, call: int) -> float:
        """The threshold of call number `call` (from 0) of `adapted.step()`."""
        values = self.thresholds()
        return values[min(call // self.schedule_interval, len(values) - 1)]

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> SoRAUpdate:
        """Allocate `A`, `B` and `gate`."""
        rank, how = stats.get("rank", self.rank), {"proximal": self.proximal, "dtype": dtype, "device": device}
        update = SoRAUpdate(out_features, in_features, rank, self.alpha / self.rank, **how)
        update.full_rank = self.rank
        return update

    def initialise(self, update: SoRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A` and `gate`; `B` is zero, so the output does not change."""
        draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)
        draw_normal(update.gate, 1.0, generator)

    def shared(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> StepCounter:
        """The number of calls of `adapted.step()`, which decides the threshold."""
        return StepCounter(model_device(next(iter(layers.values()))))

    def param_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """The gates in a group of their own."""
        gates = [p for name, p in parameters.items() if name.endswith(".update.gate")]
        others = [p for name, p in parameters.items() if not name.endswith(".update.gate")]
        return [{"params": others, "lr": lr}, {"params": gates, "lr": lr}]
