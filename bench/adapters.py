"""A training step of our adapters against PEFT's at the same shapes: time, and bytes that autograd keeps.

    python bench/adapters.py [--quick] [--out results/bench-adapters.json]

Both run in one process, turn by turn, so that other load on the machine falls on both; the figure is the median of the
ratios of neighbouring steps. A step is forward, backward and one AdamW step of four square layers with GELU between them, on
512 tokens in float32 on one thread. Kept bytes are the distinct storages that autograd saves, without the model's own
parameters and buffers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import peft
import torch
from torch import nn

import lowdim
from lowdim.adapters import LaMDA, LoRA, LoRAXS, RandLoRA, SVFit
from lowdim.reproduce.kept import kept_tensors

TOKENS, LAYERS = 512, 4
TARGETS = {"time": 1.0, "kept": 1.0, "LaMDA kept of LoRA's": 0.65}


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(LAYERS):
        parts += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*parts)


def names() -> list[str]:
    return [str(2 * i) for i in range(LAYERS)]


def ours(width: int, method) -> nn.Module:
    return lowdim.adapt(network(width), method).model


def theirs(width: int, config) -> nn.Module:
    return peft.get_peft_model(network(width), config)


def stepper(model: nn.Module, width: int):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randn(4, TOKENS // 4, width)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """With the loss, as in a step."""
    kept = kept_tensors(lambda: model(x).square().mean(), model)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def compare(width: int, mine: nn.Module, other: nn.Module, steps: int) -> dict[str, float]:
    a, b = stepper(mine, width), stepper(other, width)
    a(), b(), a(), b()
    pairs = []
    for i in range(steps):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        t = first(), second()
        pairs.append(t if i % 2 == 0 else t[::-1])
    x = torch.randn(4, TOKENS // 4, width)
    kept = kept_bytes(mine, x), kept_bytes(other, x)
    return {
        "ours_ms": round(1e3 * statistics.median(p[0] for p in pairs), 2),
        "peft_ms": round(1e3 * statistics.median(p[1] for p in pairs), 2),
        "time_ratio": round(statistics.median(p[0] / p[1] for p in pairs), 3),
        "ours_kept_mib": round(kept[0] / 2**20, 3),
        "peft_kept_mib": round(kept[1] / 2**20, 3),
        "kept_ratio": round(kept[0] / kept[1], 3),
        "steps": steps,
    }


def run(widths: list[int]) -> list[dict]:
    rows = []
    for width in widths:
        steps = {768: 41, 2048: 25}.get(width, 15)
        lora = theirs(width, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names()))
        row = {"method": "LoRA", "rank": 8, "width": width, "against": "peft LoRA r=8"}
        rows.append({**row, **compare(width, ours(width, LoRA(rank=8)), lora, steps)})
        print(rows[-1], flush=True)
        for method in (LaMDA(rank=8), LoRAXS(rank=8), SVFit(rank=8)):
            row = {"method": type(method).__name__, "rank": 8, "width": width, "against": "peft LoRA r=8"}
            rows.append({**row, **compare(width, ours(width, method), lora, max(5, steps // 3))})
            print(rows[-1], flush=True)
        config = peft.RandLoraConfig(r=32, randlora_alpha=64, target_modules=names())
        row = {"method": "RandLoRA", "rank": 32, "width": width, "against": "peft RandLoRA r=32"}
        rows.append({**row, **compare(width, ours(width, RandLoRA(rank=32)), theirs(width, config), max(11, steps // 3))})
        print(rows[-1], flush=True)
    return rows


def verdicts(rows: list[dict]) -> list[str]:
    out = []
    for row in rows:
        who = f"{row['method']} {row['width']}"
        if row["method"] in ("LoRA", "RandLoRA"):
            for key in ("time", "kept"):
                met = "met" if row[f"{key}_ratio"] <= TARGETS[key] else "MISSED"
                out.append(f"{who}: {key} {row[f'{key}_ratio']} x peft's (target {TARGETS[key]}): {met}")
        if row["method"] == "LaMDA":
            share = row["ours_kept_mib"] / next(
                r["ours_kept_mib"] for r in rows if r["method"] == "LoRA" and r["width"] == row["width"]
            )
            met = "met" if share <= TARGETS["LaMDA kept of LoRA's"] else "MISSED"
            out.append(f"{who}: keeps {share:.3f} of what our LoRA keeps (target 0.65): {met}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="768 only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    rows = run([768] if args.quick else [768, 2048, 4096])
    result = {
        "what": (__doc__ or "").strip().splitlines()[0],
        "rows": rows,
        "verdicts": verdicts(rows),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": peft.__version__,
            "lowdim": lowdim.__version__,
            "cpu": _cpu(),
            "threads": torch.get_num_threads(),
        },
        "seconds": round(time.time() - start, 1),
    }
    print("\n".join(result["verdicts"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
