"""Forecasts compared with measured training: `python bench/plan.py` writes results/plan.json and prints the table.

For each model, setting and method, in a process of its own: the forecast, the allocator's peak over the first two steps, and
the time and the growth of the process's resident memory over one further step. Then forecasts of a model of 7 B parameters, and
the time that `lowdim plan` takes for them, with and without `--fit`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowdim.catalogue import methods, variant
from lowdim.files import write_json
from lowdim.methods import apply
from lowdim.models import head_modules, load_model
from lowdim.plan import forecast, measure
from lowdim.train.environment import processor
from lowdim.units import format_bytes

RESULTS = Path(__file__).parents[1] / "results" / "plan.json"
BATCH, LENGTH = 16, 128
CASES = (("minilm", "classify"), ("stories260k", "causal-lm"))
#: The plain setting is measured for every method, the others for some of each kind.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate": 4},
    "masters": {"dtype": torch.bfloat16, "master_weights": True},
    "accumulate-masters": {"accumulate": 4, "dtype": torch.bfloat16, "master_weights": True},
}
SOME = ("lora", "lamda", "full", "galore", "fira", "monarch", "sltrain")
#: What is timed, in CPU seconds of one thread: all methods on a shape of 7 B parameters.
COMMANDS = (
    ("plan", "--model", "llama-7b"),
    ("plan", "--model", "llama-7b", "--dtype", "bfloat16", "--length", "2048", "--gradient-checkpointing"),
    ("plan", "--model", "llama-7b", "--fit", "--budget", "24GiB"),
    ("plan", "--model", "llama-7b", "--fit", "--budget", "24GiB", "--batch-size", "8", "--length", "1024"),
)


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


def stepping(applied: Any, batch: dict[str, torch.Tensor], passes: int = 1) -> tuple[Any, Callable[[], None]]:
    """Make a method ready to train: its optimizer, and a function that takes one step on `batch` in so many passes."""
    applied.model.train()
    optimizer = applied.start(1e-3)
    applied.model.zero_grad(set_to_none=True)

    def step() -> None:
        for _ in range(passes):
            (applied.loss(batch, loss_of).total / passes).backward()
        optimizer.step()
        applied.after_step(optimizer)
        optimizer.zero_grad()

    return optimizer, step


def one(name: str, task: str, method: str, setting: str) -> dict:
    how = SETTINGS[setting]
    passes, masters = how.get("accumulate", 1), how.get("master_weights", False)
    predicted = forecast(name, method, task=task, batch_size=BATCH, sequence_length=LENGTH, **how)
    model = load_model(name, task, dtype=how.get("dtype")).train()
    batches = [batch_of(model, task, seed) for seed in range(2)]
    applied = apply(
        variant(method), model, lr=1e-3, steps=100, head=head_modules(model, task), batches=iter(batches), loss_fn=loss_of,
        accumulate=passes, master_weights=masters,
    )  # fmt: skip
    batch = batches[0]
    optimizer, step = stepping(applied, batch, passes)
    measured = measure(lambda: (step(), step()), model=applied.model, optimizer=optimizer, tensors=batch.values())
    row = {
        "model": name,
        "task": task,
        "setting": setting,
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


def timed(words: tuple[str, ...]) -> dict:
    """The CPU seconds of one command, start and imports included, and the number of its methods."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lowdim", *words, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = json.loads(done.stdout)
    row = {
        "command": f"lowdim {' '.join(words)}",
        "methods": len(rows),
        "cpu_seconds": round(cpu, 1),
        "seconds": round(wall, 1),
        "cpu": processor(),
    }
    if "--fit" in words:
        row["forecasts"] = sum(found["tried"] for found in rows)
        row["fits"] = {found["method"]: [found["fits"], found["forecast"]["total"], found["changes"]] for found in rows}
    return row


def status(key: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "TASK", "METHOD", "SETTING"))
    parser.add_argument("--methods", default="all")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="others keep their rows")
    parser.add_argument("--models", nargs="+", default=[name for name, _ in CASES])
    parser.add_argument("--here", action="store_true", help="in this process; the resident memory is then of all before, too")
    parser.add_argument("--commands", action=argparse.BooleanOptionalAction, default=True, help="time lowdim plan")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if "plain" in options.settings:
        record = {"rows": [], "seven_billion": seven_billion(options.methods)}
    record["rows"] = [row for row in record["rows"] if row.get("setting", "plain") not in options.settings]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lowdim")}
    record |= {
        "settings": {"batch_size": BATCH, "sequence_length": LENGTH, "dtype": "float32", "threads": 1},
        "environment": {"python": platform.python_version(), **versions, "cpu": processor()},
    }
    for setting, (name, task) in itertools.product(options.settings, CASES):
        for chosen in methods(options.methods):
            if (setting != "plain" and chosen.name not in SOME) or name not in options.models:
                continue
            if chosen.name == "linear-probe" and task == "causal-lm":
                continue  # no new head
            if (row := measured(name, task, chosen.name, setting, options.here)) is None:
                continue
            record["rows"].append(row)
            write_json(RESULTS, record)
            total, took = row["forecast"]["total"], row["measured_bytes"]
            print(
                f"{name:12} {setting:11} {row['label']:18} forecast {format_bytes(total):>9} measured {format_bytes(took):>9} "
                f"ratio {row['ratio']:.4f}  {row['forecast']['seconds_per_step']:.3g} s forecast, "
                f"{row['seconds_per_step']:.3g} s taken",
                flush=True,
            )
    if options.commands:
        record["commands"] = [timed(words) for words in COMMANDS]
    write_json(RESULTS, record)


def measured(name: str, task: str, method: str, setting: str, here: bool) -> dict | None:
    """One row, from a process of its own or from this one; None where the method cannot train the model."""
    if here:
        return one(name, task, method, setting)
    return in_own_process(__file__, name, task, method, setting)


def in_own_process(script: str, *words: str) -> dict | None:
    """The row that `script --one WORDS` prints; None, and the reason on standard error, where it fails."""
    done = subprocess.run([sys.executable, script, "--one", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
