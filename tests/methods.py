"""Small hyperparameters for every method of the catalogue: the one table that tests over all methods, and `bench`, use.

Most methods need no entry: `row(name)` derives what their kind needs. An entry holds what differs, and `why` if its
options do not say it.

`small(name)` is the method for layers of width 16 or more; `busy(name)` lets its schedule act within eight steps as well;
`tiny(name)` is its class for layers of width 8 that several processes train; `large(name)` is what `bench` measures.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lowdim.adapters import ModelMethod
from lowdim.catalogue import Variant, variant, variants
from lowdim.methods import strategy_for, with_options

__all__ = ["ADAPTERS", "LAYERED", "METHODS", "TABLE", "Small", "busy", "large", "row", "small", "tiny"]


@dataclass(frozen=True)
class Small:
    """What one method needs that does not follow from its kind.

    Attributes:
        options: in addition to those of its catalogue row; None for those that its kind gives.
        busy: further ones, with which all of its schedule happens within eight steps.
        tiny: adapters, with two processes that must agree on each number: options of the class, in addition to rank 2.
        large: adapters, in `bench`: options of the class, in addition to rank 8.
        start: the largest distance of the first logits from the model's own; None if it approximates the weights.
        shapes: whether a forecast allocates the shapes that are trained; False if the weights' numbers determine them.
        decomposes: its start takes long on a large layer and does not change the time of a step.
        slow_by_formula: why its formula cannot be as fast as LoRA with as many numbers; empty if it can.
        why: the reason for what differs from other rows.
    """

    options: dict[str, Any] | None = None
    busy: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    large: dict[str, Any] = field(default_factory=dict)
    start: float | None = 1e-5
    shapes: bool = True
    decomposes: bool = False
    slow_by_formula: str = ""
    why: str = ""


#: Only what differs from what `row` derives.
TABLE: dict[str, Small] = {
    "lora": Small(busy={"dropout": 0.1}),
    "lamda": Small(
        busy={"freeze_fraction": 0.75},
        tiny={"rank": 3, "total_steps": 12},
        large={"rank": 32},
        decomposes=True,
        why="B is frozen column by column in the steps 2 to 7",
    ),
    "lamda++": Small({"rank": 4, "rank_choices": (2, 4, 6)}, shapes=False, why="its ranks follow from the weights' spectra"),
    "randlora": Small(tiny={"rank": 3}, large={"rank": 32}),
    "svfit": Small({"rank": 8}, tiny={"rank": 3}, large={"rank": 64}, decomposes=True),
    "loldu": Small({"rank": 8, "alpha": 8}, tiny={"rank": 4, "alpha": 4.0}, large={"rank": 64}, decomposes=True),
    "lora-sb": Small(
        large={"rank": 32},
        decomposes=True,
        start=0.05,
        why="it starts from its estimate of the first full step, which is small and not 0",
    ),
    "lora-xs": Small(tiny={"init_std": 0.1}, large={"rank": 32}, decomposes=True),
    "said": Small(
        {"dimension": 400},
        large={"dimension": 2000},
        slow_by_formula="two Hadamard transforms over all entries of the weight in each pass",
    ),
    "block-lora": Small({"rank": 4, "blocks": 2}, {"dropout": 0.1}, tiny={"rank": 4, "blocks": 2}, large={"blocks": 4}),
    "corda": Small(decomposes=True),
    "diffora": Small(
        tiny={"share": False, "target_modules": ["first", "second"]},
        large={"target_modules": ["0"]},
        start=None,
        shapes=False,
        why="it has searched, and so trained, before the first step; FSDP2 by layer has no shared parameters",
    ),
    "sara": Small(
        busy={"progressive_iter": 4, "lambda_rank": 1e-3, "nuclear_min_dim": 16, "nuclear_min_count": 1},
        tiny={"threshold": 0.1, "progressive_iter": 4, "lambda_rank": 1e-2, "nuclear_min_dim": 4, "nuclear_min_count": 2},
        shapes=False,
        slow_by_formula="it trains entries of the dense weight: its gradient costs a third product of the layer's size",
        why="the weights' numbers determine which are trained",
    ),
    "sora": Small(
        busy={"threshold": 2e-3, "schedule": "linear", "max_threshold": 1e-2, "schedule_interval": 2},
        tiny={"rank": 3, "threshold": 2e-2},
    ),
    "nola": Small(
        {"rank": 4, "num_bases": 16},
        tiny={"num_bases": 12},
        large={"num_bases": 64},
        slow_by_formula="it draws 64 random bases again in each pass",
    ),
    "increlora": Small(
        {"rank": 1, "target_rank": 3},
        {"init_warmup": 1, "update_interval": 2},
        tiny={"rank": 1, "target_rank": 2, "rank_step": 1, "alpha": 8, "top_h": 2, "init_warmup": 1, "update_interval": 2},
        large={"target_rank": 9},
        slow_by_formula="its score needs the gradient of the dense update, a third product of the layer's size",
    ),
    "loram": Small(tiny={"ratio": 0.5}),
    "s2ft": Small({"ratio": 0.2}, tiny={"ratio": 0.4}, large={"ratio": 0.02}),
    "flora": Small({"ranks": 4}, {"dropout": 0.1}, tiny={"ranks": 3}, large={"ranks": 8}),
    "dct": Small({"rank": 8, "update_interval": 2}),
    "low-rank-restart": Small(busy={"interval": 3, "recovery_steps": 2}, start=None),
    "q-galore": Small(start=2e-3, why="weights of eight bits are rounded"),
    "monarch": Small({"nblocks": 2}, start=None),
    "sst": Small(busy={"steps_per_iteration": 3, "warmup": 1}, why="it decomposes the whole weight, which stays as it is"),
    "maestro": Small(busy={"shrink_interval": 3}, why="it decomposes the whole weight, which stays as it is"),
}

#: The methods of the catalogue.
METHODS = list(variants())

#: Rank, and steps between two refreshes, of a small method of each kind.
_RANKS = {"adapter": 4, "optimizer": 8, "layer": 8}
_REFRESH = 3


def row(name: str) -> Small:
    """The method's entry, with what its kind gives."""
    chosen = variant(name)
    found = TABLE.get(name, Small(start=None if chosen.kind == "layer" else 1e-5))  # structured layers approximate
    if found.options is not None:
        return found
    strategy = strategy_for(chosen)
    options = {"rank": _RANKS[chosen.kind]} if "rank" in strategy.option_names() else {}
    if strategy.refresh_interval is not None:
        options[strategy.refresh_interval] = _REFRESH
    return replace(found, options=options)


