"""What the adapters' vectors have in common: a layer, a loss and a few optimizer steps."""

from collections.abc import Callable

import torch
from torch import nn


def layer_of(case) -> nn.Linear:
    weight = case["W"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], "bias" in case, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if "bias" in case:
            layer.bias.copy_(case["bias"])
    return layer


def train(case, adapted, steps: int, check: Callable[[int], None], lr: float | None = None) -> None:
    """Run the case's optimizer on the mean squared error; `check(step)` follows each step."""
    how = case.hyperparameters
    decay = {"weight_decay": how["weight_decay"]} if "weight_decay" in how else {}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, how["optimizer"])(trained, lr=lr or how["lr"], **decay)
    for step in range(steps):
        optimizer.zero_grad()
        (adapted(case["x"]) - case["target"]).square().mean().backward()
        optimizer.step()
        adapted.update.step()
        check(step)
