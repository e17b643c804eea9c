"""Low-rank layers in a deep stack train badly from random factors, and better with a guide: Fashion-MNIST, SGD and AdamW."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.layers import BlockDense, BlockShuffle, LowRank, Monarch, PreMerged, SelfGuide
from lowdim.linalg import derive_seed, stream
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

WIDTH, RANK, BATCH, WARMUP = 256, 8, 64, 30
ARMS = ("dense", "low rank", "self-guided")
RATES = {"SGD": 0.1, "AdamW": 2e-3}


def run(context: Context) -> Outcome:
    """Three arms, two optimizers, three seeds: test loss; then the product before use, against the factors."""
    train_x, train_y, test_x, test_y = fashion_mnist(context)
    count, steps = (1280, 20) if context.quick else (12_000, 600)
    data = _pixels(train_x[:count]), train_y[:count], _pixels(test_x), test_y
    outcome = Outcome(
        "structured-ffn",
        f"Fashion-MNIST, {count} training images, MLP 784-256-256-256-256-256-10 with GELU, the four inner layers dense, of "
        f"rank {RANK}, or of rank {RANK} with a guide for half of {steps} steps; batch {BATCH}, gradient norm clipped at 1",
    )
    for name in RATES:
        losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for seed in (0,) if context.quick else (0, 1, 2):
            for arm in ARMS:
                start = time.process_time()
                loss, accuracy = _train(name, arm, seed, steps, data)
                losses[arm].append(loss)
                row = {"optimizer": name, "seed": seed, "arm": arm, "test_loss": round(loss, 4), "accuracy": round(accuracy, 4)}
                outcome.rows.append({**row, "cpu_seconds": round(time.process_time() - start, 1)})
                context.say(f"{name}, seed {seed}, {arm}: test loss {loss:.4f}")
        outcome.checks += _checks(name, losses)
    for kind, error in _pre_merged().items():
        outcome.rows.append({"arm": f"pre-merged {kind}", "relative_error": error})
        outcome.checks.append(Check(f"pre-merged {kind}, error relative to the factors", error, "<=", 1e-5))
    outcome.notes += [
        "The training dynamics on one small task, not the paper's language models: perplexity and speed were not repeated.",
        "Equal steps, not equal compute: a step with the guide costs more.",
    ]
    return outcome


def _checks(name: str, losses: dict[str, list[float]]) -> list[Check]:
    mean = {arm: statistics.mean(values) for arm, values in losses.items()}
    worst = max(a - b for a, b in zip(losses["self-guided"], losses["low rank"], strict=True))
    best = min(*losses["self-guided"], *losses["low rank"])
    return [
        Check(f"{name}: self-guided less low rank, worst seed", worst, "<=", 0.0),
        Check(f"{name}: mean test loss, self-guided", mean["self-guided"], "<=", mean["low rank"] - 0.01),
        Check(f"{name}: test loss, dense, worst seed", max(losses["dense"]), "<=", best),
    ]


def _train(name: str, arm: str, seed: int, steps: int, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Test loss and accuracy after the last step."""
    train_x, train_y, test_x, test_y = data
    model = _mlp(arm, seed)
    optimizer = _optimizer(name, model)
    guide = SelfGuide(model, optimizer, total_steps=steps, seed=seed) if arm == "self-guided" else None
    order = stream(seed, "order")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES[name] * _schedule(step, steps)
        rows = torch.randint(len(train_x), (BATCH,), generator=order)
        F.cross_entropy(model(train_x[rows]), train_y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if guide is not None:
            guide.step()
    if guide is not None:
        guide.finish()
    with torch.no_grad():
        logits = model(test_x)
        return float(F.cross_entropy(logits, test_y)), float((logits.argmax(1) == test_y).float().mean())


def _mlp(arm: str, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        layers: list[nn.Module] = [nn.Linear(784, WIDTH), nn.GELU()]
        for _ in range(4):
            if arm == "dense":
                inner: Any = nn.Linear(WIDTH, WIDTH)
                nn.init.normal_(inner.weight, std=WIDTH**-0.5)
                nn.init.zeros_(inner.bias)
            else:
                inner = LowRank(WIDTH, WIDTH, rank=RANK, init="svd")
            layers += [inner, nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)


def _schedule(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def _pixels(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.286) / 0.353


@torch.no_grad()
def _pre_merged() -> dict[str, float]:
    """Largest difference between the dense weight and the factors for 16 rows, relative to the largest output, float32."""
    generator, found = stream(0, "pre-merged"), {}
    x = torch.randn(16, 768, generator=generator)
    how: Any = {"generator": generator}
    layers = {
        "LowRank": LowRank(768, 3072, rank=256, init="svd", **how),
        "BlockDense": BlockDense(768, 3072, **how),
        "BlockShuffle": BlockShuffle(768, 3072, **how),
        "Monarch": Monarch(768, 3072, **how),
    }
    for kind, layer in layers.items():
        few, many = (PreMerged(layer.eval(), max_tokens=limit)(x) for limit in (16, 15))
        found[kind] = float((few - many).abs().max() / many.abs().max())
    return found
