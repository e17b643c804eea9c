"""Before the first run: the methods that can be compared, their sizes and forecasts, and the model that all start from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowdim.catalogue import BASELINES, FAMILIES, Variant, methods
from lowdim.comparison.by_layer import enter_twins, give_sizes, measure_exponents, without_twins
from lowdim.comparison.clock import Clock
from lowdim.comparison.costs import Costs, DenseMatch, costs_of
from lowdim.comparison.ladder import (
    Ladder,
    build_ladder,
    largest_rank,
    memory_counter,
    parameter_counter,
    parameters_of,
    sized,
    without_memory,
)
from lowdim.comparison.runs import Contest
from lowdim.comparison.search import rungs_of
from lowdim.comparison.settings import DEFAULT_METHODS, TRAINING_METHODS, CompareSettings
from lowdim.comparison.workbench import Workbench, recipe_of
from lowdim.errors import LowdimError
from lowdim.methods import strategy_for
from lowdim.records import MeasuredRate
from lowdim.train.keeping import kept_by
from lowdim.train.measuring import refuse_broken
from lowdim.train.neighbours import padding_note
from lowdim.units import format_bytes

__all__ = ["Field", "choose_methods", "find_sizes", "make_contest"]

#: Settings that decide which runs there are, and not what one of them gives.
_INDECISIVE = (
    *(
        "seeds",
        "rates",
        "sizes",
        "equal",
        "search",
        "prefer",
        "report_to",
        "time_limit",
        "budget",
        "methods",
        "workers",
        "ray",
        "ranks",
    ),
)

_EQUAL_IN = {"parameters": "parameters", "flops": "FLOPs"}

Say = Callable[[str, str], None]


@dataclass
class Field:
    """Who takes part.

    Attributes:
        chosen: all methods of the table, in order.
        skipped: method -> why it is left out.
        sizes: method -> its ranks.
        notes: on the sizes.
        costs: parameters and FLOPs by method and rank; from random weights.
        measured: rates from curvature, where they are asked for.
        exponents: layer -> tail exponent of the base, where a method has ranks by layer.
        plain: labels of the methods without ranks by layer, where such rows are asked for.
    """

    chosen: list[Variant]
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    costs: dict[tuple[str, int | None], Costs] = field(default_factory=dict)
    measured: list[MeasuredRate] = field(default_factory=list)
    exponents: dict[str, float] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)

    @property
    def able(self) -> dict[str, Variant]:
        """The methods that are compared."""
        return {each.name: each for each in self.chosen if each.name not in self.skipped}


def choose_methods(settings: CompareSettings, bench: Workbench) -> Field:
    """The methods by their names. Baselines stand in every comparison unless its methods are named one by one.

    Raises:
        UnknownNameError: no such method.
        ValueError: none of them makes sense for the task, or ranks by layer are asked for and none has them.
    """
    words = settings.methods or tuple((TRAINING_METHODS if bench.scratch else DEFAULT_METHODS).split(","))
    named = methods(",".join(words))
    if not settings.methods or any(word.strip() in (*FAMILIES, "all", "training") for word in words):
        named = list({each.name: each for each in (*BASELINES, *named)}.values())
        asked = {each.name for each in methods(",".join(words))} if settings.methods else set()
        named = [each for each in named if each.name in asked or bench.unfit(each) is None]
    unfit = {each.name: reason for each in named if (reason := _unfit(each, bench, settings.quantize)) is not None}
    if len(unfit) == len(named):
        raise ValueError(f"--methods {','.join(words)}: {'; '.join(dict.fromkeys(unfit.values()))}")
    entered = Field(named, unfit)
    if settings.ranks == "farms":
        enter_twins(entered)
    return entered


def _unfit(variant: Variant, bench: Workbench, quantize: str | None) -> str | None:
    """Why a method is left out: it makes no sense for the task, or cannot take a base in few bits."""
    refused = None if quantize is None else strategy_for(variant).refuses_quantized()
    return bench.unfit(variant) or refused


def make_contest(settings: CompareSettings, bench: Workbench, folder: Path, say: Say) -> Contest:
    """The model that all runs start from, with a fitted head, and what decides their numbers."""
    from lowdim.train.head import fit_head, head_sentence

    model, task = bench.load(), bench.task
    parts = bench.fingerprint(model)
    head = bench.head(model)
    if torch.cuda.is_available():
        model.cuda()
    if (note := padding_note(model, task)) is not None:
        task.notes = (*task.notes, note)
        say("note", note)
    untouched = task.score(model, task.test, bench.metric) if bench.answers(model) else None
    unscored = untouched is None or math.isnan(untouched.value)
    if unscored:
        refuse_broken(model, settings.model)
    samples = [] if unscored else task.samples(model)
    kept = None if bench.source is None else kept_by(recipe_of(settings), task.processor, task.max_length)
    kept_before = math.nan if kept is None else kept.loss(model)
    score = fit_head(model, head, task)
    if score is not None:
        say("head", head_sentence(task, score))
    # Everything that decides a run's numbers, and nothing else (such as the number of seeds).
    decisive = {key: value for key, value in settings.to_dict().items() if key not in _INDECISIVE}
    digest = hashlib.blake2b(json.dumps([decisive, parts], sort_keys=True).encode(), digest_size=8)
    return Contest(
        model=model,
        task=task,
        head=head,
        metric=bench.metric,
        steps=settings.steps,
        batch_size=settings.batch_size,
        folder=folder,
        fingerprint=digest.hexdigest(),
        parts=parts,
        scratch=bench.scratch,
        optimizer=settings.optimizer,
        bf16=settings.bf16,
        group_by_length=settings.group_by_length,
        untouched=untouched,
        untouched_samples=samples,
        kept=kept,
        kept_before=kept_before,
        source=bench.source,
        label=bench.label,
    )


def find_sizes(settings: CompareSettings, bench: Workbench, contest: Contest, entered: Field, clock: Clock, say: Say) -> None:
    """Fill in the sizes of the methods, and leave out what cannot train the model or does not fit the budget.

    Raises:
        BudgetError: nothing fits.
        LowdimError: no method can train the model.
        ValueError: the time limit is too short for one rung, as far as it can be known.
    """
    measure_exponents(entered, contest)
    able, twins = without_twins(entered)
    how = {"steps": settings.steps, "batch_size": settings.batch_size}
    limit = largest_rank(contest.model, contest.head)
    if contest.scratch and settings.equal in ("parameters", "flops"):
        ladder = _like_dense(settings, contest, entered, able, limit)
    elif settings.equal == "memory":
        ladder = build_ladder(able, settings.sizes, "memory", limit, memory_counter(bench, **how))
    else:
        with parameter_counter(contest.model, contest.head, contest.scratch) as count:
            fixed = parameters_of(contest.model, contest.head)
            ladder = build_ladder(able, settings.sizes, settings.equal, limit, count, fixed)
    give_sizes(twins, ladder, contest)
    able += twins.values()
    if settings.budget is not None:
        _keep_within(settings.budget, bench, able, ladder, how)
    entered.sizes, entered.notes = ladder.sizes, [*entered.notes, *ladder.notes]
    entered.skipped |= ladder.skipped
    for each in able:
        if each.name in ladder.skipped:
            say("left out", f"{each.label}: {ladder.skipped[each.name]}")
    for note in ladder.notes:
        say("sizes", note)
    if not entered.able:
        raise LowdimError(f"no method can be run: {'; '.join(f'{k}: {v}' for k, v in entered.skipped.items())}")
    if clock.limit is not None:
        _check_time(settings, bench, entered, clock, how)


def _like_dense(settings: CompareSettings, contest: Contest, entered: Field, able: Sequence[Variant], limit: int) -> Ladder:
    """Structured layers at the cost of the dense ones; fills in what each method costs, and says it."""
    tokens = settings.batch_size * settings.max_length
    with without_memory(contest.model, contest.head, contest.scratch) as prepare:

        def measure(each: Variant) -> Costs:
            applied = prepare(each)
            return costs_of(applied.model, applied.trained(), tokens)

        match = DenseMatch(measure, settings.equal, contest.model, settings.sizes, limit)
        fixed = parameters_of(contest.model, contest.head)
        ladder = build_ladder(
            able, settings.sizes, "parameters", limit, lambda each: measure(each).parameters, fixed, match.sizes
        )
        for each in able:
            for size in ladder.sizes.get(each.name, ()):
                costs = entered.costs[each.name, size] = match.costs(sized(each, size))
                share = getattr(costs, settings.equal) / getattr(match.dense, settings.equal)
                what = each.label if size is None else f"{each.label} at size {size}"
                ladder.notes.append(f"{what}: {costs}; {share:.2f} of the dense model's {_EQUAL_IN[settings.equal]}")
    return ladder


def _keep_within(budget: int, bench: Workbench, able: Sequence[Variant], ladder: Ladder, how: Mapping[str, int]) -> None:
    """Take out the sizes whose forecast peak is above the budget."""
    from lowdim.plan import affordable

    outlooks = []
    for each in able:
        kept, least = [], None
        for size in ladder.sizes.get(each.name, ()):
            try:
                outlook = bench.forecast(sized(each, size), budget_bytes=budget, **how)
            except (ValueError, TypeError) as error:
                ladder.skipped[each.name] = str(error)
                break
            outlooks.append(outlook)
            least = outlook.total if least is None else min(least, outlook.total)
            if outlook.total <= budget:
                kept.append(size)
        if each.name in ladder.skipped or least is None:
            continue
        if not kept:
            ladder.skipped[each.name] = (
                f"needs {format_bytes(least)} at the peak by forecast; the budget is {format_bytes(budget)}"
            )
        elif len(kept) < len(ladder.sizes[each.name]):
            ladder.notes.append(f"{each.label} has {len(kept)} sizes: others do not fit the budget")
            ladder.sizes[each.name] = tuple(kept)
    if outlooks and all(each.name in ladder.skipped for each in able):
        affordable(outlooks, budget)  # raises: nothing fits


def _check_time(settings: CompareSettings, bench: Workbench, entered: Field, clock: Clock, how: Mapping[str, int]) -> None:
    """Raise ValueError for a time limit in which no rung can be trained; one method stands for all."""
    first = next(iter(entered.able.values()))
    try:
        outlook = bench.forecast(sized(first, entered.sizes[first.name][0]), **how)
    except (ValueError, TypeError):
        return
    rung = settings.steps if settings.search == "grid" else rungs_of(settings.steps)[0]
    count = len(entered.able)
    clock.check_forecast(outlook.seconds_per_step * rung * count, f"{rung} steps of {count} methods")
