"""The allocator of IncreLoRA: decides which layers grow, and updates the optimizer and the scheduler."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.guards import whole_parameters
from lowdim.adapters.core.shared import StepCounter
from lowdim.adapters.increlora.schedule import increlora_lr_lambda
from lowdim.adapters.increlora.update import IncreLoRAUpdate
from lowdim.linalg import mean_over_processes, stream

__all__ = ["Allocator", "IncreLoRAAdapted"]

#: The key of an optimizer group for the call of `step` that added it.
ADDED = "added_at"


class Allocator(StepCounter):
    """The state of the growth for the whole model: the call counter, and the smoothed scores `I` and `U`."""

    I: Tensor
    U: Tensor

    def __init__(self, layers: int, device: Any):
        super().__init__(device)
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.register_buffer("I", torch.zeros(layers, dtype=dtype, device=device))
        self.register_buffer("U", torch.zeros(layers, dtype=dtype, device=device))

    def observe(self, scores: Tensor, beta1: float, beta2: float) -> None:
        """Smooth the scores of one step, `(layers,)`."""
        self.I.mul_(beta1).add_(scores, alpha=1 - beta1)
        self.U.mul_(beta2).add_((scores - self.I).abs(), alpha=1 - beta2)


class IncreLoRAAdapted(Adapted):
    """Returned by `lowdim.adapt(model, IncreLoRA(...))`: `step(optimizer)` is the allocator."""

    method: Any  # an IncreLoRA, whose module imports this one

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._score(self.total_rank < self._target())

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """The allocator, after the optimizer's step: smooths the scores, grows layers, adds parameter groups.

        Raises:
            ValueError: no optimizer.
        """
        if optimizer is None:
            raise ValueError("IncreLoRA adds parameters to the optimizer: call adapted.step(optimizer); got None")
        super().step(optimizer)
        shared, method = self.shared, self.method
        if not isinstance(shared, Allocator):  # merged
            return
        call = shared.done
        if call == 0:
            self._grow(list(self.layers), optimizer, call)
        if self.total_rank < self._target():
            shared.observe(self._scores(shared.I), method.beta1, method.beta2)
            first, every, end = method.growth
            if call > first and call % every == 0:
                self._grow(self._chosen(max(0, end - call) // every), optimizer, call)
        shared.count()

    def regularizer(self) -> Tensor | float:
        """`orth_weight · Σ (‖A Aᵀ − 1‖_F + ‖Bᵀ B − 1‖_F) / (2 · layers)`, reserves included."""
        if not self.layers or self.method.orth_weight == 0:
            return 0.0
        with whole_parameters(self.model) if self._spread() else nullcontext():
            rows = [part for update in self._updates().values() for part in update.frames()]
        return self.method.orth_weight / len(rows) * _distance_from_orthonormal(rows)

    def importance(self) -> dict[str, float]:
        """`I · U` of each layer; 0.0 before the first step."""
        shared = self.shared
        values = (shared.I * shared.U).tolist() if isinstance(shared, Allocator) else []
        return dict(zip(self.layers, values))

    def found_ranks(self) -> dict[str, int]:
        """`ranks()`."""
        return self.ranks()

    def ranks(self) -> dict[str, int]:
        """The active rank of each layer."""
        return {name: update.active for name, update in self._updates().items()}

    @property
    def total_rank(self) -> int:
        """The sum of all active ranks."""
        return sum(self.ranks().values())

    def param_groups(self, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups: the parameters trained from the start, then one group for each growth so far, in order."""
        calls = sorted({call for update in self._updates().values() for call in update.times})
        later = [{**group, "lr": lr} for call in calls if (group := self._group(call))["params"]]
        grown = {id(p) for group in later for p in group["params"]}
        groups = []
        for group in super().param_groups(lr, weight_decay):
            first = [p for p in group["params"] if id(p) not in grown]
            groups += [{**group, "params": first}] if first else []
        return groups + later

    def follow(self, scheduler: Any, *, warmup: int, total: int) -> None:
        """Extend a learning rate scheduler's lists to the optimizer's groups; call it after `step`, and after a resume.

        Each later group gets the schedule `increlora_lr_lambda(warmup, total, start)` if the scheduler is a `LambdaLR`, else
        the scheduler's own.

        Args:
            scheduler: a torch scheduler, or accelerate's wrapper of one.
            warmup, total: steps of the warm-up, and of the whole training.
        """
        inner = getattr(scheduler, "scheduler", scheduler)
        factors = getattr(inner, "lr_lambdas", None)
        for place, group in enumerate(inner.optimizer.param_groups):
            if ADDED not in group:
                continue
            base = group.setdefault("initial_lr", group["lr"])
            if factors is not None:
                factors[place:] = [increlora_lr_lambda(warmup, total, group[ADDED])]
                group["lr"] = base * factors[place](inner.last_epoch)
            if place >= len(inner.base_lrs):
                inner.base_lrs.append(base)

    def _own(self) -> set[int]:
        return super()._own() - {id(p) for update in self._updates().values() for p in update.reserve()}

    def _updates(self) -> dict[str, IncreLoRAUpdate]:
        updates: dict[str, Any] = {name: layer.update for name, layer in self.layers.items()}
        return updates

    def _target(self) -> int:
        total = self.method.target_total
        return self.method.target_rank * len(self.layers) if total is None else total

    def _group(self, call: int) -> dict[str, Any]:
        params = [p for update in self._updates().values() for p in update.joined(call)]
        return {"params": params, "weight_decay": self.method.weight_decay, ADDED: call}

    def _score(self, on: bool) -> None:
        for update in self._updates().values():
            update.scoring = on

    def _scores(self, like: Tensor) -> Tensor:
        """The score of each layer in this step, the mean over processes."""
        scores = [like.new_zeros(()) if u.score is None else u.score.to(like) for u in self._updates().values()]
        return mean_over_processes(torch.stack(scores))

    def _chosen(self, later: int) -> list[str]:
        """The most important layers: `top_h`, or as many as are needed to reach the target in this growth and `later` more."""
        importance = self.importance()
        wanted, most = self._target() - self.total_rank, self.method.top_h
        if most is None:
            growths = -(-wanted // self.method.ranks_at_a_time)
            most = -(-growths // max(1 + later, -(-growths // len(importance))))
        count = min(most, wanted, len(importance))
        least = sorted(importance.values(), reverse=True)[count - 1]
        return [name for name, value in importance.items() if value >= least]

    def _grow(self, names: list[str], optimizer: torch.optim.Optimizer, call: int) -> None:
        updates = self._updates()
        for name in names:
            updates[name].grow(call, stream(self.seed, "IncreLoRA reserve", name, call))
        group = self._group(call)
        if group["params"]:
            optimizer.add_param_group(group)
        if self.total_rank >= self._target():
            self._score(False)
            for update in updates.values():
                update.silence()


def _distance_from_orthonormal(rows: list[Tensor]) -> Tensor:
    """`Σ ‖R Rᵀ − 1‖_F`, batched by shape."""
    shapes: dict[Any, list[Tensor]] = {}
    for part in rows:
        shapes.setdefault((part.shape, part.device), []).append(part)
    total = rows[0].new_zeros(())
    for parts in shapes.values():
        stack = torch.stack(parts)
        eye = torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device)
        total = total + torch.linalg.matrix_norm(stack @ stack.mT - eye).sum().to(total.device)
    return total
