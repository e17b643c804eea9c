"""S²FT against LoRA of its size: what is learnt, and what of the old is left; and two adapters fused by addition."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import lowdim
from lowdim.adapters import S2FT, LoRA
from lowdim.linalg import stream
from lowdim.reproduce.settings.digits import Digits
from lowdim.reproduce.settings.forgetting import learn_new, over_seeds, table
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

SIZES, CHANNELS, RANK, RATE, SAMPLES = (64, 256, 10), 26, 4, 1e-2, 200
LAYERS = {"0": "out", "2": "in"}  # the layer before and the one after the hidden channels


def run(context: Context) -> Outcome:
    """Digits 5-9, learnt by a network that knows 0-4, on a tenth of its hidden channels or with LoRA of rank 4."""
    runs = over_seeds(context, SIZES, _once)
    means, rows = table(runs, ("S²FT", "LoRA"))
    return Outcome(
        "s2ft",
        "Digits, MLP 64-256-10 trained on 0-4 (300 AdamW steps at 1e-3), then 200 AdamW steps at 1e-2 on 200 samples of 5-9; "
        "S²FT: 26 random hidden channels, rows of the first layer and columns of the second; LoRA rank 4, alpha 8; 900 "
        "training samples for 0-4, 5 seeds. New digits: accuracy among all ten; old digits: among 0-4.",
        rows=rows,
        checks=[
            Check("old digits, S²FT minus LoRA", means["S²FT old"] - means["LoRA old"], ">=", 0.1),
            Check("new digits, S²FT minus LoRA", means["S²FT new"] - means["LoRA new"], ">=", 0.0),
            Check("two adapters on disjoint channels fuse to their sum, bit for bit", min(f["fused"] for f in runs), ">=", 1.0),
        ],
        notes=[
            "The paper's margin over full fine-tuning is not part of the verdict: at this size full fine-tuning at a rate of "
            "its own does not stay behind.",
        ],
    )


def _once(model: nn.Module, data: Digits, seed: int, steps: int) -> dict[str, float]:
    order = torch.randperm(SIZES[1], generator=stream(seed, "s2ft", "channels"))
    first, second = order[:CHANNELS].tolist(), order[CHANNELS : 2 * CHANNELS].tolist()
    one, scores = _learn(model, first, data, seed, steps)
    other, _ = _learn(model, second, data, seed + 1, steps)
    lora = lowdim.adapt(copy.deepcopy(model), LoRA(rank=RANK, alpha=2 * RANK), seed=seed)
    return {
        "fused": float(all(_fuse(one[name], other[name]) for name in LAYERS)),
        **dict(zip(("S²FT new", "S²FT old", "S²FT numbers"), scores)),
        **dict(zip(("LoRA new", "LoRA old", "LoRA numbers"), learn_new([lora], data, seed, steps, RATE, SAMPLES))),
    }


def _learn(model: nn.Module, channels: list[int], data: Digits, seed: int, steps: int) -> tuple[dict[str, Any], Any]:
    """The trained layers, and their scores."""
    model = copy.deepcopy(model)
    both = [lowdim.adapt(model, S2FT(axis=axis, indices={name: channels})) for name, axis in LAYERS.items()]
    scores = learn_new(both, data, seed, steps, RATE, SAMPLES)
    return {name: layer for adapted in both for name, layer in adapted.layers.items()}, scores


@torch.no_grad()
def _fuse(one: Any, other: Any) -> bool:
    """Whether one adapter on the channels of both, with the numbers of both, is the sum of the two, bit for bit."""
    parts, dim = (one.update, other.update), int(one.update.axis == "in")
    channels = torch.cat([part.indices for part in parts])
    union: Any = S2FT(axis=parts[0].axis, indices=channels).attach(one.base).update
    union.s2.copy_(torch.cat([part.s2 for part in parts], dim).index_select(dim, torch.argsort(channels)))
    return bool(torch.equal(union.delta(), one.delta() + other.delta()))
