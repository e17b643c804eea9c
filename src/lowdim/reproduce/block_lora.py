"""Block-LoRA against LoRA of the same rank: a classification task, the run it equals, and the cost of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lowdim
from lowdim.adapters import BlockLoRA, LoRA
from lowdim.plan.kept import kept_bytes
from lowdim.reproduce.settings.minilm_trec import TARGETS, best_rate, load_setting, lora_baseline, probe_accuracy
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.reproduce.settings.paired_timing import four_layers, step_pairs

__all__ = ["run"]

RATES = (1e-3, 3e-3, 1e-2)


def run(context: Context) -> Outcome:
    """MiniLM's last two layers on TREC with 2 and 8 blocks; ten SGD steps next to a LoRA of one block's rank; a step's cost."""
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    notes: list[str] = []
    _classification(context, rows, checks, notes)
    checks.append(Check("(b) ΔW against a LoRA of rank q whose B learns faster, relative", _difference(), "<=", 1e-10))
    _cost(context, rows, checks, notes)
    return Outcome(
        "block-lora",
        "(a) MiniLM, query and value of the last two layers, TREC, frozen head, 80 AdamW steps of 16 questions, 3 seeds, rate "
        "picked on 500 further training questions; (b) ten SGD steps in float64; (c) a training step of four layers 384x384 "
        "and a head on 512 rows against PEFT's LoRA of the same rank 32.",
        rows,
        checks,
        [*notes, "CLIP, the paper's own subject, was not run."],
    )


def _classification(context: Context, rows: list[dict[str, Any]], checks: list[Check], notes: list[str]) -> None:
    setting = load_setting(context)
    lora = lora_baseline(context, setting)

    def blocks(n: int):
        return lambda lr: BlockLoRA(rank=8, blocks=n, alpha=16, dropout=0.0, target_modules=TARGETS)

    two, eight = (best_rate(context, setting, f"Block-LoRA rank 8, {n} blocks", blocks(n), RATES) for n in (2, 8))
    one = best_rate(
        context, setting, "LoRA rank 1, alpha 2", lambda lr: LoRA(rank=1, alpha=2, target_modules=TARGETS), (3e-3, 1e-2)
    )
    rows += [{"part": "a", **score.row()} for score in (lora, two, eight, one)]
    checks += [
        Check("(a) accuracy with 2 blocks minus LoRA rank 8", two.accuracy - lora.accuracy, ">=", -0.01),
        Check("(a) trained numbers, 2 blocks / LoRA", two.trained / lora.trained, "<=", 3 / 4),
        Check("(a) accuracy with 8 blocks minus LoRA rank 8", eight.accuracy - lora.accuracy, ">=", -0.02),
        Check("(a) trained numbers, 8 blocks / LoRA", eight.trained / lora.trained, "<=", 9 / 16),
    ]
    notes += [
        f"Linear probe on the untouched model: {probe_accuracy(setting):.3f}.",
        "Block-LoRA is a LoRA of rank / blocks (part b); the row of LoRA rank 1 says how much rank this task needs.",
        "One small task, standard error of an accuracy about 1.2 points.",
    ]


def _difference() -> float:
    """Largest difference of ΔW after ten SGD steps, over the largest entry."""
    n, rank, out, width = 3, 6, 24, 16
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(32, size, generator=generator, dtype=torch.float64) for size in (width, out))
    layer = nn.Linear(width, out, dtype=torch.float64)
    blocks = BlockLoRA(rank=rank, blocks=n, alpha=rank, dropout=0.0).attach(layer)
    lora = LoRA(rank=rank // n, alpha=rank // n).attach(layer)
    with torch.no_grad():
        lora.get_parameter("update.A").copy_(blocks.get_parameter("update.A"))
    for adapted, factor in ((blocks, 1), (lora, n)):
        A, B = adapted.get_parameter("update.A"), adapted.get_parameter("update.B")
        optimizer = torch.optim.SGD([{"params": [A]}, {"params": [B], "lr": 0.5 * factor}], lr=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            with torch.enable_grad():
                (adapted(x) - target).square().mean().backward()
            optimizer.step()
    want = lora.delta()
    return float((blocks.delta() - want).abs().max() / want.abs().max())


def _cost(context: Context, rows: list[dict[str, Any]], checks: list[Check], notes: list[str]) -> None:
    try:
        import peft
    except ImportError:
        notes.append("(c) was left out: PEFT is not installed.")
        return
    model, x, targets = four_layers()
    with torch.enable_grad():
        method = BlockLoRA(rank=32, blocks=4, dropout=0.0, target_modules=targets)
        ours = lowdim.adapt(model, method).model
        theirs = peft.get_peft_model(four_layers()[0], peft.LoraConfig(r=32, target_modules=targets))
        pairs = step_pairs(ours, theirs, x, 5 if context.quick else 40)
        kept = kept_bytes(ours, x), kept_bytes(theirs, x)
    for name, ms, held in zip(
        ("Block-LoRA rank 32, 4 blocks", f"peft {peft.__version__} LoRA rank 32"), pairs.milliseconds(), kept
    ):
        rows.append({"part": "c", "method": name, "step ms": round(ms, 1), "kept MiB": round(held / 2**20, 2)})
    checks += [
        Check("(c) step time, lowdim / peft (median of pairs)", pairs.ratio(), "<=", 1.0),
        Check("(c) kept bytes, lowdim / peft", kept[0] / kept[1], "<=", 1.0),
    ]
