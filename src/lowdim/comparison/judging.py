"""From the runs of a comparison to the judge's table: the seeds that all methods have, and the rows that were never trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lowdim.comparison.judge import Judgement, judge
from lowdim.records import ComparedRun

__all__ = ["judge_runs"]

Values = Sequence[float]


def judge_runs(runs: Mapping[str, Sequence[ComparedRun]], trivial: Mapping[str, Values] | None = None) -> Judgement | None:
    """Judge the methods by what their runs of the final have measured so far.

    Runs are paired by their seed. A seed that failed for one method is left out for all; where fewer than two seeds would be
    left, the methods that failed most are left out instead. A method without any usable run is not judged.

    Args:
        runs: name of the method -> its runs with a seed, failed ones included.
        trivial: name of a row that was never trained -> a score for each row of the test part, higher is better.

    Returns:
        What they show; None where fewer than two rows can be compared.
    """
    measured = {name: {run.seed: found for run in own if (found := _values(run))} for name, own in runs.items()}
    kept = _with_common_seeds({name: found for name, found in measured.items() if found})
    if not kept:
        return None
    seeds = [seed for seed in next(iter(kept.values())) if all(seed in found for found in kept.values())]
    scores = np.array([[found[seed] for seed in seeds] for found in kept.values()])
    fixed = {name: values for name, values in (trivial or {}).items() if _usable(values)}
    if len(kept) + len(fixed) < 2 or scores.shape[-1] < 2:
        return None
    return judge(list(kept), scores, fixed=fixed)


def _values(run: ComparedRun) -> Values | None:
    """A score for each row of the test part; None where the run failed."""
    values = run.values or [float(hit) for hit in run.hits or ""]
    return values if run.failure is None and _usable(values) else None


def _usable(values: Values) -> bool:
    return bool(values) and all(map(math.isfinite, values))


def _with_common_seeds(measured: dict[str, dict[int, Values]]) -> dict[str, dict[int, Values]]:
    """The methods that have two seeds in common, or one where no method has two."""
    kept = dict(measured)
    wanted = min(2, max((len(found) for found in kept.values()), default=0))
    while len(kept) > 1 and len(set.intersection(*map(set, kept.values()))) < wanted:
        del kept[min(reversed(kept), key=lambda name: len(kept[name]))]
    return kept
