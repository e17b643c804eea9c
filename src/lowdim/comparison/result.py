"""From the records of runs to the rows of a table, samples, and remarks on the search."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lowdim.catalogue import BASELINES, Variant
from lowdim.comparison.trivial import UNTOUCHED
from lowdim.records import ComparedRun, LossCurve, MethodRecord, SampleRecord, Trial

__all__ = ["remarks", "samples_of", "summarise"]

_FAMILY = {
    "probe": "baseline",
    "full": "baseline",
    "adapter": "adapters",
    "optimizer": "optim",
    "layer": "layers",
    "compress": "compress",
}


def summarise(
    variant: Variant,
    trials: Sequence[ComparedRun],
    seeds: Sequence[ComparedRun],
    forecast: int | None,
    reason: str | None,
) -> MethodRecord:
    """One method's row, from its runs.

    Args:
        forecast: its peak memory in bytes, where it could be forecast.
        reason: why it was left out; None where it was run.
    """
    good = [run for run in seeds if run.failure is None]
    every = [*trials, *seeds]
    scores = [run.test for run in good if run.test is not None]
    times = [run.seconds_per_step for run in every if run.seconds_per_step]
    failures = [run.failure for run in every if run.failure]
    row = MethodRecord(
        name=variant.name,
        label=variant.label,
        family=_FAMILY[variant.kind],
        baseline=variant.name in {b.name for b in BASELINES},
        status="skipped" if reason else "ok" if scores else "failed",
        reason=reason or (failures[0] if failures else None),
        lr=good[0].lr if good else None,
        lr_origin=(good[0].origin or "") if good else "",
        trials=[Trial(run.lr, run.validation, run.size, run.rung, run.origin or "") for run in trials],
        scores=scores,
        mean=statistics.fmean(scores) if scores else None,
        trained_parameters=next((run.trained_parameters for run in (*seeds, *trials) if run.trained_parameters), None),
        forecast_peak_bytes=forecast,
        measured_peak_bytes=max((run.measured_peak_bytes for run in every if run.measured_peak_bytes), default=None),
        seconds_per_step=statistics.median(times) if times else None,
        file_bytes=next((run.file_bytes for run in good if run.file_bytes is not None), None),
        hits=[run.hits or "" for run in good],
        config=next((run.config for run in (*seeds, *trials) if run.config), {}),
        curves=[LossCurve(run.seed, list(run.loss_steps or ()), run.losses or []) for run in good],
        size=good[0].size if good else None,
        by_class=next((run.by_class for run in good if run.by_class), []),
        by_size=next((run.by_size for run in good if run.by_size), []),
        kept=next((run.kept for run in good if run.kept), None),
    )
    if row.status == "ok" and failures:
        row.reason = f"{len(failures)} of {len(every)} runs failed: {failures[0]}"
    return row


def samples_of(untouched: Sequence[dict[str, str]], runs: Mapping[str, Sequence[ComparedRun]]) -> list[SampleRecord]:
    """What the untouched model and each method's first run with samples wrote for the same prompts.

    Args:
        untouched: `{"prompt", "answer", "expected"}` of the model before training; empty where it has none.
        runs: name of the method -> its runs of the final.
    """
    found: dict[str, Sequence[dict[str, str]]] = {UNTOUCHED: untouched} if untouched else {}
    for name, own in runs.items():
        written = next((run.samples for run in own if run.samples and run.failure is None), None)
        if written:
            found[name] = written
    first = next(iter(found.values()), ())
    return [
        SampleRecord(
            prompt=sample["prompt"],
            expected=sample["expected"],
            answers={
                name: answer["answer"]
                for name, samples in found.items()
                for answer in samples
                if answer["prompt"] == sample["prompt"]
            },
        )
        for sample in first
    ]


def remarks(rows: Sequence[MethodRecord]) -> list[str]:
    """Remarks on the search, in sentences."""
    edge = [row.label for row in rows if row.status == "ok" and row.lr in _ends(row)]
    return [f"the chosen rate is at the edge of those tried for: {', '.join(edge)}; more --rates may help them"] if edge else []


def _ends(row: MethodRecord) -> tuple[float, ...]:
    """The smallest and the largest rate, if at least three were tried: of two, each is an end."""
    rates = {trial.lr for trial in row.trials}
    return (min(rates), max(rates)) if len(rates) > 2 else ()
