"""LoRA-SB against LoRA-XS, the same architecture with another start."""

from __future__ import annotations

from lowdim.adapters import LoRASB, LoRAXS
from lowdim.reproduce.settings.minilm_trec import TARGETS, best_rate, load_setting, lora_baseline, probe_accuracy
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

RATES = {8: (3e-3, 1e-2, 3e-2), 24: (1e-3, 3e-3, 1e-2)}
ALPHA = {8: 16, 24: 24}


def run(context: Context) -> Outcome:
    """MiniLM's last two layers on TREC at rank 8 and 24; the gradient comes from the first 64 training questions."""
    setting = load_setting(context)
    rows, checks = [], []
    for rank in (8,) if context.quick else (8, 24):
        sb = best_rate(
            context,
            setting,
            f"LoRA-SB rank {rank}",
            lambda lr, r=rank: LoRASB(rank=r, lr=1e-3, target_modules=TARGETS),
            RATES[rank],
        )
        xs = best_rate(
            context, setting, f"LoRA-XS rank {rank}", lambda lr, r=rank: LoRAXS(rank=r, alpha=ALPHA[r], target_modules=TARGETS),
            RATES[rank],
        )  # fmt: skip
        rows += [sb.row(), xs.row()]
        checks += [
            Check(f"test loss of LoRA-SB minus LoRA-XS, rank {rank}", sb.loss - xs.loss, "<=", 0.0),
            Check(f"accuracy of LoRA-SB minus LoRA-XS, rank {rank}", sb.accuracy - xs.accuracy, ">=", 0.0),
        ]
    rows.append(lora_baseline(context, setting).row())
    return Outcome(
        "lora-sb",
        "MiniLM, query and value of the last two layers, TREC, frozen head, 80 AdamW steps of 16 questions, 3 seeds, rate "
        "picked on 500 further training questions.",
        rows=rows,
        checks=checks,
        notes=[
            f"Linear probe on the untouched model: {probe_accuracy(setting):.3f}.",
            "Only the comparison with LoRA-XS is checked; on this small task neither passes LoRA, whose row is for scale.",
        ],
    )
