"""Learning against forgetting on digits: a network that knows 0-4 learns 5-9 (SaRA and S²FT)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lowdim.reproduce.settings.digits import Digits, accuracy, digits, fit, mlp
from lowdim.reproduce.settings.outcome import Context

__all__ = ["learn_new", "over_seeds", "scores", "table"]

OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def over_seeds(
    context: Context, sizes: Sequence[int], once: Callable[[nn.Module, Digits, int, int], dict[str, float]]
) -> list[dict[str, float]]:
    """`once(network, data, seed, steps)` for each seed, the network trained on 0-4 with AdamW at 1e-3."""
    seeds, pretraining, steps = (range(1), 60, 40) if context.quick else (range(5), 300, 200)
    runs = []
    for seed in seeds:
        data = digits(seed)
        old, model = data.only(OLD), mlp(sizes, seed)
        fit(model, model.parameters(), old.x, old.y, steps=pretraining, lr=1e-3, seed=seed)
        before = dict(zip(("new before", "old before"), scores(model, data)))
        runs.append({**before, **once(model, data, seed, steps)})
        context.say(f"seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in runs[-1].items()))
    return runs


def learn_new(
    adapted: Sequence[Any], data: Digits, seed: int, steps: int, lr: float, samples: int | None = None
) -> tuple[float, float, int]:
    """Train all adapters of a model on (the first `samples` of) 5-9; returns accuracies and the number of parameters."""
    new = data.only(NEW)
    trained = {name: p for one in adapted for name, p in one.trainable().items()}

    def after(optimizer: Any) -> None:
        for one in adapted:
            one.step(optimizer)

    fit(
        adapted[0].model,
        trained.values(),
        new.x[:samples],
        new.y[:samples],
        steps=steps,
        lr=lr,
        seed=seed,
        penalty=lambda: sum(one.regularizer() for one in adapted),
        after=after,
    )
    return *scores(adapted[0].model, data), sum(p.numel() for p in trained.values())


def scores(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Accuracy on held-out 5-9 among all ten classes, and on held-out 0-4 where only those five compete."""
    new, old = data.only(NEW), data.only(OLD)
    return accuracy(model, new.test_x, new.test_y), accuracy(model, old.test_x, old.test_y, OLD)


def table(runs: list[dict[str, float]], names: Sequence[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Means over seeds, and a row for each method from its keys `"NAME new"`, `"NAME old"` and `"NAME numbers"`."""
    means = {key: statistics.mean(found[key] for found in runs) for key in runs[0]}
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "new digits": round(means[f"{name} new"], 4),
            "old digits": round(means[f"{name} old"], 4),
            "trained numbers": round(means[f"{name} numbers"]),
        }
        for name in names
    ]
    before = {"method": "before", "new digits": round(means["new before"], 4), "old digits": round(means["old before"], 4)}
    return means, [*rows, {**before, "trained numbers": 0}]
