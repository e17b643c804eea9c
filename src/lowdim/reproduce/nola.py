"""NOLA against LoRA of rank 1 with twice the numbers, and what a step takes with the bases drawn again or held."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowdim
from lowdim.adapters import NOLA, LoRA
from lowdim.plan import measure
from lowdim.reproduce.settings.minilm_trec import TARGETS, best_rate, load_setting, probe_accuracy
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.reproduce.settings.paired_timing import four_layers, step_pairs

__all__ = ["run"]

CHUNK = 4 << 18  # bytes of the numbers that are drawn at once


def run(context: Context) -> Outcome:
    """MiniLM's last two layers on TREC; then peak memory and time of a step."""
    setting = load_setting(context)
    nola = best_rate(
        context,
        setting,
        "NOLA rank 8, 192 bases",
        lambda lr: NOLA(rank=8, num_bases=192, alpha=8, target_modules=TARGETS),
        (1e-2, 3e-2),
    )
    lora = best_rate(
        context, setting, "LoRA rank 1, alpha 2", lambda lr: LoRA(rank=1, alpha=2, target_modules=TARGETS), (3e-3, 1e-2)
    )
    rows = [{"part": "a", **score.row()} for score in (nola, lora)]
    costs, beyond = _costs(context)
    return Outcome(
        "nola",
        "(a) MiniLM, query and value of the last two layers, TREC, frozen head, 80 AdamW steps of 16 questions, 3 seeds, rate "
        "picked on 500 further training questions; (b) a training step of four layers 384x384 and a head on 512 rows, rank 16.",
        rows=[*rows, *costs],
        checks=[
            Check("(a) accuracy of NOLA minus LoRA rank 1", nola.accuracy - lora.accuracy, ">=", -0.01),
            Check("(a) trained numbers, NOLA / LoRA", nola.trained / lora.trained, "<=", 0.5),
            Check("(b) peak of a step, 512 bases minus 64, over a chunk", beyond / CHUNK, "<=", 1.0),
        ],
        notes=[
            f"Linear probe on the untouched model: {probe_accuracy(setting):.3f}.",
            "One small task, standard error of an accuracy about 1.2 points.",
            "(b) times are of pairs of steps, turn by turn, against our LoRA of rank 1; peaks are those of torch's allocator.",
        ],
    )


def _costs(context: Context) -> tuple[list[dict[str, Any]], int]:
    """Rows of the table, and by how much the peak with 512 bases exceeds that with 64, where they are drawn again."""
    _, x, targets = four_layers()
    rows, peaks = [], {}
    for materialize in ("recompute", "cache"):
        for count in (64, 512):
            method = NOLA(rank=16, num_bases=count, materialize=materialize, target_modules=targets)
            with torch.enable_grad():
                model, plain = (lowdim.adapt(four_layers()[0], m).model for m in (method, LoRA(rank=1, target_modules=targets)))
                pairs = step_pairs(model, plain, x, 3 if context.quick else 15, warm=2)
                peaks[materialize, count] = _peak(model, x)
            ours, theirs = pairs.milliseconds()
            rows.append({
                "part": "b", "method": f'NOLA rank 16, {count} bases, "{materialize}"', "step ms": round(ours, 1),
                "LoRA rank 1 ms": round(theirs, 1), "peak MiB": round(peaks[materialize, count] / 2**20, 1),
            })  # fmt: skip
    return rows, peaks["recompute", 512] - peaks["recompute", 64]


def _peak(model: nn.Module, x: torch.Tensor) -> int:
    model.zero_grad()
    return measure(lambda: model(x).square().mean().backward(), model=model, tensors=[x]).bytes