def small(name: str, **options: Any) -> Variant:
    """The method with its small options, and further ones."""
    return with_options(variant(name), {**row(name).options, **options})


def busy(name: str) -> dict[str, Any]:
    """All options under which it does what it does within eight steps."""
    return {**row(name).options, **row(name).busy}


def _adapters() -> dict[str, str]:
    """Class name -> the first method that is trained with it."""
    found: dict[str, str] = {}
    for name, chosen in variants().items():
        if chosen.kind == "adapter":
            found.setdefault(chosen.build().__name__, name)
    return found


#: Adapters by the names of their classes.
ADAPTERS = _adapters()
#: Those of them that act layer by layer.
LAYERED = [name for name, method in ADAPTERS.items() if not issubclass(variant(method).build(), ModelMethod)]


def _method(name: str, rank: int, options: dict[str, Any]) -> Any:
    cls = variant(ADAPTERS[name]).build()
    usual = {"rank": rank, "dropout": 0.0}
    known = strategy_for(variant(ADAPTERS[name])).option_names()
    return cls(**{**{option: value for option, value in usual.items() if option in known}, **options})


def tiny(name: str, **options: Any) -> Any:
    """The adapter of this class for layers of width 8; nothing in a pass is drawn at random."""
    return _method(name, 2, {**row(ADAPTERS[name]).tiny, **options})


def large(name: str, **options: Any) -> Any:
    """The adapter of this class for layers of width 576 or more; nothing in a pass is dropped at random."""
    return _method(name, 8, {**row(ADAPTERS[name]).large, **options})
