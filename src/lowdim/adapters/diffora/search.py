"""The search of DiffoRA: the matrix of logits that the layers share, its training, and the final choice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.shared import Shared
from lowdim.calibrate import LossFn

__all__ = ["DifferentialMatrix", "DiffoRAAdapted", "Grid", "search_steps"]

Grid = list[list[str | None]]


class DifferentialMatrix(Shared):
    """The module that the layers share: the logits `dam (rows, columns)` during the search, and then the choice.

    `selected (rows, columns)` marks the chosen cells; `pair (rows, columns)` is the row of its column whose `A` and `B` a
    cell uses (-1: none). Both apply once the search has ended.
    """

    def __init__(self, grid: Grid, dtype: torch.dtype, device: Any):
        super().__init__()
        self.grid = grid
        self.cells = {name: (i, j) for i, row in enumerate(grid) for j, name in enumerate(row) if name is not None}
        self.dam: nn.Parameter | None = nn.Parameter(self._blank(dtype, device))
        self.register_buffer("selected", torch.zeros(len(grid), len(grid[0]), dtype=torch.bool, device=device))
        self.register_buffer("pair", torch.full((len(grid), len(grid[0])), -1, device=device))
        self.updates: dict[str, Any] = {}  # DiffoRAUpdates; inside a dict, so that they are not children of this module

    selected: Tensor
    pair: Tensor

    def absent(self) -> Tensor:
        """Cells without a module, `(rows, columns)`."""
        return torch.tensor([[name is None for name in row] for row in self.grid], device=self.selected.device)

    @torch.no_grad()
    def choose(self, selected: Tensor, pair: Tensor) -> None:
        """End the search."""
        self.selected.copy_(selected)
        self.pair.copy_(pair)
        self.dam = None
        self.settle()

    def settle(self) -> None:
        """Give every update the parameters selected by `pair`."""
        if self.dam is not None:
            return
        for name, update in self.updates.items():
            other = self.lender(name)
            if other is not update:
                update.borrow(other)

    def lender(self, name: str) -> Any:
        """The update whose parameters a layer uses, or None."""
        i, j = self.cells[name]
        row = int(self.pair[i, j])
        return None if row < 0 else self.updates[self.grid[row][j] or name]

    def _blank(self, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.tensor([[-math.inf if n is None else 0.0 for n in row] for row in self.grid], dtype=dtype, device=device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The updates come before this module in the model and have been loaded.
        if prefix + "dam" in state_dict:
            dtype = state_dict[prefix + "dam"].dtype
            self.dam = self.dam if self.dam is not None else nn.Parameter(self._blank(dtype, self.selected.device))
        elif prefix + "pair" in state_dict:
            self.dam = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        for name, update in self.updates.items():
            if update.lost is not None and (self.dam is not None or self.lender(name) is update):
                missing += [update.lost + "A", update.lost + "B"]
            update.lost = None
        self.settle()


class DiffoRAAdapted(Adapted):
    """Returned by `lowdim.adapt(model, DiffoRA(...))`: an `Adapted` with the search and its end.

    Attributes:
        grid: module names, one row for each block and one column for each entry of `target_modules`; None where a block
            lacks it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert isinstance(self.shared, DifferentialMatrix)
        self._matrix = self.shared
        self.grid = self._matrix.grid
        self._matrix.settle()

    @property
    def dam(self) -> nn.Parameter | None:
        """The logits `(rows, columns)`, -inf in absent cells; None once the search has ended."""
        return self._matrix.dam

    def gates(self) -> Tensor:
        """`sigmoid(dam)` while searching, then 1 for selected modules and 0 for the rest; `(rows, columns)`."""
        return self._matrix.selected.float() if self.dam is None else torch.sigmoid(self.dam)

    def weight_parameters(self) -> list[nn.Parameter]:
        """All `A` and `B`, each once, row by row through the grid."""
        updates = [self.layers[name].update for row in self.grid for name in row if name is not None]
        return list(dict.fromkeys(p for update in updates for p in (update.A, update.B) if p is not None))  # type: ignore[misc]

    def dam_gradient(self, loss_fn: LossFn, train_batch: Any, valid_batch: Any, xi: float) -> Tensor:
        """The gradient of the logits, `(rows, columns)`; changes nothing.

        Formula: `∇_dam L_valid(ω, dam)`; with `unrolled` the total derivative of
        `dam ↦ L_valid(ω − ξ ∇_ω L_train(ω, dam), dam)` by double backward. `ω` is everything trained but `dam`.

        Raises:
            RuntimeError: the search has ended.
            ValueError: a loss that is not finite.
        """
        return self._gradient(loss_fn, train_batch, valid_batch, xi)[0]

    def search_step(
        self,
        loss_fn: LossFn,
        train_batch: Any,
        valid_batch: Any,
        dam_optimizer: torch.optim.Optimizer,
        weight_optimizer: torch.optim.Optimizer,
    ) -> tuple[float, float]:
        """Update the logits on a validation batch, then the weights on a training batch.

        Args:
            dam_optimizer: over `[adapted.dam]`.
            weight_optimizer: over `adapted.weight_parameters()`, and a new head's parameters if there are any. The rate of its
                first group is the virtual step's `ξ`.

        Returns:
            The training loss at the new logits and the validation loss, each before its own step.

        Raises:
            RuntimeError: the search has ended.
            ValueError: a loss that is not finite, or an optimizer that does not hold the parameters that it should update.
        """
        dam = self._searched()
        if not any(p is dam for group in dam_optimizer.param_groups for p in group["params"]):
            raise ValueError("dam_optimizer must hold adapted.dam")
        weights = [p for group in weight_optimizer.param_groups for p in group["params"] if p is not dam and p.requires_grad]
        if not weights:
            raise ValueError("weight_optimizer must hold adapted.weight_parameters()")
        xi = float(weight_optimizer.param_groups[0]["lr"])
        gradient, valid_loss = self._gradient(loss_fn, train_batch, valid_batch, xi)
        absent = self._matrix.absent()
        with torch.no_grad():
            dam.masked_fill_(absent, 0.0)  # an optimizer with decay would turn -inf into NaN
            dam.grad = gradient
            dam_optimizer.step()
            dam.masked_fill_(absent, -math.inf)
            dam.grad = None
        with torch.enable_grad():
            loss = _finite("training", loss_fn(self.model, train_batch))
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for parameter, value in zip(weights, gradients):
            parameter.grad = value
        weight_optimizer.step()
        for parameter in weights:
            parameter.grad = None
        return float(loss.detach()), valid_loss

    @torch.no_grad()
    def discretize(self) -> Tensor:
        """End the search: in each row the modules with the largest logits keep their own pair, with gate 1.

        With `share` the other modules of a column with the same shape share one pair, that of the largest logit among them;
        without it they get no update. Existing optimizers hold parameters that are no longer used: make new ones.

        Returns:
            Which cells were selected, bool `(rows, columns)`.

        Raises:
            RuntimeError: the search has already ended.
            ValueError: logits that are not finite.
        """
        dam = self._searched().detach()
        absent = self._matrix.absent()
        if not bool((dam.isfinite() | absent).all()):
            raise ValueError("the logits in dam are not finite: the search diverged")
        method: Any = self.method
        selected = _select(dam, absent, method.select_ratio)
        kinds = {name: self._kind(name) for row in self.grid for name in row if name is not None}
        pair = _pairs(dam, selected, self.grid, kinds, method.share)
        self._matrix.choose(selected, pair)
        return selected

    def before_training(
        self,
        batches: list[Any],
        loss_fn: LossFn | None,
        lr: float,
        steps: int,
        make_optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] | None = None,
    ) -> int:
        """The whole search, for training loops without one: a fifth of `steps`, with half of the batches for validation.

        Adam updates the logits (rate 2e-2, betas 0.5 and 0.999), AdamW the weights at `lr`; then `discretize()`. Does nothing
        if the search has ended. A single batch is used as both halves.

        Returns:
            The number of steps of the search.

        Raises:
            ValueError: no batches, or no loss_fn.
        """
        if self.dam is None:
            return 0
        if not batches or loss_fn is None:
            raise ValueError("DiffoRA searches before it trains: it needs sample batches and loss_fn")
        half = len(batches) // 2
        valid, train = batches[:half] or batches, batches[half:]
        weights = [p for p in self.trainable().values() if p is not self.dam]
        dam_optimizer = torch.optim.Adam([self.dam], lr=2e-2, betas=(0.5, 0.999))
        make = make_optimizer or functools.partial(torch.optim.AdamW, weight_decay=0.0)
        weight_optimizer = make(weights, lr)
        modes = {module: module.training for module in self.model.modules()}
        self.model.train()
        try:
            for step in range(search_steps(steps)):
                pair = train[step % len(train)], valid[step % len(valid)]
                self.search_step(loss_fn, *pair, dam_optimizer, weight_optimizer)
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.discretize()
        return search_steps(steps)

    def _searched(self) -> nn.Parameter:
        if self.dam is None:
            raise RuntimeError("the search has ended: discretize() was called")
        return self.dam

    def _gradient(self, loss_fn: LossFn, train_batch: Any, valid_batch: Any, xi: float) -> tuple[Tensor, float]:
        dam, method = self._searched(), self.method
        with torch.enable_grad():
            if not method.unrolled:  # type: ignore[attr-defined]
                loss = _finite("validation", loss_fn(self.model, valid_batch))
                return torch.autograd.grad(loss, [dam])[0], float(loss.detach())
            weights = {name: p for name, p in self.trainable().items() if p is not dam and p.requires_grad}
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                inner = _finite("training", loss_fn(self.model, train_batch))
                steps = torch.autograd.grad(inner, list(weights.values()), create_graph=True, allow_unused=True)
                moved = {f"model.{n}": p - xi * g for (n, p), g in zip(weights.items(), steps) if g is not None}
                loss = _finite("validation", functional_call(_Objective(self.model, loss_fn), moved, (valid_batch,)))
                return torch.autograd.grad(loss, [dam])[0], float(loss.detach())

    def _kind(self, name: str) -> tuple[Any, ...]:
        """The key that two layers must have in common to share a pair."""
        layer = self.layers[name]
        shape = tuple(layer.weight.shape) if layer.kind.startswith("conv") else (layer.out_features, layer.in_features)
        A: Any = layer.update.A
        return layer.kind, shape, A.dtype, A.device


