"""Self-guided training: a dense weight that trains along with structured factors, and fades out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.companion import Companion
from lowdim.errors import CheckpointError, check_choice, check_float, check_int
from lowdim.linalg import derive_seed
from lowdim.modules import StructuredLinear
from lowdim.surgery import swap_layers

__all__ = ["SelfGuide", "SelfGuided"]

_SCHEDULES = ("cosine", "linear")
_VERSION = 1


class SelfGuided(StructuredLinear):
    """A structured layer in training, with a dense guide that starts as its equivalent and fades out.

    Formula: `y = a (guide x) + (1 - a) (W x) + bias`, `W` the weight of the factors, and after `t` finished steps
    `a = ½ (1 + cos(π t / steps))` (cosine) or `1 - t / steps` (linear), 0 for `t > steps`. Guide, factors and bias get the
    ordinary gradients of this.

    Args:
        layer: the structured layer (LowRankLinear, BlockDense, BlockShuffle, Monarch, ...); kept as `layer`.
        steps: optimizer steps until the guide is gone, >= 1.
        schedule: `"cosine"` or `"linear"`.
        reduce_flops: in training mode use the guide in a share `a` of the steps only, drawn at random, and the layer alone in
            the others: half the guide's cost over its steps. One draw for each step, so that all of its passes agree.
        seed: of these draws; processes that train together must have the same.

    Attributes:
        guide: `(out, in)`, trained along.
        count: finished steps, int64, saved.

    Raises:
        TypeError: not a structured layer.
        ValueError: `steps` below 1, unknown schedule.

    Example:
        >>> import torch
        >>> from lowdim.layers import LowRankLinear, SelfGuided
        >>> layer = SelfGuided(LowRankLinear(6, 4, rank=2, init="svd", seed=0), steps=2)
        >>> shares = [layer.ratio]
        >>> for _ in range(2):
        ...     layer.step(); shares.append(round(layer.ratio, 6))
        >>> shares, type(layer.finish()).__name__
        ([1.0, 0.5, 0.0], 'LowRankLinear')

    Not for inference: `finish()` gives the layer back. `SelfGuide` does all of this for a model.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    NeurIPS 2024, arXiv 2406.16450.
    """

    count: Tensor

    def __init__(
        self, layer: StructuredLinear, *, steps: int, schedule: str = "cosine", reduce_flops: bool = False, seed: int = 0
    ):
        super().__init__()
        if not isinstance(layer, StructuredLinear) or isinstance(layer, SelfGuided):
            raise TypeError(f"layer must be a structured layer such as BlockDense; got {type(layer).__name__}")
        check_int("steps", steps, 1)
        check_choice("schedule", schedule, _SCHEDULES)
        self.in_features, self.out_features, self.transposed = layer.in_features, layer.out_features, layer.transposed
        self.steps, self.schedule, self.reduce_flops, self.seed = steps, schedule, reduce_flops, seed
        self.layer = layer
        self.guide = nn.Parameter(layer.to_linear().weight.detach())
        self._done = 0  # the buffer's number: reading that in each pass would wait for the device
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=self.guide.device))
        self.register_load_state_dict_post_hook(_read_count)
        self.train(layer.training)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The layer's."""
        return self.layer.bias

    @property
    def ratio(self) -> float:
        """The guide's share `a` now."""
        if self._done >= self.steps:
            return 0.0
        part = self._done / self.steps
        return 0.5 * (1 + math.cos(math.pi * part)) if self.schedule == "cosine" else 1 - part

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """`(..., out_features)`."""
        structured = self.layer(x)
        ratio = self.ratio
        if ratio == 0.0 or (self.reduce_flops and self.training and self._draw() >= ratio):
            return structured
        return torch.lerp(structured, F.linear(x, self.guide, self.bias), ratio)

    def _draw(self) -> float:
        """Uniform in [0, 1), the same in all passes of a step, on all processes and after a restart."""
        return derive_seed(self.seed, "self-guide", self._done) / 2**63

    def dense_weight(self) -> Tensor:
        """The blend now, `a guide + (1 - a) W`."""
        return torch.lerp(self.layer.dense_weight(), self.guide, self.ratio)

    def products(self) -> list[tuple[int, int, int]]:
        """The layer's, and the guide."""
        return [*self.layer.products(), (self.guide.numel(), self.in_features, self.out_features)]

    def step(self) -> None:
        """Call after each optimizer step."""
        self._done += 1
        self.count.fill_(self._done)

    def finish(self) -> StructuredLinear:
        """The structured layer, without the guide."""
        return self.layer.train(self.training)

    def extra_repr(self) -> str:
        """The schedule, for `print(model)`."""
        return f"steps={self.steps}, schedule={self.schedule}, ratio={self.ratio:.3g}"


