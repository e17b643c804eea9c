"""Training of a small network inside an estimator: seeded, in shuffled batches, leaving torch's own random numbers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowdim.linalg import derive_seed, stream

__all__ = ["as_input", "batches", "build", "feed_forward", "outputs", "seed_from", "train"]

_ROWS = 4096  # of an output computed at once


def seed_from(random_state: Any) -> int:
    """An integer seed from what scikit-learn calls `random_state`: None, an integer or a `RandomState`."""
    from sklearn.utils import check_random_state

    return int(check_random_state(random_state).randint(2**31 - 1))


def build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module, its first numbers drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights") % 2**32)
        return make()


def feed_forward(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them, in float32."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.ReLU()] * bool(layers) + [nn.Linear(inner, outer, dtype=torch.float32)]
    return nn.Sequential(*layers)


def as_input(X: np.ndarray, network: nn.Module) -> Tensor:
    """The samples in the dtype and on the device of the network's first parameter."""
    first = next(network.parameters(), torch.zeros(0))
    return torch.from_numpy(np.array(X, dtype=np.float64)).to(first)


def batches(count: int, batch_size: int, epochs: int, seed: int, least: int = 2) -> Iterator[Tensor]:
    """Rows of each batch, shuffled in each epoch; a last one of fewer than `least` rows is left out unless it is all."""
    generator = stream(seed, "batches")
    for _ in range(epochs):
        parts = torch.randperm(count, generator=generator).split(batch_size)
        yield from (part for i, part in enumerate(parts) if i == 0 or len(part) >= least)


def train(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    rows: Iterator[Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    seed: int,
) -> None:
    """One step of every optimizer for each batch of rows; the network is left in eval mode.

    Args:
        loss: rows of a batch -> scalar.
        seed: of dropout and whatever else the network draws.

    Raises:
        ValueError: the loss is no longer finite.
    """
    network.train()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "training") % 2**32)
        for step, batch in enumerate(rows):
            for optimizer in optimizers:
                optimizer.zero_grad()
            value = loss(batch)
            if not bool(torch.isfinite(value)):
                raise ValueError(f"the loss is {value.item()} in step {step}: use a smaller lr, and scale the columns of X")
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
    network.eval()


def outputs(network: nn.Module, X: np.ndarray) -> np.ndarray:
    """What the network gives in eval mode, computed in float64."""
    wide = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        return torch.cat([wide(part).cpu() for part in as_input(X, wide).split(_ROWS)]).numpy()
