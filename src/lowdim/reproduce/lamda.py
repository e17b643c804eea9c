"""LaMDA against LoRA: accuracy, parameter updates per step, and bytes kept for the backward pass."""

from __future__ import annotations

import torch
from torch import nn

import lowdim
from lowdim.adapters import LaMDA, LoRA, Method
from lowdim.plan.kept import kept_bytes
from lowdim.reproduce.settings.minilm_trec import TARGETS, best_rate, load_setting, lora_baseline, probe_accuracy, steps_of
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

RATES = (1e-3, 3e-3, 1e-2)


def run(context: Context) -> Outcome:
    """MiniLM's last two layers on TREC, LaMDA of rank 8 and 32 and LaMDA++ against LoRA of rank 8; then kept bytes."""
    setting = load_setting(context)
    total = steps_of(context)
    lora = lora_baseline(context, setting)

    def lamda(rank: int, choices: tuple[int, ...] | None = None):
        return lambda lr: LaMDA(rank=rank, total_steps=total, target_modules=TARGETS, rank_choices=choices)

    eight = best_rate(context, setting, "LaMDA rank 8", lamda(8), RATES)
    others = [] if context.quick else [
        best_rate(context, setting, "LaMDA rank 32", lamda(32), RATES),
        best_rate(context, setting, "LaMDA++ ranks 4, 12 (mean 8)", lamda(8, (4, 12)), RATES),
    ]  # fmt: skip
    kept = {type(m).__name__: _kept(m) for m in (LoRA(rank=32), LaMDA(rank=32))}
    outcome = Outcome(
        "lamda",
        "MiniLM, query and value of the last two layers, TREC, frozen head, 80 AdamW steps of 16 questions, 3 seeds, rate "
        "picked on 500 further training questions.",
        rows=[score.row() for score in (lora, eight, *others)],
        checks=[
            Check("accuracy of LaMDA rank 8 minus LoRA rank 8", eight.accuracy - lora.accuracy, ">=", -0.03),
            Check("updates per step, LaMDA rank 8 / LoRA", eight.updates_per_step / lora.updates_per_step, "<=", 1 / 6),
            Check("bytes kept for backward, LaMDA / LoRA, rank 32", kept["LaMDA"] / kept["LoRA"], "<=", 0.65),
        ],
        notes=[
            f"Linear probe on the untouched model: {probe_accuracy(setting):.3f}.",
            f"Kept bytes: 4 linear layers 384x384 with GELU, rank 32, 512 rows: LoRA {kept['LoRA'] / 2**20:.2f} MiB, "
            f"LaMDA {kept['LaMDA'] / 2**20:.2f} MiB.",
            "One small task, standard error of an accuracy about 1.2 points: this shows a match within 3 points at most.",
            "LaMDA++'s rule is an equivalent in spirit; the paper's formula was not at hand.",
        ],
    )
    return outcome


def _kept(method: Method) -> int:
    """Bytes that autograd saves for four adapted linear layers 384x384 with GELU on 512 rows."""
    torch.manual_seed(0)
    model = nn.Sequential(*[module for _ in range(4) for module in (nn.Linear(384, 384), nn.GELU())])
    lowdim.adapt(model, method)
    return kept_bytes(model, torch.randn(512, 384))
