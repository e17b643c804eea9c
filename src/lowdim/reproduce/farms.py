"""FARMS: the exponent against the aspect ratio on three laws of weights, and pruning ratios for a sentence encoder."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowdim.diagnose import farms, fit_alpha, prune, pruning_ratios, weights_of
from lowdim.linalg import stream
from lowdim.reproduce.settings.minilm import load_minilm, sentence_embeddings, sts_benchmark, tokenized
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.train.metrics import science

COLUMNS, ASPECTS, SPARSITY, BLOCK = 128, (1, 2, 4, 8), 0.6, 6


def run(context: Context) -> Outcome:
    """(a) Spread of alpha over aspect ratios; (b) MiniLM pruned by magnitude with ratios from alpha."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    checks = _bias(rows, notes, context)
    checks += _pruning(rows, notes, context)
    return Outcome(
        slug="farms",
        setting="(a) 128 columns, 128 to 1024 rows, float32, three laws; FARMS with 64 rows and 9 windows, median fit; mean "
        "alpha over seeds, spread = largest - smallest over the aspect ratios. (b) all-MiniLM-L6-v2, 36 linear layers pruned "
        "by magnitude to 60 % zeros, peak fit with 100 bins, FARMS with 192 rows and 9 windows, epsilon 0.2, blocks of 6 "
        "layers; Spearman (x 100) on the dev part of the STS benchmark",
        rows=rows,
        checks=checks,
        notes=notes,
    )


def _bias(rows: list[dict[str, Any]], notes: list[str], context: Context) -> list[Check]:
    seeds = range(1 if context.quick else 3)
    measures: dict[str, Callable[[Tensor], float]] = {"full matrix": _full, "FARMS": _windows}
    peer = _weightwatcher()
    if peer is not None:
        measures["weightwatcher"] = peer
    else:
        notes.append("weightwatcher is not installed, so its alphas are left out.")
    checks = []
    for law, draw in LAWS.items():
        spread = {}
        for name, measure in measures.items():
            means = [float(np.mean([measure(draw(COLUMNS * a, seed)) for seed in seeds])) for a in ASPECTS]
            spread[name] = max(means) - min(means)
            alphas = {f"alpha at {a}:1": round(m, 3) for a, m in zip(ASPECTS, means)}
            rows.append({"part": "a", "law": law, "measure": name, **alphas, "spread": round(spread[name], 4)})
        context.say(f"{law}: spread of alpha {', '.join(f'{name} {value:.3f}' for name, value in spread.items())}")
        share = spread["FARMS"] / spread["full matrix"]
        checks.append(Check(f"(a) {law}: FARMS' spread over the full fit's", share, "<=", 0.1))
        if "weightwatcher" in spread:
            share = spread["FARMS"] / spread["weightwatcher"]
            checks.append(Check(f"(a) {law}: FARMS' spread over weightwatcher's", share, "<=", 1.0))
    return checks


def _gaussian(count: int, seed: int) -> Tensor:
    return torch.randn(count, COLUMNS, generator=stream(seed, "farms", "gaussian", count))


def _student(count: int, seed: int) -> Tensor:
    """Student's t with 4 degrees of freedom: a normal number over the root of a mean of four squares."""
    generator = stream(seed, "farms", "student", count)
    normal = torch.randn(5, count, COLUMNS, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def _low_rank(count: int, seed: int) -> Tensor:
    """Gaussian columns scaled by `i^-0.5` and rotated."""
    generator = stream(seed, "farms", "low-rank", count)
    rotation = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    scales = torch.arange(1, COLUMNS + 1) ** -0.5
    return torch.randn(count, COLUMNS, generator=generator) * scales @ rotation


LAWS: dict[str, Callable[[int, int], Tensor]] = {"Gaussian": _gaussian, "Student": _student, "low-rank": _low_rank}


def _full(weight: Tensor) -> float:
    return fit_alpha(torch.linalg.svdvals(weight).square()).alpha


def _windows(weight: Tensor) -> float:
    return farms({"w": weight}, rows=64).layers[0].alpha


def _weightwatcher() -> Callable[[Tensor], float] | None:
    """The package's own alpha of one matrix, or None if it is not installed."""
    try:
        weightwatcher: Any = importlib.import_module("weightwatcher")
    except ImportError:
        return None

    def measure(weight: Tensor) -> float:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight)
        return float(weightwatcher.WeightWatcher(model=layer).analyze()["alpha"].iloc[0])

    return measure


