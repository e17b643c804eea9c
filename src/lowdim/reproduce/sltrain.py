"""SLTrain against low-rank layers on a small language model, and what carries the spectrum of its weights."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowdim.layers import SLTrainLinear, swap_linear
from lowdim.linalg import derive_seed
from lowdim.modules import LowRankLinear
from lowdim.plan.kept import kept_bytes
from lowdim.reproduce.settings import tiny_lm
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.reproduce.settings.paired_timing import WIDTH, four_layers, step_pairs

__all__ = ["run"]

RANK, DENSITY, RATES = 8, 0.1, (0.005, 0.01, 0.02)
DENSE_RATES = (0.0025, 0.005, 0.01)
DENSE, LOW, SPARSE = "dense", f"low rank {RANK}", f"SLTrain {RANK}, density {DENSITY:g}"


def run(context: Context) -> Outcome:
    """Four arms at three rates, best rate of each; then the singular values of the trained weights."""
    corpus = tiny_lm.load_corpus(context)
    settings = tiny_lm.Settings(steps=30 if context.quick else 300)
    seeds, rates = ((0,), RATES[1:2]) if context.quick else ((0, 1, 2), RATES)
    alike = _rank_of_equal_size(corpus.vocabulary, settings)
    outcome = Outcome(
        "sltrain",
        f"Tiny Shakespeare by characters, 2 blocks of width 64, {settings.steps} steps, AdamW; qkv, proj, fc1 and fc2 replaced,"
        f" alpha = rank; low-rank layers with both factors Kaiming-uniform; the best rate of {', '.join(map(str, rates))}"
        f" (dense: of {', '.join(map(str, DENSE_RATES))}) by the mean over seeds {', '.join(map(str, seeds))}",
    )
    arms: dict[str, dict[str, Any]] = {
        DENSE: {},
        LOW: {"rank": RANK},
        f"low rank {alike}": {"rank": alike},
        SPARSE: {"rank": RANK, "density": DENSITY},
    }
    mean: dict[str, float] = {}
    best: dict[str, float] = {}
    models: dict[float, nn.Module] = {}
    for name, how in arms.items():
        for rate in rates if name != DENSE or context.quick else DENSE_RATES:
            losses: list[float] = []
            count = 0
            for seed in seeds:
                model = _build(corpus.vocabulary, settings, seed, how)
                count = sum(p.numel() for layer in _layers(model) for p in layer.parameters())
                optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
                losses.append(tiny_lm.train(model, corpus, [optimizer], settings, seed))
                context.say(f"{name}, rate {rate:g}, seed {seed}: {losses[-1]:.4f}")
                if name == SPARSE and seed == 0:
                    models[rate] = model
            average = statistics.mean(losses)
            row = {f"loss, seed {s}": round(v, 4) for s, v in zip(seeds, losses)}
            outcome.rows.append({"arm": name, "rate": rate, "parameters": count, **row, "mean": round(average, 4)})
            if average < mean.get(name, float("inf")):
                mean[name], best[name] = average, rate
    bound = mean[LOW] - 0.005
    outcome.checks.append(Check("mean loss, SLTrain, <= low rank at the same rank - 0.005", mean[SPARSE], "<=", bound))
    _spectrum(outcome, models[best[SPARSE]], best[SPARSE])
    _memory(outcome)
    outcome.notes += [
        f"At equal size, {mean[SPARSE]:.4f} (SLTrain) and {mean[f'low rank {alike}']:.4f} (low rank {alike}); between these two"
        " no inequality was asked for.",
        f"Dense layers at their best rate end at {mean[DENSE]:.4f}: one small model and 300 steps say nothing about the"
        " gap to full rank; the paper's 60M to 7B models were not trained.",
    ]
    return outcome


def _build(vocabulary: int, settings: tiny_lm.Settings, seed: int, how: dict[str, Any]) -> nn.Module:
    model = tiny_lm.TinyTransformer(vocabulary, settings, seed)
    if not how:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "sltrain", "layers"))
        if "density" in how:
            return swap_linear(model, SLTrainLinear, tiny_lm.MATRICES, fresh=True, alpha=how["rank"], seed=None, **how)
        return swap_linear(model, LowRankLinear, tiny_lm.MATRICES, fresh=True, alpha=how["rank"], **how)


def _layers(model: nn.Module) -> list[Any]:
    """The eight that are replaced, as they are now."""
    return [layer for name, layer in model.named_modules() if name.rpartition(".")[2] in tiny_lm.MATRICES]


def _rank_of_equal_size(vocabulary: int, settings: tiny_lm.Settings) -> int:
    """The low rank whose parameter count is nearest to SLTrain's."""
    layers = _layers(_build(vocabulary, settings, 0, {"rank": RANK, "density": DENSITY}))
    sides = sum(layer.in_features + layer.out_features for layer in layers)
    return RANK + round(sum(layer.values.numel() for layer in layers) / sides)


@torch.no_grad()
def _spectrum(outcome: Outcome, model: nn.Module, rate: float) -> None:
    """Sum of squared singular values above the rank, of the trained W and of its sparse part."""
    tails, kinds, full = [], [], True
    for layer in _layers(model):
        weight = layer.dense_weight().double()
        sparse = weight - layer.scaling * (layer.B.double() @ layer.A.double())
        values = torch.linalg.svdvals(weight)
        full &= int(torch.linalg.matrix_rank(weight)) == min(weight.shape)
        tails.append([float(v[layer.rank :].square().sum()) for v in (values, torch.linalg.svdvals(sparse))])
        kinds.append(float(values[layer.rank :].square().sum() / values.square().sum()))
    ratios = [w / s for w, s in tails]
    total = sum(w for w, _ in tails) / sum(s for _, s in tails)
    outcome.rows.append(
        {
            "arm": f"spectrum above {RANK}, rate {rate:g}, seed 0",
            "of W to of S": round(total, 4),
            "least of the 8": round(min(ratios), 4),
            "share of W's energy": [round(k, 4) for k in (min(kinds), max(kinds))],
            "full rank": full,
        }
    )
    outcome.checks += [
        Check("energy above rank r, W to S, least of 8 matrices", min(ratios), ">=", 0.9),
        Check("matrices of full rank, of 8", sum(1 for _ in ratios) if full else 0, ">=", len(ratios)),
    ]


class _Composed(SLTrainLinear):
    """The same weight, composed by plain operations of autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense_weight(), self.bias)


def _memory(outcome: Outcome) -> None:
    """Memory for the backward pass and the time of a step, compared with plain layers and plain autograd."""
    found: dict[str, tuple[int, int, float]] = {}
    for name, kind in (("SLTrain", SLTrainLinear), ("composed by autograd", _Composed)):
        plain, x, _ = four_layers()
        model, _, targets = four_layers()
        swap_linear(model, kind, targets, rank=WIDTH // 8, density=0.03, fresh=True, seed=0)
        ratio = step_pairs(model, plain, x, 15).ratio()
        layer, rows = model.get_submodule(targets[0]), x.requires_grad_(True)
        found[name] = kept_bytes(layer, rows), sum(p.numel() for p in layer.parameters()), ratio
        row = {"arm": f"one layer {WIDTH} x {WIDTH}, rank {WIDTH // 8}, {len(x)} rows: {name}", "bytes kept": found[name][0]}
        outcome.rows.append({**row, "parameters": found[name][1], "step's time to nn.Linear's": round(ratio, 3)})
    outcome.checks.append(
        Check("bytes kept for backward, beyond the layer's own, are the input's", found["SLTrain"][0] / x.nbytes, "<=", 1.0)
    )
