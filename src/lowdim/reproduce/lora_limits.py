"""LoRA limits: the error of the chained gradient against degree and norm, and the growth of its time with the length."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.diagnose import LoRALimits, lora_attention_gradient, lora_limits
from lowdim.linalg import stream
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.threads import one_thread

ALPHA, RANK, WIDTH, HEAD = 2.0, 2, 8, 4
RATIOS, DEGREES = (0.25, 0.5, 1.0, 2.0), (2, 4, 6)


def run(context: Context) -> Outcome:
    """(1) Error of dB_q by degree and norm; (2) time and operations by length."""
    rows: list[dict[str, Any]] = []
    checks = _errors(rows, context) + _growth(rows, context)
    return Outcome(
        slug="lora-limits",
        setting="(1) X (256, 8) standard normal, one head of width 4, rank 2, alpha 2, q, k and v adapted, float64; q and k "
        "scaled to a norm of 0.25 to 2 times √ln L; mean over seeds of the relative error of dB_q. (2) the same head, L = 512 "
        "to 4096, one thread, best of 3, degree 2; slopes of log time and log multiplications on log L",
        rows=rows,
        checks=checks,
        notes=[
            "The theory is asymptotic: √ln L has no constant, so the transition is read from the errors, not from the ratio 1."
        ],
    )


def _head(length: int, ratio: float, seed: int) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Input, weights, adapters and target; q's and k's weights scaled to the ratio."""
    generator = stream(seed, "lora-limits", length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(length, WIDTH)
    weights = {m: draw(HEAD, WIDTH) / math.sqrt(WIDTH) for m in "qkv"}
    adapters = {m: (draw(RANK, WIDTH) / math.sqrt(WIDTH), draw(HEAD, RANK) * 0.3) for m in "qkv"}
    scale = ratio / lora_limits(x, weights, adapters, alpha=ALPHA).ratio
    weights = {m: w * (scale if m in "qk" else 1.0) for m, w in weights.items()}
    adapters = {m: (a, b * (scale if m in "qk" else 1.0)) for m, (a, b) in adapters.items()}
    return x, weights, adapters, draw(length, HEAD)


def _errors(rows: list[dict[str, Any]], context: Context) -> list[Check]:
    means: dict[float, Mapping[int, float]] = {}
    for ratio in RATIOS:
        found: dict[int, list[float]] = {degree: [] for degree in DEGREES}
        limits: LoRALimits | None = None
        for seed in range(1 if context.quick else 5):
            given = _head(256, ratio, seed)
            limits = lora_limits(*given[:3], alpha=ALPHA)
            exact = lora_attention_gradient(*given, alpha=ALPHA, method="exact").grads["q"][1]
            for degree in DEGREES:
                fast = lora_attention_gradient(*given, alpha=ALPHA, degree=degree).grads["q"][1]
                found[degree].append(float((fast - exact).norm() / exact.norm()))
        means[ratio] = {degree: float(np.mean(values)) for degree, values in found.items()}
        assert limits is not None
        errors = {f"error, degree {degree}": value for degree, value in means[ratio].items()}
        needed = {"score_bound": round(limits.score_bound, 3), "degree_needed": limits.degree_needed}
        rows.append({"part": 1, "ratio": ratio, **errors, **needed})
        context.say(f"ratio {ratio}: " + ", ".join(f"degree {d} {e:.2e}" for d, e in means[ratio].items()))
    cuts = [means[ratio][d] / means[ratio][d + 2] for ratio in (0.25, 0.5) for d in (2, 4)]
    return [
        Check("(1) at 0.25 and 0.5: least factor by which two degrees cut the error", min(cuts), ">=", 5.0),
        Check("(1) error at 0.25, degree 6", means[0.25][6], "<=", 1e-6),
        Check("(1) error at 2, degree 4", means[2.0][4], ">=", 0.1),
    ]


def _growth(rows: list[dict[str, Any]], context: Context) -> list[Check]:
    lengths = (128, 256, 512) if context.quick else (512, 1024, 2048, 4096)
    seconds: dict[str, list[float]] = {"exact": [], "chained": []}
    counts: dict[str, list[int]] = {"exact": [], "chained": []}
    with one_thread():
        for length in lengths:
            given = _head(length, 0.5, 0)
            for method in seconds:
                times = []
                for _ in range(3):
                    start = time.perf_counter()
                    result = lora_attention_gradient(*given, alpha=ALPHA, method=method, degree=2)  # type: ignore[arg-type]
                    times.append(time.perf_counter() - start)
                    count = result.multiply_adds
                seconds[method].append(min(times))
                counts[method].append(count)
            ms = {f"{method}, ms": round(1000 * values[-1], 2) for method, values in seconds.items()}
            rows.append({"part": 2, "length": length, **ms, **{f"{m}, products": c[-1] for m, c in counts.items()}})
    logs = np.log(lengths)
    slope = {m: float(np.polyfit(logs, np.log(seconds[m]), 1)[0]) for m in seconds}
    work = {m: float(np.polyfit(logs, np.log(counts[m]), 1)[0]) for m in counts}
    context.say(f"slopes of time: exact {slope['exact']:.2f}, chained {slope['chained']:.2f}")
    return [
        Check("(2) slope of time, chained", slope["chained"], "<=", 1.5),
        Check("(2) slope of time, exact", slope["exact"], ">=", 1.6),
        Check("(2) |slope of multiplications - 1|, chained", abs(work["chained"] - 1), "<=", 0.05),
        Check("(2) slope of multiplications, exact", work["exact"], ">=", 1.8),
    ]
