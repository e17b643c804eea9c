"""Matrix completion: approximate half steps against exact ones, on an exact matrix and on hidden pixels of digits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lowdim.errors import MissingExtraError
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.solve import CompletionResult, complete_matrix


def run(context: Context) -> Outcome:
    """(a) Recovery of a 600 x 500 matrix of rank 5; (b) digits with 40 % hidden, three masks."""
    rows: list[dict[str, Any]] = []
    checks = _recovery(rows, context)
    checks += _digits(rows, context)
    return Outcome(
        slug="matrix-completion",
        setting="(a) 600 x 500 of rank 5, 25 % observed, inner_tol 1e-2; (b) scikit-learn's digits, 1797 x 64, 60 % observed, "
        "rank 4, 12 rounds, root mean square error on the hidden entries",
        rows=rows,
        checks=checks,
        notes=[
            "Seconds are beside the counted operations: fewer operations were not less time here. The exact half step is one "
            "matrix product per row, the sketched one several memory-bound products.",
            "Ranks 4 and 5 are below what the theory pays for (about 10); bench/represent_diagnose_solve.py has higher ones.",
        ],
    )


def _recovery(rows: list[dict[str, Any]], context: Context) -> list[Check]:
    shape = (200, 150) if context.quick else (600, 500)
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(shape[0], 5)) @ rng.normal(size=(5, shape[1]))
    at = np.nonzero(rng.random(shape) < (0.5 if context.quick else 0.25))
    errors, rounds = {}, {}
    for inner in ("exact", "sketched"):
        result, seconds = _timed(*at, truth[at], shape, 5, iters=40, tol=1e-9, inner=inner, inner_tol=1e-2)
        errors[inner] = float(np.linalg.norm(result.U @ result.V.T - truth) / np.linalg.norm(truth))
        rounds[inner] = result.iterations
        rows.append({"part": "a", "inner": inner, "error": errors[inner], **_effort(result, seconds)})
        context.say(f"recovery, {inner}: {result.iterations} rounds, relative error {errors[inner]:.2e}")
    return [
        Check("(a) relative error, exact", errors["exact"], "<=", 1e-8),
        Check("(a) relative error, sketched", errors["sketched"], "<=", 1e-8),
        Check("(a) rounds, sketched over exact", rounds["sketched"] / rounds["exact"], "<=", 2.5),
    ]


def _digits(rows: list[dict[str, Any]], context: Context) -> list[Check]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the digits data") from error
    images = np.asarray(load_digits(return_X_y=True)[0], dtype=np.float64) / 16
    away, loose, over_mean = [], [], []
    for mask_seed in (0,) if context.quick else (0, 1, 2):
        seen = np.random.default_rng(mask_seed).random(images.shape) < 0.6
        at = np.nonzero(seen)
        column_means = np.where(seen, images, 0).sum(0) / np.maximum(seen.sum(0), 1)
        baseline = _rmse(np.broadcast_to(column_means, images.shape), images, ~seen)
        rows.append({"part": "b", "mask": mask_seed, "inner": "column means", "error": baseline})
        error = {}
        for name, how in _VARIANTS.items():
            result, seconds = _timed(*at, images[at], images.shape, 4, iters=12, tol=0.0, seed=100 + mask_seed, **how)
            error[name] = _rmse(result.U @ result.V.T, images, ~seen)
            rows.append({"part": "b", "mask": mask_seed, "inner": name, "error": error[name], **_effort(result, seconds)})
        context.say(f"digits, mask {mask_seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in error.items()))
        away.append(abs(error["sketched 1e-2"] - error["exact"]))
        loose.append(abs(error["sketched 1e-1"] - error["exact"]))
        over_mean.append(max(error["sketched 1e-2"], error["exact"]) / baseline)
    return [
        Check("(b) worst mask: |sketched 1e-2 - exact|", max(away), "<=", 0.001),
        Check("(b) worst mask: |sketched 1e-1 - exact|", max(loose), "<=", 0.01),
        Check("(b) worst mask: error over that of column means", max(over_mean), "<=", 0.9),
    ]


_VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"inner": "exact"},
    "sketched 1e-2": {"inner_tol": 1e-2},
    "sketched 1e-1": {"inner_tol": 1e-1},
}


def _timed(*args: Any, **how: Any) -> tuple[CompletionResult, float]:
    start = time.perf_counter()
    result = complete_matrix(*args, **how)
    return result, time.perf_counter() - start


def _effort(result: CompletionResult, seconds: float) -> dict[str, float]:
    return {
        "rounds": result.iterations,
        "mflop_per_round": round(result.flops / result.iterations / 1e6, 2),
        "seconds_per_round": round(seconds / result.iterations, 4),
        "inner_steps": round(result.inner_steps, 2),
    }


def _rmse(got: np.ndarray, want: np.ndarray, where: np.ndarray) -> float:
    return float(np.sqrt(np.square(got[where] - want[where]).mean()))