def _pruning(rows: list[dict[str, Any]], notes: list[str], context: Context) -> list[Check]:
    one, two, scores = sts_benchmark(context, "dev", 64 if context.quick else None)
    model, tokenizer = load_minilm()
    sides = [tokenized(tokenizer, texts) for texts in (one, two)]
    weights = weights_of(model)
    names = [name for name in weights if name.startswith("encoder.")]
    sizes = [math.prod(weights.shape(name)) for name in names]
    options: dict[str, Any] = {"method": "peak", "bins": 100}
    full = [fit_alpha(torch.linalg.svdvals(weights[name].float()).square(), **options).alpha for name in names]
    windows = farms({name: weights[name] for name in names}, rows=192, **options)
    chosen = {
        "uniform": dict.fromkeys(names, SPARSITY),
        "full matrix": dict(zip(names, pruning_ratios(full, sizes, SPARSITY, block=BLOCK))),
        "FARMS": dict(zip(names, pruning_ratios([windows.alphas[n] for n in names], sizes, SPARSITY, block=BLOCK))),
    }
    cosines = {"not pruned": _cosines(model, sides)}
    reached: dict[str, Mapping[str, float]] = {}
    for name, ratios in chosen.items():
        pruned = prune(copy.deepcopy(model), ratios)
        reached[name] = _zeros(pruned, names)
        cosines[name] = _cosines(pruned, sides)
    found = {name: _spearman(values, scores) for name, values in cosines.items()}
    intervals = _intervals(cosines, scores, 200 if context.quick else 2000)
    for name, value in found.items():
        low, high = intervals[name]
        row = {"part": "b", "ratios": name, "spearman": round(value, 2), "low": round(low, 2), "high": round(high, 2)}
        rows.append({**row, **{f"zeros in block {i}": round(v, 4) for i, v in reached.get(name, {}).items()}})
        context.say(f"{name}: Spearman {value:.2f} ({low:.2f} to {high:.2f})")
    low, high = intervals["FARMS - full matrix"]
    gain = found["FARMS"] - found["full matrix"]
    notes.append(
        f"(b) FARMS - full matrix: {gain:+.2f}, 95 % interval {low:+.2f} to {high:+.2f} over {len(one)} pairs, resampled."
    )
    return [Check("(b) Spearman (x 100), FARMS - full matrix", gain, ">=", -0.5)]


def _cosines(model: nn.Module, sides: list[list[dict[str, Tensor]]]) -> np.ndarray:
    one, two = (sentence_embeddings(model, side) for side in sides)
    return (one * two).sum(-1).numpy()


def _zeros(model: nn.Module, names: list[str]) -> dict[str, float]:
    """The share of zeros in each block of layers."""
    weights = weights_of(model)
    shares = {}
    for start in range(0, len(names), BLOCK):
        block = [weights[name] for name in names[start : start + BLOCK]]
        shares[str(start // BLOCK)] = sum(int((w == 0).sum()) for w in block) / sum(w.numel() for w in block)
    return shares


def _spearman(cosines: np.ndarray, scores: Tensor) -> float:
    return 100 * float(science("scipy.stats", "a rank correlation").spearmanr(cosines, scores.numpy())[0])


def _intervals(cosines: Mapping[str, np.ndarray], scores: Tensor, draws: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals over pairs, of each score and of the difference that is judged."""
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in (*cosines, "FARMS - full matrix")}
    for _ in range(draws):
        at = rng.integers(len(scores), size=len(scores))
        for name, values in cosines.items():
            drawn[name].append(_spearman(values[at], scores[at]))
        drawn["FARMS - full matrix"].append(drawn["FARMS"][-1] - drawn["full matrix"][-1])
    return {name: tuple(np.quantile(values, (0.025, 0.975)).tolist()) for name, values in drawn.items()}
