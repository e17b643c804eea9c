"""DeltaProduct on the word problem of S3, the permutations of three things: two steps a token track it, one does not."""

from __future__ import annotations

import itertools
import math
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.layers import DeltaProduct
from lowdim.linalg import stream
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

WIDTH, HEADS, BATCH, STEPS, WARMUP, LR, DECAY = 32, 4, 64, 800, 50, 1e-2, 1e-6
LENGTH, LONG, TESTS = 10, 40, 256
ELEMENTS = tuple(itertools.permutations(range(3)))
#: name -> options of the layer
ARMS = {
    "n = 2, eigenvalues in [-1, 1]": {"num_householder": 2, "allow_neg_eigval": True},
    "n = 1, eigenvalues in [-1, 1]": {"num_householder": 1, "allow_neg_eigval": True},
    "n = 2, eigenvalues in [0, 1]": {"num_householder": 2, "allow_neg_eigval": False},
}


def run(context: Context) -> Outcome:
    """Accuracy over all positions, at the length of training and at four times that."""
    seeds, steps = ((0,), 20) if context.quick else ((0, 1), STEPS)
    outcome = Outcome(
        "delta-product",
        f"Word problem of S3 (input: random elements, target: their running product, {len(ELEMENTS)} classes). Embedding, "
        f"one layer (width {WIDTH}, {HEADS} heads of {WIDTH // HEADS}, no gates, no convolution) with a residual, LayerNorm, "
        f"linear head; AdamW {LR:g}, decay {DECAY:g}, {WARMUP} steps of warm-up, cosine, clip 1, {steps} steps of {BATCH} "
        f"fresh sequences of length {LENGTH}; tested on {TESTS} sequences, seeds {', '.join(map(str, seeds))}",
    )
    for seed in seeds:
        for arm, options in ARMS.items():
            start = time.perf_counter()
            model = _train(seed, steps, options)
            row = {"arm": arm, "seed": seed} | {f"length {n}": _accuracy(model, n, seed) for n in (LENGTH, LONG)}
            context.say(f"{arm}, seed {seed}: {row[f'length {LENGTH}']:.3f}, {row[f'length {LONG}']:.3f}")
            outcome.rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
            first = outcome.rows[-1][f"length {LENGTH}"]
            if arm == next(iter(ARMS)):
                outcome.checks += [
                    Check(f"{arm}, seed {seed}: accuracy at length {LENGTH}", first, ">=", 0.98),
                    Check(f"{arm}, seed {seed}: accuracy at length {LONG}", outcome.rows[-1][f"length {LONG}"], ">=", 0.9),
                ]
            else:
                outcome.checks.append(Check(f"{arm}, seed {seed}: accuracy at length {LENGTH}", first, "<=", 0.7))
    outcome.notes += [
        f"Chance is {1 / len(ELEMENTS):.3f}. The first positions are easy for every arm.",
        "One small group, and one layer. Language modelling, and larger groups with more steps a token, are not tried here.",
    ]
    return outcome


class _Tracker(nn.Module):
    """Embedding, the mixer beside a residual, norm, head."""

    def __init__(self, seed: int, options: dict[str, int | bool]):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(len(ELEMENTS), WIDTH)
            self.mixer = DeltaProduct(
                WIDTH,
                num_heads=HEADS,
                head_dim=WIDTH // HEADS,
                expand_v=1.0,
                use_forget_gate=False,
                use_output_gate=False,
                use_short_conv=False,
                chunk_size=LENGTH,
                seed=seed,
                **options,  # type: ignore[arg-type]
            )
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, len(ELEMENTS))

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        return self.head(self.norm(x + self.mixer(x)))


def _train(seed: int, steps: int, options: dict[str, int | bool]) -> nn.Module:
    model, draw = _Tracker(seed, options), stream(seed, "delta-product", "words")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    with torch.enable_grad():
        for step in range(steps):
            part = (step + 1 - WARMUP) / max(steps - WARMUP, 1)
            for group in optimizer.param_groups:
                group["lr"] = LR * min((step + 1) / WARMUP, (1 + math.cos(math.pi * max(part, 0.0))) / 2)
            words = torch.randint(len(ELEMENTS), (BATCH, LENGTH), generator=draw)
            loss = F.cross_entropy(model(words).flatten(0, 1), _products(words).flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model


@torch.no_grad()
def _accuracy(model: nn.Module, length: int, seed: int) -> float:
    """Share of positions whose product is right."""
    words = torch.randint(len(ELEMENTS), (TESTS, length), generator=stream(seed, "delta-product", "test", length))
    return round(float((model(words).argmax(-1) == _products(words)).float().mean()), 4)


def _products(words: Tensor) -> Tensor:
    """The element that all words up to each position multiply to."""
    place = {element: i for i, element in enumerate(ELEMENTS)}
    table = torch.tensor([[place[tuple(a[i] for i in b)] for b in ELEMENTS] for a in ELEMENTS])
    found = [words[:, 0]]
    for t in range(1, words.shape[1]):
        found.append(table[words[:, t], found[-1]])
    return torch.stack(found, 1)
