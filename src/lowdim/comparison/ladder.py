"""The sizes at which methods are compared: ranks that give them like cost.

The budgets are those of LoRA at its row's rank times 1, 1/4, 4, 1/16. Every other adapter with a rank gets the rank whose
trained parameters (or forecast peak memory) are nearest, and no rank above the smaller side of the largest layer. Optimizers
and layers with a rank, which train the whole model, have their own rank times the same factors; from random weights structured
layers are sized like the dense ones (`lowdim.comparison.costs`). A method without a rank has one size.

Parameters follow a power law of the rank, `p(r) = head + c r^k` (k is 1 for LoRA, 2 for LoRA-XS, below 0 for RandLoRA, whose
bases become fewer), and memory a line: two ranks give the third, which is measured on tensors without memory.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lowdim.catalogue import Variant, variant
from lowdim.methods import Setup, strategy_for
from lowdim.surgery import find_layers, is_linear, matrix_shape

if TYPE_CHECKING:
    from lowdim.comparison.workbench import Workbench
    from lowdim.methods import Applied

__all__ = [
    "FACTORS",
    "Ladder",
    "build_ladder",
    "largest_rank",
    "matched",
    "memory_counter",
    "own_rank",
    "parameter_counter",
    "parameters_of",
    "sized",
    "without_memory",
]

#: Of LoRA's rank, or the method's own, in the order in which they are tried.
FACTORS = (1.0, 0.25, 4.0, 1 / 16)
_CLOSE = 0.05  # of the budget: no other rank is looked for
_TRIES = 3  # ranks that are measured beside the first two
_NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)  # where a rank is no multiple of what it must be

Measure = Callable[[Variant], float]


@dataclass
class Ladder:
    """Ranks by method (`None`: a method without one), why methods are left out, and remarks.

    Attributes:
        sizes: method -> its ranks, without those that are equal.
        skipped: method -> why it cannot train this model.
        notes: of ranks that the layers do not allow.
    """

    sizes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sized(chosen: Variant, size: int | None) -> Variant:
    """The method at this rank, or with this number of blocks where a layer has them alone.

    Example:
        >>> from lowdim.catalogue import variant
        >>> from lowdim.comparison.ladder import sized
        >>> dict(sized(variant("lora"), 2).options)
        {'rank': 2, 'alpha': 16}
    """
    changed = None if size is None else strategy_for(chosen).at_rank(size)
    if changed is None and size is not None and chosen.kind == "layer" and "nblocks" in chosen.options:
        return replace(chosen, options={**chosen.options, "nblocks": size})
    return chosen if changed is None else changed


def own_rank(chosen: Variant) -> int | None:
    """The rank of the method's row, or its class's; None for methods without one."""
    if strategy_for(chosen).at_rank(8) is None:
        return None
    given = chosen.options.get("rank", chosen.options.get("ranks"))
    if given is None:
        names = inspect.signature(chosen.build()).parameters
        given = names["rank"].default if "rank" in names else None
    return given if isinstance(given, int) else 8


def largest_rank(model: nn.Module, head: Sequence[str] = ()) -> int:
    """The smaller side of the largest linear layer outside the head; no update has a higher rank."""
    inside = tuple(f"{name}." for name in head)
    layers = find_layers(model, None, accept=is_linear)
    sides = [min(matrix_shape(layer)) for name, layer in layers.items() if not f"{name}.".startswith(inside or ("\0",))]
    return max(sides, default=1)


def build_ladder(
    chosen: Sequence[Variant],
    sizes: int,
    equal: str,
    limit: int,
    measure: Measure,
    fixed: int = 0,
    match: Callable[[Variant], list[int] | None] = lambda each: None,
) -> Ladder:
    """The ranks of every method.

    Args:
        equal: `"parameters"`, `"memory"` or `"none"`.
        limit: the highest rank that the layers allow.
        measure: what is made equal, of a method at its rank.
        fixed: the part of it that no rank changes (the head's parameters).
        match: the sizes of a method that is sized by something else than LoRA; None for the others.

    Raises:
        ValueError: LoRA, by which the others are sized, cannot train the model at any of these ranks.
    """
    ladder, budgets = Ladder(), None
    lora = variant("lora")
    for each in chosen:
        own = own_rank(each)
        try:
            if (other := match(each)) is not None:
                ladder.sizes[each.name] = tuple(other)
                continue
            if own is None:
                if equal != "memory" and each.kind == "adapter":
                    measure(each)  # a model that it cannot train
                found: list[int] = []
            elif each.kind != "adapter" or equal == "none" or each.name == "lora":
                found = _multiples(own, sizes, limit)
                measure(sized(each, found[0]))
            else:
                if budgets is None:
                    ranks = _multiples(own_rank(lora) or 8, sizes, limit)
                    budgets = {rank: measure(sized(lora, rank)) - fixed for rank in ranks}
                found = matched(each, budgets, limit, lambda v: measure(v) - fixed, line=equal == "memory")
        except (ValueError, TypeError) as error:
            ladder.skipped[each.name] = str(error)
            continue
        ladder.sizes[each.name] = tuple(found) or (None,)
        wanted = sizes if own is not None else 1
        if len(found) < wanted and own is not None:
            ladder.notes.append(
                f"{each.label} has {len(found)} of {sizes} sizes: the layers allow ranks up to {limit}; others cost the same"
            )
    return ladder


def _multiples(own: int, sizes: int, limit: int) -> list[int]:
    return list(dict.fromkeys(min(limit, max(1, round(own * factor))) for factor in FACTORS[:sizes]))


def matched(each: Variant, budgets: Mapping[int, float], limit: int, measure: Measure, *, line: bool) -> list[int]:
    """For each budget the rank that comes nearest; the rank that stands with a budget is tried first."""
    known: dict[int, float] = {}

    def look(wanted: int) -> bool:
        """Measure at this rank, or the next one that the method allows; False: nothing new."""
        for rank in (wanted + step for step in _NEIGHBOURS):
            if rank in known:
                return False
            if 1 <= rank <= limit:
                try:
                    known[rank] = measure(sized(each, rank))
                except ValueError as error:
                    if not any(word in str(error) for word in ("multiple", "divide")):
                        raise
                else:
                    return True
        return False

    found = []
    for rank, budget in budgets.items():
        look(rank)
        if len(known) == 1 and not _near(next(iter(known.values())), budget):
            look(max(1, rank // 2) if rank > 1 else min(2, limit))
        for _ in range(_TRIES):
            best = _nearest(known, budget)
            further = None if _near(known[best], budget) else _solved(known, best, budget, line)
            if further is None or not look(min(limit, further)):
                break
        found.append(_nearest(known, budget))
    flat = len(set(known.values())) == 1 and len(known) > 1
    if flat:  # no rank changes the cost
        found = _multiples(own_rank(each) or 8, len(budgets), limit)
    return list(dict.fromkeys(found))


def _near(value: float, budget: float) -> bool:
    return abs(value - budget) <= _CLOSE * abs(budget)


def _nearest(known: dict[int, float], budget: float) -> int:
    """The rank with the smallest relative distance; of equal ones the lowest."""
    return min(sorted(known), key=lambda rank: abs(math.log(max(known[rank], 1) / max(budget, 1))))


def _solved(known: dict[int, float], best: int, budget: float, line: bool) -> int | None:
    """The rank at which the law through the best rank and its neighbour meets the budget."""
    others = [rank for rank in known if rank != best and known[rank] != known[best]]
    if not others:
        return None
    other = min(others, key=lambda rank: abs(math.log(rank / best)))
    if line:
        rank = best + (budget - known[best]) * (other - best) / (known[other] - known[best])
    else:
        values = [max(1.0, value) for value in (known[best], known[other], budget)]
        power = math.log(values[1] / values[0]) / math.log(other / best)
        if not power:
            return None
        exponent = math.log(values[2] / values[0]) / power
        rank = best * math.exp(min(20.0, max(-20.0, exponent)))
    return max(1, round(rank)) if math.isfinite(rank) else None


@contextmanager
def parameter_counter(model: nn.Module, head: Sequence[str], scratch: bool) -> Iterator[Measure]:
    """Counts the trained parameters of a method on copies of the model without memory."""
    with without_memory(model, head, scratch) as prepare:
        yield lambda each: prepare(each).trained()


@contextmanager
def without_memory(model: nn.Module, head: Sequence[str], scratch: bool) -> Iterator[Callable[[Variant], Applied]]:
    """Applies methods to copies of the model without memory."""
    from lowdim.plan.fake import fake_memo, fake_mode

    with fake_mode() as mode:
        memo = fake_memo(model, mode)

        def prepare(each: Variant) -> Applied:
            for parameter in model.parameters():
                memo[id(parameter)].requires_grad_(parameter.requires_grad)
            setup = Setup(lr=each.rates[0], steps=100, head=tuple(head), initialise=False, scratch=scratch)
            return strategy_for(each).apply(copy.deepcopy(model, dict(memo)), setup)

        yield prepare


def parameters_of(model: nn.Module, head: Sequence[str]) -> int:
    """The number of parameters of the head."""
    return sum(p.numel() for name in head for p in model.get_submodule(name).parameters())


def memory_counter(bench: Workbench, **how: Any) -> Measure:
    """The forecast peak of training by a method."""
    return lambda each: bench.forecast(each, **how).total
