"""The setting that many adapters' reproductions share: scikit-learn's 8x8 digits, and small networks trained on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import MissingExtraError

__all__ = ["Digits", "accuracy", "batches", "digits", "fit", "mlp"]

BATCH = 64


@dataclass(frozen=True)
class Digits:
    """One random split; pixels in [0, 1], rows of 64."""

    x: Tensor  # (train, 64)
    y: Tensor  # (train,)
    test_x: Tensor  # (test, 64)
    test_y: Tensor  # (test,)

    def only(self, classes: Iterable[int]) -> Digits:
        """The samples of some classes."""
        keep = torch.tensor(sorted(classes))
        train, test = torch.isin(self.y, keep), torch.isin(self.test_y, keep)
        return Digits(self.x[train], self.y[train], self.test_x[test], self.test_y[test])

    def map(self, change: Callable[[Tensor], Tensor]) -> Digits:
        """The same samples with changed pixels; `change` is given `(samples, 8, 8)`."""
        turned = [change(part.view(-1, 8, 8)).reshape(-1, 64).contiguous() for part in (self.x, self.test_x)]
        return Digits(turned[0], self.y, turned[1], self.test_y)


def digits(seed: int, train: int = 900) -> Digits:
    """A random split of the 1,797 digits into `train` samples and the rest.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the digits") from error
    found: Any = load_digits()
    x, y = torch.from_numpy(found.data).float() / 16, torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:train], order[train:]
    return Digits(x[first], y[first], x[rest], y[rest])


def mlp(sizes: Sequence[int], seed: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU (and dropout) between them; numbers from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for i, (n, out) in enumerate(itertools.pairwise(sizes)):
            parts += [nn.ReLU()] * (i > 0) + [nn.Dropout(dropout)] * (i > 0 and dropout > 0) + [nn.Linear(n, out)]
        return nn.Sequential(*parts)


def batches(count: int, steps: int, seed: int, size: int = BATCH) -> Iterable[Tensor]:
    """`steps` random index batches out of `count` samples."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (min(size, count),), generator=generator)


def fit(
    model: nn.Module,
    parameters: Any,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    penalty: Callable[[], Any] = lambda: 0.0,
    after: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
    size: int = BATCH,
) -> nn.Module:
    """Train with AdamW; `penalty()` is added to the loss, `after(optimizer)` follows each step. Left in eval mode."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    model.train()
    with torch.enable_grad():
        for rows in batches(len(x), steps, seed, size):
            optimizer.zero_grad()
            (loss(model(x[rows]), y[rows]) + penalty()).backward()
            optimizer.step()
            after(optimizer)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, classes: Sequence[int] | None = None) -> float:
    """Share of correct answers; with `classes` only among those."""
    logits = model(x)
    if classes is not None:
        barred = torch.ones(logits.shape[1], dtype=torch.bool)
        barred[list(classes)] = False
        logits = logits.masked_fill(barred, float("-inf"))
    return float((logits.argmax(1) == y).float().mean())
