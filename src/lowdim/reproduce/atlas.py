"""aTLAS on digits: a task composed of others, with one coefficient for each block against one for each task vector."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowdim
from lowdim.adapters import ATLAS, task_vector
from lowdim.reproduce.settings.digits import Digits, accuracy, digits, fit, mlp
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

SHOTS, TEST = 3, 800
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda images: torch.rot90(images, 1, (1, 2)),
    "inverted": lambda images: 1 - images,
    "rolled": lambda images: torch.roll(images, 1, 2),
    "mirrored": lambda images: images.flip(2),
}


def run(context: Context) -> Outcome:
    """Task vectors for four changes of the digits, composed for rotated and inverted ones from three samples of each class."""
    seeds = range(1) if context.quick else range(5)
    scores: dict[str, list[float]] = {}
    trained: dict[str, int] = {"zero-shot": 0}
    for seed in seeds:
        context.say(f"seed {seed}")
        data = digits(seed)
        base = _base(context, data, seed)
        vectors = [_tuned(context, base, data.map(change), seed) for change in TASKS.values()]
        target = data.map(lambda images: 1 - torch.rot90(images, 1, (1, 2)))
        rows = torch.cat([(target.y == digit).nonzero()[:SHOTS, 0] for digit in range(10)])
        test_x, test_y = target.test_x[:TEST], target.test_y[:TEST]
        scores.setdefault("zero-shot", []).append(accuracy(base, test_x, test_y))
        for name, blockwise in (("global", False), ("blockwise", True)):
            model = copy.deepcopy(base)
            adapted = lowdim.adapt(model, ATLAS(vectors, blockwise=blockwise))
            _learn(adapted, target.x[rows], target.y[rows], 10 if context.quick else 200)
            trained[name] = adapted.coef.numel()  # type: ignore[attr-defined]
            scores.setdefault(name, []).append(accuracy(adapted.merge(), test_x, test_y))
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    wins = sum(b > g for b, g in zip(scores["blockwise"], scores["global"]))
    return Outcome(
        "atlas",
        "scikit-learn digits, MLP 64-64-64-10 on 900 upright digits (400 steps), four fine-tunings (300 steps; rotated, "
        "inverted, rolled, mirrored); target rotated and inverted, 3 samples per class, 200 full-batch steps of AdamW 1e-1 "
        f"with decay 0.1, gradient norm at most 1; accuracy on {TEST} held-out digits, {len(seeds)} seeds.",
        rows=[
            {
                "coefficients": name,
                "trained numbers": trained[name],
                "test accuracy": round(mean[name], 4),
                "deviation over seeds": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
            }
            for name, values in scores.items()
        ],
        checks=[
            Check("accuracy, blockwise minus global", mean["blockwise"] - mean["global"], ">=", 0.05),
            Check("accuracy, blockwise minus zero-shot", mean["blockwise"] - mean["zero-shot"], ">=", 0.2),
        ],
        notes=[
            f"Blockwise is better in {wins} of {len(seeds)} seeds.",
            "A small network and a made-up target; CLIP, negation and addition were not run.",
        ],
    )


def _base(context: Context, data: Digits, seed: int) -> nn.Module:
    model = mlp((64, 64, 64, 10), seed)
    steps = 40 if context.quick else 400
    return fit(model, model.parameters(), data.x, data.y, steps=steps, lr=1e-3, seed=seed, weight_decay=0.01)


def _tuned(context: Context, base: nn.Module, data: Digits, seed: int) -> dict[str, Tensor]:
    model = copy.deepcopy(base)
    steps = 30 if context.quick else 300
    fit(model, model.parameters(), data.x, data.y, steps=steps, lr=1e-3, seed=seed, weight_decay=0.01)
    return task_vector(base, model)


def _learn(adapted: Any, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(adapted.param_groups(1e-1), weight_decay=0.1)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(adapted(x), y).backward()
            torch.nn.utils.clip_grad_norm_(list(adapted.trainable().values()), 1.0)
            optimizer.step()
            adapted.step(optimizer)
