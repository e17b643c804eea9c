"""The error rates of the judge in comparisons whose truth is known.

    python bench/judge_simulation.py [--comparisons 400] [--out results/judge-simulation.json]

Each comparison draws a table of scores, methods x seeds x test examples, and the judge says which methods may be the best.
`tests/test_judge.py` holds the same rates to their bounds. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import lowdim
from lowdim.comparison.judge import CONFIDENCE, LEVEL, Judgement, judge
from lowdim.train.environment import environment

Array = NDArray[np.float64]
Shape = tuple[int, int, int]
Draw = Callable[[np.random.Generator, Shape, float], Array]
DrawWithRow = Callable[[np.random.Generator, Shape], tuple[Array, Array]]

SEED = 7


def hits(draw: np.random.Generator, shape: Shape, gap: float) -> Array:
    """Classification: right or wrong, by the difficulty of the example for all, for the method, and by the run."""
    methods, seeds, examples = shape
    logit = 0.5 + draw.normal(0, 2, examples) + draw.normal(0, 1, (methods, 1, examples))
    logit = logit + draw.normal(0, 0.15, (methods, seeds, 1)) + draw.normal(0, 0.1, (1, seeds, 1)) + draw.normal(0, 0.5, shape)
    found = (draw.random(shape) < 1 / (1 + np.exp(-logit))).astype(float)
    found[0] += gap
    return found


def block_losses(draw: np.random.Generator, shape: Shape, gap: float) -> Array:
    """A language model: the loss of a block depends mostly on the block."""
    methods, seeds, examples = shape
    block = draw.gamma(4, 0.25, examples)
    loss = 2 + block + draw.normal(0, 0.05, (methods, 1, examples)) + draw.normal(0, 0.01, (methods, seeds, 1))
    loss = loss + draw.normal(0, 0.01, (1, seeds, 1)) + draw.normal(0, 0.02, shape) * (1 + block)
    loss[0] -= gap
    return -loss


def f1_values(draw: np.random.Generator, shape: Shape, gap: float) -> Array:
    """Jackknife values of the F1 of two classes, of which one is rare."""
    methods, seeds, examples = shape
    labels = draw.random(examples) < 0.25
    margin = np.where(labels, 0.8, -0.8) + draw.normal(0, 1.0, examples) + draw.normal(0, 0.5, (methods, 1, examples))
    margin = margin + draw.normal(0, 0.1, (methods, seeds, 1)) + draw.normal(0, 0.3, shape)
    said = margin > 0
    right, wrong, missed = said & labels, said & ~labels, ~said & labels
    without = _f1(*((part.sum(-1, keepdims=True) - part) for part in (right, wrong, missed)))
    whole = _f1(*(part.sum(-1, keepdims=True) for part in (right, wrong, missed)))
    values = examples * whole - (examples - 1) * without
    values[0] += gap
    return values


def correlations(draw: np.random.Generator, shape: Shape, gap: float) -> Array:
    """Jackknife values of Pearson's correlation of ranks: Spearman's, with the ranks of the whole part."""
    methods, seeds, examples = shape
    target = draw.normal(size=examples)
    guess = target + draw.normal(0, 0.8, examples) + draw.normal(0, 0.4, (methods, 1, examples)) + draw.normal(0, 0.2, shape)
    guess = guess * (1 + draw.normal(0, 0.05, (methods, seeds, 1))) + draw.normal(0, 0.05, (methods, seeds, 1)) * target
    x, y = _ranks(np.broadcast_to(target, shape)), _ranks(guess)
    sums = [part.sum(-1, keepdims=True) for part in (x, y, x * x, y * y, x * y)]
    whole = _correlation(examples, *sums)
    left = [total - part for total, part in zip(sums, (x, y, x * x, y * y, x * y), strict=True)]
    values = examples * whole - (examples - 1) * _correlation(examples - 1, *left)
    values[0] += gap
    return values


def uneven(draw: np.random.Generator, shape: Shape, gap: float) -> Array:
    """Block losses where a third of the methods give the same whatever the seed, as a fitted head does."""
    methods, seeds, examples = shape
    moved = np.ones((methods, 1, 1))
    moved[1 : 1 + max(1, methods // 3)] = 0.0
    block = draw.gamma(4, 0.25, examples)
    loss = 2 + block + draw.normal(0, 0.05, (methods, 1, examples))
    by_run = draw.normal(0, 0.01, (methods, seeds, 1)) + draw.normal(0, 0.01, (1, seeds, 1))
    loss = loss + moved * (by_run + draw.normal(0, 0.02, shape) * (1 + block))
    loss[0] -= gap
    return -loss


def untouched_row(draw: np.random.Generator, shape: Shape) -> tuple[Array, Array]:
    """Block losses of methods, and of a model that was never trained and is as good: one loss for each block, for all seeds."""
    methods, seeds, examples = shape
    block = draw.gamma(4, 0.25, examples)
    loss = 2 + block + draw.normal(0, 0.05, (methods, 1, examples)) + draw.normal(0, 0.01, (methods, seeds, 1))
    loss = loss + draw.normal(0, 0.01, (1, seeds, 1)) + draw.normal(0, 0.02, shape) * (1 + block)
    return -loss, -(2 + block + draw.normal(0, 0.3, examples))


def constant_row(draw: np.random.Generator, shape: Shape) -> tuple[Array, Array]:
    """Hits of methods, and of a constant answer that is right as often, on rows of its own."""
    found = hits(draw, shape, 0.0)
    return found, (draw.random(shape[2]) < _mean_hits()).astype(float)


def rates(kind: Draw, shape: Shape, comparisons: int) -> dict[str, float]:
    """Shares of comparisons.

    `left_out`: a given method that is as good as the others is not in the set; `called_better`: one of equal methods is said to
    be better than every other; `found`: a gap of twice the half-width is; `best_is_in`: the best is in the set, at that gap and
    at half of it.
    """
    draw, names = np.random.default_rng(SEED), [str(index) for index in range(shape[0])]
    equal = [judge(names, kind(draw, shape, 0.0)) for _ in range(comparisons)]
    width = float(np.median([found.half_width for found in equal]))
    apart = [judge(names, kind(draw, shape, 2 * width)) for _ in range(comparisons)]
    near = [judge(names, kind(draw, shape, width)) for _ in range(comparisons)]
    return {
        "left_out": _share("1" not in found.may_be_best for found in equal),
        "called_better": _share(found.best is not None for found in equal),
        "found": _share(found.best == "0" for found in apart),
        "best_is_in": _share("0" in found.may_be_best for found in [*apart, *near]),
    }


def rates_with_a_row(
    kind: Callable[[np.random.Generator, Shape], tuple[Array, Array]], shape: Shape, comparisons: int
) -> dict[str, float]:
    """As `rates`, of methods that are as good as a row that was never trained: `row_left_out` is that row."""
    draw, names = np.random.default_rng(SEED), [str(index) for index in range(shape[0])]
    found: list[Judgement] = []
    for _ in range(comparisons):
        scores, row = kind(draw, shape)
        found.append(judge(names, scores, fixed={"row": row}))
    return {
        "left_out": _share("1" not in one.may_be_best for one in found),
        "row_left_out": _share("row" not in one.may_be_best for one in found),
        "called_better": _share(one.best is not None for one in found),
    }


def rates_in_rounds(kind: Draw, shape: Shape, comparisons: int) -> dict[str, float]:
    """As `rates`, where the judge looks after each round of seeds from the second, and stops once one method is the best."""
    draw, names = np.random.default_rng(SEED), [str(index) for index in range(shape[0])]

    def decided(gap: float) -> Judgement:
        scores = kind(draw, shape, gap)
        looks: Iterator[Judgement] = (judge(names, scores[:, :seeds]) for seeds in range(2, shape[1] + 1))
        return next((look for look in looks if look.best is not None), judge(names, scores))

    equal = [decided(0.0) for _ in range(comparisons)]
    return {
        "left_out": _share("1" not in found.may_be_best for found in equal),
        "called_better": _share(found.best is not None for found in equal),
    }


def _share(cases: Iterator[bool]) -> float:
    return round(float(np.mean([*cases])), 4)


@functools.cache
def _mean_hits() -> float:
    draw = np.random.default_rng(SEED)
    return float(np.mean([hits(draw, (20, 3, 300), 0.0).mean() for _ in range(300)]))


def _f1(right: Array, wrong: Array, missed: Array) -> Array:
    return 2 * right / np.maximum(1, 2 * right + wrong + missed)


def _ranks(values: Array) -> Array:
    return values.argsort(-1).argsort(-1).astype(float)


def _correlation(count: int, x: Array, y: Array, xx: Array, yy: Array, xy: Array) -> Array:
    return (xy - x * y / count) / np.sqrt((xx - x * x / count) * (yy - y * y / count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=400)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun, rows = time.perf_counter(), []
    for kind, shape in itertools.product((hits, block_losses), itertools.product((6, 20), (2, 3), (98,))):
        rows.append(_row("fixed seeds", kind, shape, rates(kind, shape, options.comparisons)))
    for kind, shape in itertools.product((f1_values, correlations, uneven), ((6, 3, 300), (20, 2, 98))):
        rows.append(_row("fixed seeds", kind, shape, rates(kind, shape, options.comparisons)))
    for row, shape in itertools.product((untouched_row, constant_row), ((6, 2, 98), (6, 3, 300), (20, 3, 98))):
        rows.append(_row("with a row that was never trained", row, shape, rates_with_a_row(row, shape, options.comparisons)))
    for kind, shape in itertools.product((hits, block_losses), ((6, 5, 98), (20, 5, 98))):
        rows.append(_row("rounds until decided", kind, shape, rates_in_rounds(kind, shape, options.comparisons)))
    record = {
        "command": "python bench/judge_simulation.py",
        "comparisons": options.comparisons,
        "confidence": CONFIDENCE,
        "nominal": LEVEL,
        "rows": rows,
        "seconds": round(time.perf_counter() - begun, 1),
        "lowdim": lowdim.__version__,
        "environment": environment(),
    }
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def _row(what: str, kind: Callable[..., object], shape: Shape, found: dict[str, float]) -> dict[str, object]:
    methods, seeds, examples = shape
    return {"what": what, "scores": kind.__name__, "methods": methods, "seeds": seeds, "examples": examples, **found}


if __name__ == "__main__":
    main()
