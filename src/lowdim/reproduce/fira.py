"""Fira: better than GaLore from the same optimizer state, and not behind full-rank Adam."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from lowdim.linalg import stream
from lowdim.optim import Fira, GaLore, state_bytes
from lowdim.reproduce.settings import tiny_lm
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

_RANK, _INTERVAL = 16, 50
_PROJECTED = (0.005, 0.01, 0.02, 0.03, 0.06)
_RATES = {"Fira": _PROJECTED, "GaLore": _PROJECTED, "AdamW": (0.0025, 0.005)}
_REST = 0.005
_SHAPES, _TURNS = ((2048, 2048), (2048, 5504)), 15


def run(context: Context) -> Outcome:
    """The language model by AdamW, GaLore and Fira, the two projected ones at five rates each."""
    outcome = Outcome(
        "fira",
        f"Tiny Shakespeare by characters, 2 blocks of width 64, 300 steps; the 8 matrices at rank {_RANK}, a new subspace every"
        f" {_INTERVAL} steps (GaLore: scale 0.25; Fira: scale 1, limiter 1.01), the rest by AdamW {_REST}.",
    )
    corpus = tiny_lm.load_corpus(context)
    settings = tiny_lm.Settings(steps=8, warmup=2, valid_batches=1) if context.quick else tiny_lm.Settings()
    seeds = range(1 if context.quick else 3)
    mean: dict[str, float] = {}
    state: dict[str, int] = {}
    for name, rates in _RATES.items():
        for lr in rates[: 1 if context.quick else None]:
            losses = []
            for seed in seeds:
                loss, held = _train(corpus, settings, seed, name, lr, _REST)
                losses.append(loss)
                state[name] = held
                context.say(f"{name}, lr {lr:g}, seed {seed}: {loss:.4f}")
            label = f"{name}, lr {lr:g}"
            mean[label] = sum(losses) / len(losses)
            row = {"method": label, **{f"loss, seed {s}": round(v, 4) for s, v in zip(seeds, losses)}}
            outcome.rows.append({**row, "mean": round(mean[label], 4), "state of the matrices": state[name]})
    best = {name: min((k for k in mean if k.startswith(name)), key=lambda k: mean[k]) for name in _RATES}
    count = len(tiny_lm.matrices(tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed=0)))
    outcome.checks += [
        Check(f"mean loss of {best['GaLore']} - {best['Fira']}", mean[best["GaLore"]] - mean[best["Fira"]], ">=", 1e-6),
        Check(f"mean loss of {best['Fira']} <= full rank's + 0.05", mean[best["Fira"]], "<=", mean[best["AdamW"]] + 0.05),
        Check("bytes of state more than GaLore's, a matrix", (state["Fira"] - state["GaLore"]) / count, "<=", 4.0),
    ]
    outcome.notes += [
        "Learning rates: the best on the mean validation loss, of the same five for Fira and GaLore, of two for AdamW on the"
        f" matrices; what the three leave to it is trained by AdamW {_REST}.",
        "A small model and a short run: this shows an order, not the paper's perplexities.",
    ]
    if not context.quick:
        _with_a_higher_rate(outcome, context, corpus, settings)
        _time(outcome, context)
    return outcome


def _with_a_higher_rate(outcome: Outcome, context: Context, corpus: tiny_lm.Corpus, settings: tiny_lm.Settings) -> None:
    """The rest at 0.01: numbers, no inequality."""
    for name, lr in (("AdamW", 0.01), ("GaLore", 0.06), ("Fira", 0.03), ("Fira", 0.06)):
        loss, held = _train(corpus, settings, 0, name, lr, 0.01)
        context.say(f"the rest at 0.01: {name}, lr {lr:g}: {loss:.4f}")
        row = {"method": f"{name}, lr {lr:g}, the rest at 0.01", "loss, seed 0": round(loss, 4), "state of the matrices": held}
        outcome.rows.append(row)


def _train(
    corpus: tiny_lm.Corpus, settings: tiny_lm.Settings, seed: int, name: str, lr: float, rest: float
) -> tuple[float, int]:
    """Validation loss, and bytes of state of the eight matrices."""
    model = tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed)
    hidden = tiny_lm.matrices(model)
    optimizers = [_make(name, hidden, lr), torch.optim.AdamW(_others(model, hidden), lr=rest, weight_decay=0.0)]
    loss = tiny_lm.train(model, corpus, optimizers, settings, seed)
    return loss, state_bytes(optimizers[0])


def _make(name: str, hidden: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(hidden, lr=lr, weight_decay=0.0)
    if name == "GaLore":
        return GaLore(hidden, lr=lr, rank=_RANK, update_interval=_INTERVAL, scale=0.25)
    return Fira(hidden, lr=lr, rank=_RANK, update_interval=_INTERVAL)


def _others(model: nn.Module, hidden: list[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not any(p is q for q in hidden)]


def _time(outcome: Outcome, context: Context) -> None:
    """One step on large matrices, between choices of subspaces, alternating with GaLore and fused AdamW: numbers only."""
    for shape in _SHAPES:
        draw = stream(0, "fira", "time", *shape)
        grad = torch.randn(shape, generator=draw)
        made: dict[str, tuple[torch.optim.Optimizer, nn.Parameter]] = {}
        for name in ("AdamW, fused", "GaLore", "Fira"):
            p = nn.Parameter(torch.randn(shape, generator=draw))
            p.grad = grad
            made[name] = (_large(name, p), p)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(_TURNS + 2):  # the first chooses a subspace, the second warms up
            for name, (optimizer, _p) in made.items():
                start = time.perf_counter()
                optimizer.step()
                seconds[name].append(time.perf_counter() - start)
        plain = seconds["AdamW, fused"][2:]
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values[2:], plain))
            row = {"method": f"one step on {shape[0]} x {shape[1]}, rank 128: {name}"}
            row |= {"milliseconds": round(statistics.median(values[2:]) * 1e3, 1), "to fused AdamW": round(ratio, 2)}
            outcome.rows.append({**row, "state of the matrices": state_bytes(made[name][0])})
            context.say(f"{row['method']}: {row['milliseconds']} ms, {row['to fused AdamW']} of fused AdamW's")


def _large(name: str, p: nn.Parameter) -> torch.optim.Optimizer:
    if name == "GaLore":
        return GaLore([p], rank=128, update_interval=10**9)
    if name == "Fira":
        return Fira([p], rank=128, update_interval=10**9)
    return torch.optim.AdamW([p], weight_decay=0.0, fused=True)
