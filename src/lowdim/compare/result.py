"""From run records to a table: means, intervals, the Pareto front, and ties within noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lowdim.catalogue import BASELINES, Variant
from lowdim.train.metrics import Metric, difference_is_noise, interval

__all__ = ["mark", "summarise"]

_FAMILY = {"probe": "baseline", "full": "baseline", "adapter": "adapters", "optimizer": "optim", "layer": "layers"}


def summarise(
    variant: Variant,
    metric: Metric,
    trials: Sequence[Mapping[str, Any]],
    seeds: Sequence[Mapping[str, Any]],
    forecast: int | None,
    reason: str | None,
) -> dict[str, Any]:
    """One method's row, from its run records."""
    good = [r for r in seeds if r.get("failure") is None]
    scores = [float(r["test"]) for r in good]
    spread = interval(scores, low=metric.low, high=metric.high)
    times = [r["seconds_per_step"] for r in (*trials, *seeds) if r.get("seconds_per_step")]
    peaks = [r["measured_peak_bytes"] for r in (*trials, *seeds) if r.get("measured_peak_bytes")]
    failures = [r["failure"] for r in (*trials, *seeds) if r.get("failure")]
    status = "skipped" if reason else "ok" if scores else "failed"
    row: dict[str, Any] = {
        "name": variant.name,
        "label": variant.label,
        "family": _FAMILY[variant.kind],
        "baseline": variant.name in {b.name for b in BASELINES},
        "status": status,
        "reason": reason or (failures[0] if failures else None),
        "lr": good[0]["lr"] if good else None,
        "trials": [{"lr": r["lr"], "score": r.get("validation")} for r in trials],
        "scores": scores,
        "mean": statistics.fmean(scores) if scores else None,
        "interval": list(spread) if spread else None,
        "trained_parameters": next((r["trained_parameters"] for r in (*seeds, *trials) if r.get("trained_parameters")), None),
        "forecast_peak_bytes": forecast,
        "measured_peak_bytes": max(peaks) if peaks else None,
        "seconds_per_step": statistics.median(times) if times else None,
        "file_bytes": next((r["file_bytes"] for r in good if r.get("file_bytes") is not None), None),
        "hits": [r.get("hits", "") for r in good],
        "config": next((r.get("config") for r in (*seeds, *trials) if r.get("config")), {}),
        "curves": [{"seed": r["seed"], "step": r["loss_steps"], "loss": r["losses"]} for r in good],
    }
    if status == "ok" and failures:
        row["reason"] = f"{len(failures)} of {len(trials) + len(seeds)} runs failed: {failures[0]}"
    return row


def mark(rows: list[dict[str, Any]], metric: Metric) -> dict[str, Any] | None:
    """Mark the Pareto front of score and memory, and the methods within noise of the best; returns the best row."""
    done = [row for row in rows if row["status"] == "ok"]
    for row in rows:
        row["pareto"], row["within_noise"] = False, False
    if not done:
        return None
    sign = 1.0 if metric.higher_is_better else -1.0
    best = max(done, key=lambda row: sign * row["mean"])
    for row in done:
        error = sampling_error(best["hits"], row["hits"])
        row["within_noise"] = row is not best and difference_is_noise(best["scores"], row["scores"], error)
        row["pareto"] = not any(_dominates(other, row, sign) for other in done if other is not row)
    return best


def sampling_error(best: Sequence[str], other: Sequence[str]) -> float:
    """One standard error, over the texts of the test set, of the difference of two methods' accuracies.

    Both saw the same texts, so the differences are paired text by text; each is averaged over the seeds first. 0 if the
    metric is not a share of correct answers.
    """
    seeds = min(len(best), len(other))
    if not seeds or not best[0] or len({len(h) for h in (*best[:seeds], *other[:seeds])}) != 1:
        return 0.0
    count = len(best[0])
    gaps = [sum(int(best[s][i]) - int(other[s][i]) for s in range(seeds)) / seeds for i in range(count)]
    return statistics.stdev(gaps) / math.sqrt(count) if count > 1 else 0.0


def _dominates(a: Mapping[str, Any], b: Mapping[str, Any], sign: float) -> bool:
    memory_a, memory_b = _memory(a), _memory(b)
    score_a, score_b = sign * a["mean"], sign * b["mean"]
    return score_a >= score_b and memory_a <= memory_b and (score_a > score_b or memory_a < memory_b)


def _memory(row: Mapping[str, Any]) -> float:
    return float(row["measured_peak_bytes"] or row["forecast_peak_bytes"] or math.inf)
