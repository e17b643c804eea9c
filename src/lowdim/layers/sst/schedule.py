"""The companion that trains SST layers along with the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowdim.companion import Companion, RateFactor
from lowdim.errors import check_int
from lowdim.layers.sst.layer import SSTLinear
from lowdim.linalg import stream

__all__ = ["SSTScheduler"]


class SSTScheduler(Companion):
    """Changes the active directions of a model's `SSTLinear` layers during training.

    Formula: after every optimizer step each layer's `post_step()`. At the end of an iteration (`steps_per_iteration` steps) new
    active directions are drawn, and the optimizer's state of `U_active` and `Vh_active` is dropped; that of all other
    parameters stays. The `i`-th step of an iteration, from 1, uses `min(1, i / warmup)` times the learning rates. At the end of
    a round (`iterations_per_round` iterations) each layer is decomposed again before the draw.

    Args:
        model: with SSTLinear layers, in any wrapping; `fully_shard` it first.
        optimizer: over their parameters; one that steps inside the backward pass has no warm-up.
        steps_per_iteration: optimizer steps with the same active directions.
        iterations_per_round: None means `⌈d / rank⌉` of each layer.
        warmup: steps; in an iteration that is no longer than this the full rates are never reached.
        seed: of all draws. Processes that train together must have the same.

    Raises:
        ValueError: a number out of range, or a model without an SSTLinear.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.layers import SSTLinear, SSTScheduler
        >>> model = nn.Sequential(SSTLinear(8, 8, rank=2), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> turn = SSTScheduler(model, optimizer, steps_per_iteration=5, warmup=2)
        >>> for _ in range(5):
        ...     model(torch.ones(4, 8)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad(); turn.step()
        >>> model[0].U_active in optimizer.state, model[0].S in optimizer.state
        (False, True)

    It can be combined with a learning-rate schedule: the warm-up acts only within `optimizer.step()`. Not for layers that
    should keep their active directions; call `post_step()` yourself there.

    Source: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
    arXiv 2405.15481.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps_per_iteration: int = 200,
        iterations_per_round: int | None = None,
        warmup: int = 20,
        seed: int = 0,
    ):
        check_int("steps_per_iteration", steps_per_iteration, 1)
        if iterations_per_round is not None:
            check_int("iterations_per_round", iterations_per_round, 1)
        check_int("warmup", warmup, 0)
        check_int("seed", seed, 0)
        self.layers = [module for module in model.modules() if isinstance(module, SSTLinear)]
        if not self.layers:
            raise ValueError(f"model must have a layer of type SSTLinear; {type(model).__name__} has none")
        self.optimizer, self.steps_per_iteration, self.warmup, self.seed = optimizer, steps_per_iteration, warmup, seed
        self.iterations_per_round = iterations_per_round
        self.steps = 0
        self._dropped: dict[Tensor, Any] = {}
        self.rate = RateFactor(optimizer, self.factor)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_state_dict_post_hook(self._complete)

    def factor(self) -> float:
        """The factor of the learning rates in the next step."""
        step = self.steps % self.steps_per_iteration + 1
        return 1.0 if step >= self.warmup else step / self.warmup

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call once after each optimizer step."""
        self.steps += 1
        for layer in self.layers:
            layer.post_step()
        iteration, inside = divmod(self.steps, self.steps_per_iteration)
        if inside:
            return
        for number, layer in enumerate(self.layers):
            if iteration % self._round(layer) == 0:
                layer.reinitialize()
            layer.resample(stream(self.seed, "sst", "active", number, iteration))
        self._drop()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the seed; the rest follows from these and from the model."""
        return {"steps": self.steps, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a scheduler with the same settings, with its draws.

        Raises:
            ValueError: `steps` is missing or not an int >= 0.
        """
        check_int("steps", state.get("steps"), 0)
        self.steps, self.seed = state["steps"], state.get("seed", 0)  # 0: the seed of all earlier versions

    def _drop(self) -> None:
        for layer in self.layers:
            for parameter in (layer.U_active, layer.Vh_active):
                if parameter in self.optimizer.state:
                    self._dropped[parameter] = self.optimizer.state.pop(parameter)

    def _before(self, *_: Any) -> None:
        if self.steps and self.steps % self.steps_per_iteration == 0:
            self._drop()  # a checkpoint saved at this point restored them
        self._dropped.clear()

    def _complete(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        """A checkpoint saved right after a drop holds the old states: FSDP2 cannot load one with a parameter without state."""
        for group, names in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            for parameter, name in zip(group["params"], names["params"], strict=True):
                if parameter in self._dropped:
                    saved["state"].setdefault(name, self._dropped[parameter])

    def _round(self, layer: SSTLinear) -> int:
        return self.iterations_per_round or -(-layer.S.numel() // layer.rank)
