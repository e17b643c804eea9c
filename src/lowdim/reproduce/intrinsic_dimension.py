"""The intrinsic dimension of digits for networks of three widths, in subspaces of three kinds."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowdim.adapters import intrinsic_subspace
from lowdim.diagnose import IntrinsicDimensionResult, intrinsic_dimension
from lowdim.reproduce.settings.digits import Digits, accuracy, batches, digits, mlp
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

WIDTHS, DIMS, THRESHOLD = (40, 100, 200), (40, 60, 80, 120, 160, 240), 0.9
TRAIN, STEPS, BATCH = 1258, 400, 128  # 70 % of the images
DIRECT_RATE, RATE = 1e-3, 3e-2
OTHERS, AT = ("dense", "sparse"), 160


def run(context: Context) -> Outcome:
    """`d_int90` of each width on a grid, then dense and sparse projections, and the search by bisection."""
    widths, dims, seeds = ((40,), (40, 240), (0,)) if context.quick else (WIDTHS, DIMS, (0, 1, 2))
    steps = 30 if context.quick else STEPS
    outcome = Outcome(
        "intrinsic-dimension",
        f"scikit-learn's digits, {TRAIN} training images, MLP 64-w-w-10 with ReLU; Adam, {steps} steps of {BATCH}, lr "
        f"{DIRECT_RATE:g} direct and {RATE:g} in the subspace; test accuracy, threshold {THRESHOLD:g}; seeds "
        f"{', '.join(map(str, seeds))} (split, start, batches and projection)",
    )
    data = {seed: digits(seed, TRAIN) for seed in seeds}
    found: dict[int, IntrinsicDimensionResult] = {}
    for width in widths:
        begun = time.perf_counter()

        def measure(dimension: int | None, seed: int, width: int = width) -> float:
            return _score(data[seed], width, dimension, seed, steps)[0]

        full = sum(p.numel() for p in mlp((64, width, width, 10), 0).parameters())
        found[width] = one = intrinsic_dimension(measure, dims, threshold=THRESHOLD, seeds=seeds, full_dimension=full)
        context.say(f"width {width}: {one.summary}")
        scores = {f"d = {dim}": round(score, 4) for dim, score in zip(one.dims, one.score)}
        outcome.rows.append(
            {"part": "grid", "width": width, "D": full, "d_int90": one.dimension, "baseline": round(one.baseline, 4), **scores}
            | {"seconds": round(time.perf_counter() - begun, 1)}
        )
        _bisect(outcome, one, dims, width)
    _compare(outcome, found)
    _kinds(outcome, context, data, found, widths[0], steps)
    _cost(outcome, data[seeds[0]], widths)
    outcome.notes += [
        "Dimensions between those of the grid were not tried: d_int90 is the first of the grid that is enough.",
        "One small data set. The paper's MNIST (about 750 dimensions for 199,210 parameters) and LeNet were not run.",
    ]
    return outcome


def _compare(outcome: Outcome, found: dict[int, IntrinsicDimensionResult]) -> None:
    reached = [one.dimension or 10 * DIMS[-1] for one in found.values()]
    sizes = [one.full_dimension or 0 for one in found.values()]
    outcome.checks += [
        Check("largest d_int90 over the widths", max(reached), "<=", DIMS[-1]),
        Check(
            f"largest over smallest d_int90 while D grows {max(sizes) / min(sizes):.0f}-fold",
            max(reached) / min(reached),
            "<=",
            2.0,
        ),
        Check("D / d_int90 of the widest network", sizes[-1] / reached[-1], ">=", 200.0),
    ]


def _bisect(outcome: Outcome, one: IntrinsicDimensionResult, dims: tuple[int, ...], width: int) -> None:
    """The search over the scores of the grid: how many trainings it saves, and whether it finds the same."""
    known = dict(zip(one.dims, one.score))
    quick = intrinsic_dimension(
        lambda d, seed: known[d or 0], dims, threshold=THRESHOLD, baseline=one.baseline, search="bisect"
    )
    outcome.rows.append(
        {"part": "bisect", "width": width, "d_int90": quick.dimension, "dimensions measured": len(quick.dims), "of": len(dims)}
    )
    bound = len(dims).bit_length()  # ceil(log2(n + 1))
    outcome.checks.append(Check(f"width {width}: dimensions that bisection measured", len(quick.dims), "<=", bound))


def _kinds(
    outcome: Outcome,
    context: Context,
    data: dict[int, Digits],
    found: dict[int, IntrinsicDimensionResult],
    width: int,
    steps: int,
) -> None:
    at = AT if AT in found[width].dims else found[width].dims[-1]
    fastfood = found[width].score[found[width].dims.index(at)]
    for kind in OTHERS:
        scores = [_score(data[seed], width, at, seed, steps, kind)[0] for seed in data]
        mean = sum(scores) / len(scores)
        context.say(f"{kind}: {mean:.3f} at d = {at}, Fastfood {fastfood:.3f}")
        outcome.rows.append({"part": kind, "width": width, f"d = {at}": round(mean, 4), "Fastfood": round(fastfood, 4)})
        outcome.checks.append(Check(f"{kind} against Fastfood at d = {at}, width {width}", abs(mean - fastfood), "<=", 0.05))


def _cost(outcome: Outcome, data: Digits, widths: tuple[int, ...]) -> None:
    """Steps a second in the subspace and in all parameters."""
    for width in widths:
        rates = {}
        for dimension in (None, AT):
            steps = 50
            rates[dimension] = steps / _score(data, width, dimension, 0, steps)[1]
        outcome.rows.append(
            {
                "part": "cost", "width": width, "steps a second, direct": round(rates[None], 1),
                "steps a second, subspace": round(rates[AT], 1), "ratio": round(rates[AT] / rates[None], 3),
            }
        )  # fmt: skip


def _score(
    data: Digits, width: int, dimension: int | None, seed: int, steps: int, projection: str = "fastfood"
) -> tuple[float, float]:
    """Test accuracy, and seconds of training."""
    net: nn.Module = mlp((64, width, width, 10), seed)
    if dimension is not None:
        net = intrinsic_subspace(net, dimension, projection=projection, seed=seed)
    trained: list[Any] = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=DIRECT_RATE if dimension is None else RATE)
    begun = time.perf_counter()
    for rows in batches(len(data.x), steps, seed, BATCH):
        optimizer.zero_grad()
        F.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
    seconds = time.perf_counter() - begun
    return accuracy(net, data.test_x, data.test_y), seconds