class SelfGuide(Companion):
    """Trains a model's structured layers with dense guides for the first part of the steps.

    Every structured layer becomes a `SelfGuided` one, in place, for `round(fraction · total_steps)` steps. The guides become
    one more group of the optimizer, with the settings of its first. `finish()` puts the plain layers back, and takes the guides
    out of the optimizer.

    Args:
        model: with structured layers.
        optimizer: over its parameters; build schedulers after this.
        total_steps: optimizer steps of the whole training.
        fraction: of the steps that have a guide, in (0, 1].
        schedule: how the guide's share falls, `"cosine"` or `"linear"`.
        reduce_flops: use the guide only in a share of the steps, drawn at random (see `SelfGuided`).
        seed: of these draws.

    Attributes:
        layers: name -> guided layer; empty after `finish`.

    Raises:
        ValueError: `total_steps` missing or below 1, another number out of range, no structured layer in the model, a model
            that is guided already or is itself a structured layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.layers import BlockDense, SelfGuide
        >>> model = nn.Sequential(BlockDense(8, 8, rank=4, nblocks=2), nn.GELU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guide = SelfGuide(model, optimizer, total_steps=4)
        >>> for _ in range(4):
        ...     model(torch.ones(2, 8)).square().mean().backward()
        ...     optimizer.step(); optimizer.zero_grad(); guide.step()
        >>> guide.finish()
        >>> type(model[0]).__name__, len(optimizer.param_groups)
        ('BlockDense', 1)

    While guided the layers train more numbers than dense ones. Not where memory for these and their moments is short.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    NeurIPS 2024, arXiv 2406.16450.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int | None = None,
        fraction: float = 0.5,
        schedule: str = "cosine",
        reduce_flops: bool = False,
        seed: int = 0,
    ):
        check_int("total_steps", total_steps, 1)
        check_float("fraction", fraction, 0.0, 1.0, low_open=True)
        check_choice("schedule", schedule, _SCHEDULES)
        assert total_steps is not None
        modules = dict(model.named_modules())
        if any(isinstance(module, SelfGuided) for module in modules.values()):
            raise ValueError("model has guided layers already: call finish() of the first SelfGuide")
        found = {name: module for name, module in modules.items() if isinstance(module, StructuredLinear)}
        if not found:
            raise ValueError("model must have a structured layer (see lowdim.layers.swap_linear); it has none")
        if "" in found:
            raise ValueError(f"model is itself a {type(model).__name__}, which cannot be replaced in place: use SelfGuided")
        steps = max(1, round(fraction * total_steps))
        how = {"steps": steps, "schedule": schedule, "reduce_flops": reduce_flops}
        swap_layers(model, found, lambda name, layer: SelfGuided(layer, seed=derive_seed(seed, name), **how))
        self.model, self.optimizer = model, optimizer
        now = dict(model.named_modules())
        self.layers: dict[str, SelfGuided] = {name: now[name] for name in found}  # type: ignore[misc]
        first = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        optimizer.add_param_group({**first, "params": self.guides()})

    def guides(self) -> list[nn.Parameter]:
        """The guides; one where layers share it."""
        return list({id(layer.guide): layer.guide for layer in self.layers.values()}.values())

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call after each optimizer step: the guides' share falls."""
        for layer in self.layers.values():
            layer.step()

    def finish(self) -> None:
        """Put the plain layers back, and take the guides out of the optimizer."""
        if not self.layers:
            return
        guides = {id(guide) for guide in self.guides()}
        groups = self.optimizer.param_groups
        for group in groups:
            for p in group["params"]:
                if id(p) in guides:
                    self.optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) not in guides]
        groups[:] = [group for group in groups if group["params"]]
        swap_layers(self.model, self.layers, lambda name, layer: layer.finish())
        self.layers = {}

    def state_dict(self) -> dict[str, Any]:
        """The guided layers, with their factors: a model that is loaded before it is guided knows no names of theirs."""
        return {"version": _VERSION, "layers": {name: dict(layer.state_dict()) for name, layer in self.layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from this state; one from after `finish` finishes.

        Raises:
            CheckpointError: the state of another model.
        """
        if state.get("version") != _VERSION:
            raise CheckpointError(f"state must be of version {_VERSION}; got {state.get('version')!r}")
        if not state["layers"]:
            return self.finish()
        if state["layers"].keys() != self.layers.keys():
            raise CheckpointError(
                f"the saved state guides the layers {sorted(state['layers'])}; this one guides {sorted(self.layers)}"
            )
        for name, layer in self.layers.items():
            layer.load_state_dict(state["layers"][name])


def _read_count(module: Any, keys: Any) -> None:
    if not module.count.is_meta:
        module._done = int(module.count)