class _Objective(nn.Module):
    """A loss as a module, so that its model can be called with other parameters."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def search_steps(steps: int) -> int:
    """The number of training steps that the search uses."""
    return max(1, round(0.2 * steps))


def _finite(which: str, loss: Tensor) -> Tensor:
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(f"the {which} loss must be finite; got {float(loss.detach())}")
    return loss


def _select(dam: Tensor, absent: Tensor, ratio: float) -> Tensor:
    """The largest logits of each row; of equal ones the first."""
    selected = torch.zeros_like(absent)
    order = torch.sort(dam, dim=1, descending=True, stable=True).indices
    for i, count in enumerate((~absent).sum(1).tolist()):
        selected[i, order[i, : max(1, math.ceil(ratio * count - 1e-9))]] = True
    return selected


def _pairs(dam: Tensor, selected: Tensor, grid: Grid, kinds: Mapping[str, tuple[Any, ...]], share: bool) -> Tensor:
    """The row whose pair each cell uses, -1 for none."""
    values, chosen = dam.tolist(), selected.tolist()
    pair = [[-1] * len(row) for row in grid]
    for j in range(len(grid[0])):
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, row in enumerate(grid):
            name = row[j]
            if name is not None and chosen[i][j]:
                pair[i][j] = i
            elif name is not None and share:
                groups.setdefault(kinds[name], []).append(i)
        for rows in groups.values():
            owner = max(rows, key=lambda i, j=j: values[i][j])  # the first of equal ones
            for i in rows:
                pair[i][j] = owner
    return torch.tensor(pair, device=dam.device)
