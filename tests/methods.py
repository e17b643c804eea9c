"""Small hyperparameters for every method of the catalogue: the one table that tests over all methods use.

`small(name)` is the method for layers of width 16 or more; `busy(name)` lets its schedule act within eight steps as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lowdim.catalogue import Variant, variant, variants
from lowdim.methods import with_options

__all__ = ["METHODS", "TABLE", "Small", "busy", "small"]


@dataclass(frozen=True)
class Small:
    """One method's row.

    Attributes:
        options: beside those of its catalogue row.
        busy: further ones, under which everything that it does happens within eight steps.
        start: how far from the model's own the logits may be at the start; None where it approximates the weights.
        shapes: whether a forecast allocates the shapes that are trained; False where numbers of the weights decide them.
        why: the reason for what differs from other rows.
    """

    options: dict[str, Any] = field(default_factory=dict)
    busy: dict[str, Any] = field(default_factory=dict)
    start: float | None = 1e-5
    shapes: bool = True
    why: str = ""


TABLE: dict[str, Small] = {
    "linear-probe": Small(),
    "lora": Small({"rank": 4}, {"dropout": 0.1}),
    "full": Small(),
    "lamda": Small({"rank": 4}, {"freeze_fraction": 0.75}, why="B is frozen column by column in the steps 2 to 7"),
    "lamda++": Small({"rank": 4, "rank_choices": (2, 4, 6)}, shapes=False, why="its ranks follow from the weights' spectra"),
    "randlora": Small({"rank": 4}),
    "svfit": Small({"rank": 8}),
    "loldu": Small({"rank": 8, "alpha": 8}),
    "lora-sb": Small(
        {"rank": 4}, start=0.05, why="it starts from its estimate of the first full step, which is small and not 0"
    ),
    "lora-xs": Small({"rank": 4}),
    "said": Small({"dimension": 400}),
    "block-lora": Small({"rank": 4, "blocks": 2}, {"dropout": 0.1}),
    "corda": Small({"rank": 4}),
    "diffora": Small({"rank": 4}, start=None, shapes=False, why="it has searched, and so trained, before the first step"),
    "sara": Small(
        {},
        {"progressive_iter": 4, "lambda_rank": 1e-3, "nuclear_min_dim": 16, "nuclear_min_count": 1},
        shapes=False,
        why="the weights' numbers decide which are trained",
    ),
    "sora": Small({"rank": 4}, {"threshold": 2e-3, "schedule": "linear", "max_threshold": 1e-2, "schedule_interval": 2}),
    "nola": Small({"rank": 4, "num_bases": 16}),
    "allora": Small({"rank": 4}),
    "increlora": Small({"rank": 1, "target_rank": 3}, {"init_warmup": 1, "update_interval": 2}),
    "loram": Small({"rank": 4}),
    "s2ft": Small({"ratio": 0.2}),
    "flora": Small({"ranks": 4}, {"dropout": 0.1}),
    "dct": Small({"rank": 8, "update_interval": 2}),
    "fira": Small({"rank": 8, "update_interval": 3}),
    "low-rank": Small({"rank": 8}, start=None),
    "low-rank-restart": Small({"rank": 8}, {"interval": 3, "recovery_steps": 2}, start=None),
    "q-galore": Small({"rank": 8, "update_interval": 3}, start=2e-3, why="weights of eight bits are rounded"),
    "galore": Small({"rank": 8, "update_interval": 3}),
    "galore-8bit": Small({"rank": 8, "update_interval": 3}),
    "sltrain": Small({"rank": 8}, start=None),
    "monarch": Small({"nblocks": 2}, start=None),
    "sst": Small(
        {"rank": 8}, {"steps_per_iteration": 3, "warmup": 1}, why="it decomposes the whole weight, which stays as it is"
    ),
    "maestro": Small({}, {"shrink_interval": 3}, why="it decomposes the whole weight, which stays as it is"),
}

#: The methods of the catalogue; one that the table lacks fails a test.
METHODS = list(variants())


def small(name: str, **options: Any) -> Variant:
    """The method with its small options, and further ones."""
    return with_options(variant(name), {**TABLE[name].options, **options})


def busy(name: str) -> dict[str, Any]:
    """All options under which it does what it does within eight steps."""
    return {**TABLE[name].options, **TABLE[name].busy}
