"""SaRA against LoRA of its size: what is learnt, and what of the old is left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import lowdim
from lowdim.adapters import LoRA, SaRA
from lowdim.reproduce.settings.digits import Digits, accuracy
from lowdim.reproduce.settings.forgetting import OLD, learn_new, over_seeds, table
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

SIZES, SHARE, RANK, RATE, PENALTY = (64, 96, 96, 10), 0.2, 8, 5e-3, 5e-4


def run(context: Context) -> Outcome:
    """Digits 5-9, learnt by a network that knows 0-4, with the 20 % smallest weights or with LoRA of rank 8."""
    runs = over_seeds(context, SIZES, _once)
    means, rows = table(runs, ("SaRA", "LoRA"))
    return Outcome(
        "sara",
        "Digits, MLP 64-96-96-10 trained on 0-4 (300 AdamW steps at 1e-3), then 200 AdamW steps at 5e-3 on 5-9; SaRA: "
        "threshold at the 20 % quantile of |W|, selected again after step 100, lambda_rank 5e-4; LoRA rank 8, alpha 16; 900 "
        "training samples, 5 seeds. New digits: accuracy among all ten; old digits: among 0-4.",
        rows=rows,
        checks=[
            Check("old digits, SaRA minus LoRA", means["SaRA old"] - means["LoRA old"], ">=", 0.2),
            Check("new digits, SaRA minus LoRA", means["SaRA new"] - means["LoRA new"], ">=", -0.03),
            Check("largest loss of accuracy by zeroing the smallest 10 %", max(f["lost"] for f in runs), "<=", 0.005),
        ],
        notes=[
            f"Half-way {means['left']:.0%} of SaRA's entries had grown beyond the threshold and were held from then on.",
            "One rate for both, at which SaRA learns well; LoRA's was not tuned.",
        ],
    )


def _once(model: nn.Module, data: Digits, seed: int, steps: int) -> dict[str, float]:
    old, pruned = data.only(OLD), _without_smallest(model, 0.1)
    found = {"lost": accuracy(model, old.test_x, old.test_y) - accuracy(pruned, old.test_x, old.test_y)}
    methods = {
        "SaRA": SaRA(_quantile(model, SHARE), progressive_iter=steps // 2, lambda_rank=PENALTY),
        "LoRA": LoRA(rank=RANK, alpha=2 * RANK),
    }
    for name, method in methods.items():
        adapted = lowdim.adapt(copy.deepcopy(model), method, seed=seed)
        scores = learn_new([adapted], data, seed, steps, RATE)
        found.update(zip((f"{name} new", f"{name} old", f"{name} numbers"), scores))
        if name == "SaRA":
            updates: list[Any] = [layer.update for layer in adapted.layers.values()]
            found["left"] = sum(int((~u.active).sum()) for u in updates) / found["SaRA numbers"]
    return found


def _quantile(model: nn.Module, share: float) -> float:
    """The size below which `share` of the weights lie."""
    sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in model.modules() if isinstance(layer, nn.Linear)])
    return float(torch.quantile(sizes, share))


@torch.no_grad()
def _without_smallest(model: nn.Module, share: float) -> nn.Module:
    pruned, edge = copy.deepcopy(model), _quantile(model, share)
    for layer in pruned.modules():
        if isinstance(layer, nn.Linear):
            layer.weight[layer.weight.abs() < edge] = 0.0
    return pruned
