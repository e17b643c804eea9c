"""Restarts of low-rank training: balanced factors and forgotten moments, on a small language model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowdim.layers import swap_linear
from lowdim.linalg import derive_seed
from lowdim.modules import LowRankLinear
from lowdim.optim import Restart, quick_recovery_cosine
from lowdim.reproduce.settings import tiny_lm
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

RANK, RATE, RECOVERY, APART = 8, 0.005, 5, 10.0


@dataclass(frozen=True)
class _Recovering(tiny_lm.Settings):
    """The set-up with the learning rate of the paper."""

    interval: int = 100

    def rate(self, step: int) -> float:
        return quick_recovery_cosine(
            step,
            total_steps=self.steps,
            warmup_steps=self.warmup,
            restart_interval=self.interval,
            recovery_steps=RECOVERY,
            min_ratio=self.final,
        )


def run(context: Context) -> Outcome:
    """Plain, refactorized, reset and both; then the same from a start whose factors are far apart in size."""
    corpus = tiny_lm.load_corpus(context)
    steps, seeds = (30, (0,)) if context.quick else (300, (0, 1, 2))
    interval = steps // 3
    sizes = {"steps": steps, "warmup": min(40, interval)}
    cosine, recovering = tiny_lm.Settings(**sizes), _Recovering(**sizes, interval=interval)
    outcome = Outcome(
        "pretrain-bench",
        f"Tiny Shakespeare by characters, 2 blocks of width 64, {steps} steps, qkv, proj, fc1 and fc2 as LowRankLinear of rank "
        f"{RANK}, alpha = rank, AdamW {RATE}; a restart every {interval} steps, {RECOVERY} steps of recovery; seeds "
        f"{', '.join(map(str, seeds))}; ill-balanced: B times {APART:g}, A divided by {APART:g}",
    )
    both = {"interval": interval}
    arms: dict[str, tuple[tiny_lm.Settings, dict[str, Any] | None, float]] = {
        "plain, cosine": (cosine, None, 1.0),
        "plain, quick recovery": (recovering, None, 1.0),
        "refactorize only": (recovering, {**both, "reset": False}, 1.0),
        "reset only": (recovering, {**both, "refactorize": False}, 1.0),
        "both": (recovering, both, 1.0),
        "both, cosine with Restart(recovery_steps=5)": (cosine, {**both, "recovery_steps": RECOVERY}, 1.0),
        "ill-balanced, plain": (cosine, None, APART),
        "ill-balanced, refactorized after step 1": (cosine, {"reset": False, "once": True}, APART),
        "ill-balanced, both": (recovering, both, APART),
    }
    mean = {}
    for name, (settings, how, apart) in arms.items():
        losses = []
        for seed in seeds:
            model = _build(corpus.vocabulary, settings, seed, apart)
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
            if how is not None:
                act = _restarting(optimizer, model, how)
                optimizer.register_step_post_hook(lambda *_, act=act: act())  # type: ignore[misc]
            losses.append(tiny_lm.train(model, corpus, [optimizer], settings, seed))
            context.say(f"{name}, seed {seed}: {losses[-1]:.4f}")
        mean[name] = statistics.mean(losses)
        row = {f"loss, seed {s}": round(v, 4) for s, v in zip(seeds, losses)}
        outcome.rows.append({"arm": name, **row, "mean": round(mean[name], 4)})
    ill = mean["ill-balanced, plain"]
    outcome.checks += [
        Check("mean loss, both, <= plain + 0.01", mean["both"], "<=", mean["plain, cosine"] + 0.01),
        Check(
            "mean loss, ill-balanced and refactorized once, <= not - 0.05",
            mean["ill-balanced, refactorized after step 1"],
            "<=",
            ill - 0.05,
        ),
    ]
    outcome.notes += [
        f"From a balanced start: {mean['both'] - mean['plain, cosine']:+.4f} for both against plain, mean over the seeds.",
        f"Quick recovery also ramps the first {RECOVERY} steps of all, as in the authors' function.",
        "The last restart falls on the last step, after which nothing is trained.",
        "The paper's models (60M to 1B), and its comparison with GaLore and Fira, were not trained.",
    ]
    return outcome


def _build(vocabulary: int, settings: tiny_lm.Settings, seed: int, apart: float) -> nn.Module:
    model = tiny_lm.TinyTransformer(vocabulary, settings, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "pretrain-bench", "layers"))
        swap_linear(model, LowRankLinear, tiny_lm.MATRICES, fresh=True, rank=RANK, alpha=RANK)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LowRankLinear):
                layer.B.mul_(apart)
                layer.A.div_(apart)
    return model


def _restarting(optimizer: torch.optim.Optimizer, model: nn.Module, how: dict[str, Any]) -> Callable[[], Any]:
    """What to call after each optimizer step."""
    options = {key: value for key, value in how.items() if key != "once"}
    if "once" not in how:
        return Restart(optimizer, model, **options).step
    restart = Restart(optimizer, model, interval=1, **options)
    return lambda: restart.step() if restart.steps == 0 else None
