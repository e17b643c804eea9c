"""The small language model on which several reproductions compare optimizers and layers ("the LM set-up").

Tiny Shakespeare by characters, the last 100,000 for validation; a pre-norm transformer with 2 blocks, width 64, 4 heads,
context 48; batches of 16, 300 steps, 40 of warmup, then a cosine down to a tenth; the metric is the validation loss in nats per
character.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.linalg import stream
from lowdim.reproduce.settings.data import tiny_shakespeare
from lowdim.reproduce.settings.outcome import Context

__all__ = ["MATRICES", "Corpus", "Settings", "TinyTransformer", "load_corpus", "matrices", "train", "validate"]

#: Names of the layers, in each block, that methods project or replace.
MATRICES = ("qkv", "proj", "fc1", "fc2")
_HELD_OUT = 100_000


@dataclass(frozen=True)
class Corpus:
    """Characters as numbers."""

    train: Tensor  # (n,) int64
    valid: Tensor  # (100000,) int64
    vocabulary: int


@dataclass(frozen=True)
class Settings:
    """Sizes and schedule; `quick` reproductions cut the steps."""

    dim: int = 64
    heads: int = 4
    blocks: int = 2
    context: int = 48
    batch: int = 16
    steps: int = 300
    warmup: int = 40
    final: float = 0.1  # of the rate, at the end of the cosine
    valid_batches: int = 6
    valid_batch: int = 64

    def rate(self, step: int) -> float:
        """The factor on the learning rate at a step (from 0)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(
        self,
        x: Tensor,  # (batch, time, dim)
    ) -> Tensor:
        """`(batch, time, dim)`."""
        b, t, d = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinyTransformer(nn.Module):
    """The model; all weights are drawn from `seed`."""

    def __init__(self, vocabulary: int, settings: Settings, seed: int):
        super().__init__()
        d = settings.dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.position = nn.Embedding(vocabulary, d), nn.Embedding(settings.context, d)
            self.blocks = nn.ModuleList(Block(d, settings.heads) for _ in range(settings.blocks))
            self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)
            for table in (self.embed, self.position):
                nn.init.normal_(table.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,  # (batch, time)
    ) -> Tensor:
        """Logits `(batch, time, vocabulary)`."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_corpus(context: Context) -> Corpus:
    """Tiny Shakespeare as numbers, characters in alphabetical order.

    Raises:
        DataError: the text file does not exist.
    """
    text = tiny_shakespeare(context)
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    numbers = torch.tensor([letters[c] for c in text])
    return Corpus(numbers[:-_HELD_OUT], numbers[-_HELD_OUT:], len(letters))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the eight layers that methods project."""
    return [p for name, p in model.named_parameters() if name.endswith(".weight") and name.split(".")[-2] in MATRICES]


def _loss(model: nn.Module, text: Tensor, starts: Tensor, context: int) -> Tensor:
    rows = text[starts[:, None] + torch.arange(context + 1)]
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, settings: Settings) -> float:
    """Mean loss in nats per character over six fixed batches."""
    draw = stream(0, "tiny_lm", "valid")
    losses = []
    for _ in range(settings.valid_batches):
        starts = torch.randint(len(corpus.valid) - settings.context - 1, (settings.valid_batch,), generator=draw)
        losses.append(float(_loss(model, corpus.valid, starts, settings.context)))
    return sum(losses) / len(losses)


def train(
    model: nn.Module,
    corpus: Corpus,
    optimizers: list[torch.optim.Optimizer],
    settings: Settings,
    seed: int,
    *,
    each: Callable[[int], None] | None = None,
) -> float:
    """Train for `settings.steps` steps on batches drawn from `seed`; the validation loss at the end.

    Args:
        optimizers: each with its own rates at their peak; together they hold all trained parameters.
        each: called with the step's number after its backward pass, before the optimizers act.
    """
    draw = stream(seed, "tiny_lm", "train")
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, settings.rate) for o in optimizers]
    for step in range(settings.steps):
        starts = torch.randint(len(corpus.train) - settings.context - 1, (settings.batch,), generator=draw)
        _loss(model, corpus.train, starts, settings.context).backward()
        if each is not None:
            each(step)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return validate(model, corpus, settings)
