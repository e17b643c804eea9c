"""Training with Maestro: sampled passes, the group lasso, shrinking."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.companion import Companion
from lowdim.errors import CheckpointError, check_choice, check_float, check_int
from lowdim.layers.maestro.model import maestro_compact, maestro_layers
from lowdim.linalg import real_numbers, stream

__all__ = ["MaestroSampler", "MaestroTraining"]

_KINDS = ("per_layer", "across_layers")


class MaestroSampler:
    """Draws the smaller ranks at which layers run for one pass: ordered dropout.

    `"per_layer"`: all pairs (layer, rank), 1 <= rank <= current rank, shuffled, one per draw; reshuffled when used up. The
    other layers run at full rank. `"across_layers"`: an independent uniform rank for every layer.

    Args:
        model: the model with the layers, which are found by name; the order of their calls does not matter.
        seed: the draws depend only on it and on their number, so all processes draw alike.

    Attributes:
        layers: name -> layer.

    Raises:
        ValueError: unknown kind; a model without Maestro layers; in `sampled`, an unknown layer or a rank outside
            [0, current rank].

    Example:
        >>> import torch
        >>> from lowdim.layers import MaestroLinear, MaestroSampler
        >>> model = torch.nn.Sequential(MaestroLinear(4, 3), MaestroLinear(3, 2))
        >>> sampler = MaestroSampler(model)
        >>> sorted(pair for _ in range(5) for pair in sampler.draw().items())
        [('0', 1), ('0', 2), ('0', 3), ('1', 1), ('1', 2)]
        >>> with sampler.sampled({"0": 1}):
        ...     y = model(torch.zeros(1, 4))

    Not with activation checkpointing in your own loop: layers that are recomputed in the backward pass would run at full rank
    (torch detects this, and raises). MaestroTraining handles it.

    Source: Horváth et al., "Maestro", ICML 2024, arXiv 2308.14929.
    """

    def __init__(self, model: nn.Module, *, kind: str = "per_layer", seed: int = 0):
        check_choice("kind", kind, _KINDS)
        self.layers = maestro_layers(model)
        if not self.layers:
            raise ValueError(
                f"model must hold Maestro layers; got {type(model).__name__} without any (maestro_decompose makes them)"
            )
        self.kind, self.seed = kind, seed
        self._round = -1  # how often the ranks were read
        self.reset()

    def ranks(self) -> dict[str, int]:
        """The current rank of every layer."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def reset(self) -> None:
        """Read the layers' current ranks, and shuffle again: call it after shrinking."""
        self._ranks = self.ranks()
        self._next_round()

    def _next_round(self) -> None:
        self._round += 1
        self._position = 0
        self._order: list[int] | None = None

    def draw(self) -> dict[str, int]:
        """The next layer and its rank, or for `"across_layers"` a rank for every layer. A layer of rank 0 is never drawn."""
        if self._ranks != self.ranks():  # shrunk without a call of reset()
            self.reset()
        if self.kind == "across_layers":
            generator = stream(self.seed, "maestro", self.kind, self._round, self._position)
            self._position += 1
            with real_numbers():
                return {n: int(torch.randint(1, r + 1, (), generator=generator)) for n, r in self._ranks.items() if r > 0}
        count = sum(self._ranks.values())
        if count == 0:
            return {}
        if self._position == count:
            self._next_round()
        if self._order is None:
            generator = stream(self.seed, "maestro", self.kind, self._round)
            with real_numbers():
                self._order = torch.randperm(count, generator=generator).tolist()
        place = self._order[self._position]
        self._position += 1
        for name, rank in self._ranks.items():
            if place < rank:
                return {name: place + 1}
            place -= rank
        raise AssertionError("the position is past the last pair")

    @contextlib.contextmanager
    def sampled(self, ranks: Mapping[str, int] | None = None) -> Iterator[dict[str, int]]:
        """Inside the block, the layers of `ranks` (by default the next draw) run at these ranks, the others at full rank."""
        chosen = self.draw() if ranks is None else dict(ranks)
        for name, rank in chosen.items():
            check_choice("a layer of ranks", name, self.layers)
            check_int(f"ranks[{name!r}]", rank, 0, self.layers[name].rank)
        before = {name: layer.sampled for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.sampled = chosen.get(name)
            yield chosen
        finally:
            for name, layer in self.layers.items():
                layer.sampled = before[name]

    def state_dict(self) -> dict[str, Any]:
        """The position of the draws, and the ranks that they are drawn from."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "round": self._round,
            "position": self._position,
            "ranks": dict(self._ranks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from this state, with the saved seed; the layers' own ranks are in the model's state dict.

        Raises:
            CheckpointError: the state of another sampler.
        """
        _check_state(state, {"kind", "seed", "round", "position", "ranks"})
        if state["kind"] != self.kind:
            raise CheckpointError(f"the saved sampler is of kind {state['kind']!r}; this one is {self.kind!r}")
        if state["ranks"].keys() != self.layers.keys():
            raise CheckpointError(
                f"the saved sampler covers layers {sorted(state['ranks'])}; this one covers {sorted(self.layers)}"
            )
        self.seed = state["seed"]
        self._round, self._position, self._ranks = state["round"], state["position"], dict(state["ranks"])
        self._order = None


class MaestroTraining(Companion):
    """Maestro's additions to the usual loss and step: a sampled pass, the group lasso, and shrinking.

    Formula: `extra_loss = CE(sampled pass, softmax(full pass), detached) + lasso · Σ_layers group_lasso()`. Every
    `shrink_interval` steps each layer's rank becomes the number of components with importance >= `threshold`.

    Args:
        model: with Maestro layers.
        optimizer: of its parameters; it stays valid when layers shrink.
        lasso: weight of the group lasso; there is no good default (the authors' parser has 5e-3).
        threshold: smallest importance of a component that stays (the authors': 1e-5).
        shrink_interval: in steps; None means a tenth of `total_steps`; without `total_steps` only `shrink()` shrinks.
        kind, seed: see MaestroSampler.
        total_steps: of the training.
        full_pass: False samples ranks in the plain pass, in training mode only: half the work, and no target from the full
            model. `extra_loss` is then only the lasso.

    Raises:
        ValueError: lasso or threshold negative, an interval below 1, unknown kind, a model without Maestro layers; in
            `extra_loss`, logits of fewer than two classes.

    Example:
        >>> import torch
        >>> from lowdim.layers import MaestroTraining, maestro_decompose
        >>> model = maestro_decompose(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> maestro = MaestroTraining(model, optimizer, lasso=1e-3, threshold=0.05, shrink_interval=10)
        >>> x, y = torch.randn(8, 6), torch.randint(3, (8,))
        >>> logits = model(x)
        >>> loss = torch.nn.functional.cross_entropy(logits, y) + maestro.extra_loss(lambda: model(x), logits)
        >>> loss.backward(); optimizer.step(); maestro.step()

    Not for regression: the sampled pass learns the full pass's class probabilities.

    Source: Horváth et al., "Maestro", ICML 2024, arXiv 2308.14929.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        lasso: float,
        threshold: float,
        shrink_interval: int | None = None,
        kind: str = "per_layer",
        seed: int = 0,
        total_steps: int | None = None,
        full_pass: bool = True,
    ):
        check_float("lasso", lasso, 0.0)
        check_float("threshold", threshold, 0.0)
        for name, value in (("shrink_interval", shrink_interval), ("total_steps", total_steps)):
            if value is not None:
                check_int(name, value, 1)
        if shrink_interval is None and total_steps is not None:
            shrink_interval = max(1, total_steps // 10)
        self.model, self.optimizer = model, optimizer
        self.lasso, self.threshold, self.shrink_interval, self.full_pass = lasso, threshold, shrink_interval, full_pass
        self.sampler = MaestroSampler(model, kind=kind, seed=seed)
        self.steps = 0
        self._drawn: dict[str, int] = {}
        self._inside: list[Any] = []
        self._handles: list[Any] = []
        if not full_pass:
            self._handles = [
                model.register_forward_pre_hook(self._enter),
                model.register_forward_hook(self._leave, always_call=True),
            ]

    @property
    def drawn(self) -> dict[str, int]:
        """The ranks of this step's sampled pass; all micro-batches of a step share them."""
        if not self._drawn:
            self._drawn = self.sampler.draw()
        return self._drawn

    def loss(self, forward: Callable[[], Tensor], logits: Tensor) -> Tensor:
        """`extra_loss`, as training loops that know a `Companion` call it."""
        return self.extra_loss(forward, logits)

    def smooth_loss(self, forward: Callable[[], Tensor], logits: Tensor) -> Tensor | float:
        """The sampled pass's term: the group lasso has a kink where a tail is 0, beside it the curvature `lasso / ‖tail‖`."""
        sampled = self._sampled_loss(forward, logits)
        return 0.0 if sampled is None else sampled

    def extra_loss(self, forward: Callable[[], Tensor], logits: Tensor) -> Tensor:
        """The term to add to the loss, a scalar.

        Args:
            forward: runs the model again on the same batch and returns its logits.
            logits: `(..., classes)` of the plain pass; used as a target, without gradient. Every row counts alike.
        """
        penalty = self.penalty().to(logits.device)
        sampled = self._sampled_loss(forward, logits)
        return penalty if sampled is None else sampled + penalty

    def _sampled_loss(self, forward: Callable[[], Tensor], logits: Tensor) -> Tensor | None:
        """The cross entropy between the full pass and a sampled one; None without a second pass."""
        if logits.ndim < 2 or logits.shape[-1] < 2:
            raise ValueError(f"logits must be (..., classes) with at least 2 classes; got shape {tuple(logits.shape)}")
        self._replay(logits, {} if self.full_pass else self.drawn)
        if not self.full_pass or not self.drawn:
            return None
        classes = logits.shape[-1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        target = logits.detach().reshape(-1, classes).to(wide).softmax(-1)
        with self.sampler.sampled(self.drawn):
            small = forward()
        self._replay(small, self.drawn)
        return F.cross_entropy(small.reshape(-1, classes).to(wide), target)

    def _replay(self, logits: Tensor, ranks: Mapping[str, int]) -> None:
        """Make layers that are recomputed in the backward pass (activation checkpointing) use the ranks of their pass.

        The last computation is differentiated first, so the backward of the sampled pass ends before that of the full one.
        """

        def begin(_: Tensor) -> None:
            for name, layer in self.sampler.layers.items():
                layer.sampled = ranks.get(name)
            torch.autograd.Variable._execution_engine.queue_callback(self._in_full)  # type: ignore[attr-defined]

        if logits.requires_grad:
            logits.register_hook(begin)

    def _in_full(self) -> None:
        for layer in self.sampler.layers.values():
            layer.sampled = None

    def penalty(self) -> Tensor:
        """`lasso · Σ group_lasso()`, over all stored components of all layers."""
        parts = [layer.group_lasso() for layer in self.sampler.layers.values()]
        return self.lasso * torch.stack([part.to(parts[0].device, parts[0].dtype) for part in parts]).sum()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Call after each optimizer step: moves to the next draw, and shrinks at the end of an interval."""
        self.steps += 1
        self._drawn = {}
        if self.shrink_interval is not None and self.steps % self.shrink_interval == 0:
            self.shrink()

    def shrink(self) -> dict[str, int]:
        """Shrink every layer now; returns the new ranks. The parameters and the optimizer are unchanged."""
        self._drawn = {}
        found = {name: layer.shrink(self.threshold) for name, layer in self.sampler.layers.items()}
        self.sampler.reset()
        return found

    def compact(self) -> bool:
        """`maestro_compact`; False if no layer became smaller than a dense one."""
        return bool(maestro_compact(self.model))

    def found_ranks(self) -> dict[str, int]:
        """The current rank of every layer."""
        return self.sampler.ranks()

    def finish(self) -> None:
        """`close()`."""
        self.close()

    def close(self) -> None:
        """Remove the hooks of `full_pass=False` from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, including the layers' ranks."""
        return {
            "steps": self.steps,
            "sampler": self.sampler.state_dict(),
            "drawn": dict(self._drawn),
            "ranks": self.sampler.ranks(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as if never interrupted, with the same numbers.

        Raises:
            CheckpointError: the state of another training.
        """
        _check_state(state, {"steps", "sampler", "drawn", "ranks"})
        self.sampler.load_state_dict(state["sampler"])
        for name, layer in self.sampler.layers.items():
            layer.set_extra_state(state["ranks"].get(name))
        self.steps, self._drawn = state["steps"], dict(state["drawn"])

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module.training:
            context = self.sampler.sampled(self.drawn)
            context.__enter__()
            self._inside.append(context)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop().__exit__(None, None, None)


def _check_state(state: Mapping[str, Any], keys: set[str]) -> None:
    if set(state) != keys:
        raise CheckpointError(f"state must have the entries {sorted(keys)}; got {sorted(state)}")
