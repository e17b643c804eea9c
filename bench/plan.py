"""Forecasts compared with measured training: `python bench/plan.py` writes results/plan.json and prints the table.

For each model and method, in a process of its own: the forecast, the allocator's peak over the first two steps, and the time
and the growth of the process's resident memory over one further step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lowdim.catalogue import methods, variant
from lowdim.methods import apply
from lowdim.models import head_modules, load_model
from lowdim.plan import forecast, measure
from lowdim.units import format_bytes

RESULTS = Path(__file__).parents[1] / "results" / "plan.json"
BATCH, LENGTH = 16, 128
CASES = (("minilm", "classify"), ("stories260k", "causal-lm"))


def batch_of(model: Any, task: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH), generator=generator)
    if task == "causal-lm":
        return {"input_ids": ids, "labels": ids.clone()}
    lengths = torch.randint(LENGTH // 4, LENGTH, (BATCH, 1), generator=generator)
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (BATCH,), generator=generator)}


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def one(name: str, task: str, method: str) -> dict:
    predicted = forecast(name, method, task=task, batch_size=BATCH, sequence_length=LENGTH)
    model = load_model(name, task).train()
    batches = [batch_of(model, task, seed) for seed in range(2)]
    applied = apply(
        variant(method), model, lr=1e-3, steps=100, head=head_modules(model, task), batches=iter(batches), loss_fn=loss_of
    )
    applied.model.train()
    optimizer = applied.start(1e-3)
    applied.model.zero_grad(set_to_none=True)
    batch = batches[0]

    def step() -> None:
        applied.loss(batch, loss_of).total.backward()
        optimizer.step()
        applied.after_step(optimizer)
        optimizer.zero_grad()

    measured = measure(lambda: (step(), step()), model=applied.model, optimizer=optimizer, tensors=batch.values())
    row = {
        "model": name,
        "task": task,
        "method": method,
        "label": predicted.label,
        "trained_parameters": applied.trained(),
        "forecast": predicted.to_dict(),
        "measured_bytes": measured.bytes,
        "ratio": round(predicted.total / measured.bytes, 4),
    }
    return {**row, **resident(step, applied.model, optimizer)}


def resident(step, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Seconds of one step, and by how much the process grew in it beyond what the allocator handed out (Linux only)."""
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    inside = measure(step, model=model, optimizer=optimizer)
    row = {"seconds_per_step": round(seconds, 4)}
    if not sys.platform.startswith("linux"):
        return row
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step()
    growth = status("VmHWM") - before
    return {**row, "resident_growth": growth, "allocator_growth": inside.bytes - inside.start_bytes, "process": before}


def seven_billion(selection: str) -> dict:
    """Forecasts for Llama 2 7B in bfloat16, one sequence of 2,048 tokens, checkpointing; and how long they took."""
    from transformers import LlamaConfig

    rows, start = [], time.perf_counter()
    for chosen in methods(selection):
        if chosen.name == "linear-probe":
            continue
        how = {"task": "causal-lm", "batch_size": 1, "sequence_length": 2048, "dtype": torch.bfloat16}
        begin = time.perf_counter()
        rows.append(forecast(LlamaConfig(), chosen, gradient_checkpointing=True, **how).to_dict())
        rows[-1]["forecast_seconds"] = round(time.perf_counter() - begin, 2)
    return {"seconds": round(time.perf_counter() - start, 1), "rows": rows}


def status(key: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TASK", "METHOD"))
    parser.add_argument("--methods", default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    rows = []
    for name, task in CASES:
        for chosen in methods(options.methods):
            if chosen.name == "linear-probe" and task == "causal-lm":
                continue  # no new head
            command = [sys.executable, __file__, "--one", name, task, chosen.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{name} {chosen.name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            total, took = row["forecast"]["total"], row["measured_bytes"]
            print(
                f"{name:12} {row['label']:18} forecast {format_bytes(total):>9} measured {format_bytes(took):>9} "
                f"ratio {row['ratio']:.4f}  {row['forecast']['seconds_per_step']:.3g} s forecast, "
                f"{row['seconds_per_step']:.3g} s taken",
                flush=True,
            )
    large = seven_billion(options.methods)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lowdim")}
    record = {
        "settings": {"batch_size": BATCH, "sequence_length": LENGTH, "dtype": "float32", "threads": 1},
        "environment": {"python": platform.python_version(), **versions, "cpu": processor()},
        "rows": rows,
        "seven_billion": large,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
