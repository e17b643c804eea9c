"""The rows of the table: from the search and the final to one record for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowdim.catalogue import Variant
from lowdim.comparison.finals import Finals
from lowdim.comparison.hunt import Hunt
from lowdim.comparison.ladder import sized
from lowdim.comparison.result import summarise
from lowdim.comparison.search import Candidate, Search
from lowdim.comparison.setting_up import Field
from lowdim.comparison.workbench import Workbench
from lowdim.records import ComparedRun, MethodRecord

__all__ = ["forecast_of", "rows_of_methods"]


def rows_of_methods(
    entered: Field, hunt: Hunt, found: Search, finals: Finals, peak: Callable[[Variant], int | None]
) -> list[MethodRecord]:
    """A row for each method, in the order in which they were named.

    Args:
        peak: the forecast peak memory of a finalist, in bytes.
    """
    rows = [_row(each, entered, hunt, found, finals, peak) for each in entered.chosen]
    for row in rows:
        if (costs := entered.costs.get((row.name, row.size))) is not None:
            row.flops_per_token = costs.flops
    return rows


def _row(
    each: Variant, entered: Field, hunt: Hunt, found: Search, finals: Finals, peak: Callable[[Variant], int | None]
) -> MethodRecord:
    if (reason := entered.skipped.get(each.name)) is not None:
        return summarise(each, [], [], None, reason)
    trials = [runs[-1] for candidate, runs in hunt.records.items() if candidate.method == each.name]
    seeds = finals.runs.get(each.name, [])
    if seeds:
        chosen = sized(each, seeds[0].size)
        return summarise(chosen, _of_size(trials, seeds[0].size), seeds, peak(chosen), None)
    best = found.best_of(each.name)
    row = summarise(each if best is None else sized(each, best.size), trials, [], None, None)
    if best is not None:
        row.status, row.reason, row.lr, row.size = "left", _why(best, found, finals), best.lr, best.size
        row.lr_origin = best.origin
    return row


def _of_size(trials: Sequence[ComparedRun], size: int | None) -> list[ComparedRun]:
    """The trials with those of the chosen size first: times and parameters of a row are theirs."""
    return sorted(trials, key=lambda run: run.size != size)


def _why(best: Candidate, found: Search, finals: Finals) -> str:
    """Why a method is not in the final."""
    last = [visit for visit in found.visits if visit.candidate == best][-1]
    steps = f"after {last.steps} of {finals.bench.steps} steps"
    if last.goes_on:
        return f"the time limit left no room for its final; it was searched {steps}"
    return f"left the search {steps}: {last.reason}"


def forecast_of(bench: Workbench, steps: int, batch_size: int) -> Callable[[Variant], int | None]:
    """The forecast peak memory of a method; None where there is no forecast."""

    def peak(chosen: Variant) -> int | None:
        try:
            return bench.forecast(chosen, steps=steps, batch_size=batch_size).total
        except (ValueError, TypeError):
            return None

    return peak
