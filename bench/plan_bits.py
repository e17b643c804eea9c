"""Forecasts of quantized bases and 8-bit AdamW compared with measured training: `python bench/plan_bits.py`.

Writes results/plan-bits.json and prints the table. As bench/plan.py, for each setting in a process of its own: the forecast,
and the allocator's peak over the first two steps. Batches are one sequence of 32 tokens, so that weights, gradients and the
optimizer's state are nearly all of the memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from lowdim.catalogue import variant
from lowdim.methods import apply
from lowdim.models import head_modules, load_model
from lowdim.plan import forecast, measure
from lowdim.train.environment import processor
from lowdim.units import format_bytes
from plan import in_own_process, loss_of, stepping

RESULTS = Path(__file__).parents[1] / "results" / "plan-bits.json"
BATCH, LENGTH = 1, 32
_BITS = [{}, *({"quantize": scheme} for scheme in ("int8", "int4", "nf4"))]
CASES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    *(("minilm", "classify", "lora", how) for how in [*_BITS, {"dtype": "bfloat16", "quantize": "nf4"}]),
    ("minilm", "classify", "lora", {"quantize": "int4", "optimizer": "adamw8bit"}),
    *(("minilm", "classify", "full", how) for how in ({}, {"optimizer": "adamw8bit"})),
    *(("smollm2-135m", "causal-lm", "lora", how) for how in _BITS),
)


def batch_of(model: Any, task: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    if task == "causal-lm":
        return {"input_ids": ids, "labels": ids.clone()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(BATCH, dtype=torch.long)}


def one(name: str, task: str, method: str, how: dict[str, Any]) -> dict[str, Any]:
    settings = dict(how)
    dtype, quantize = getattr(torch, settings.pop("dtype", "float32")), settings.pop("quantize", None)
    sizes = {"batch_size": BATCH, "sequence_length": LENGTH}
    predicted = forecast(name, method, task=task, dtype=dtype, quantize=quantize, **sizes, **settings)
    model = load_model(name, task, dtype=dtype, quantize=quantize).train()
    batch = batch_of(model, task)
    applied = apply(variant(method), model, lr=1e-3, steps=100, head=head_modules(model, task), loss_fn=loss_of, **settings)
    optimizer, step = stepping(applied, batch)
    measured = measure(lambda: (step(), step()), model=applied.model, optimizer=optimizer, tensors=batch.values())
    return {
        "model": name,
        "task": task,
        "method": method,
        "label": predicted.label,
        "how": how,
        "trained_parameters": applied.trained(),
        "forecast": predicted.to_dict(),
        "measured_bytes": measured.bytes,
        "ratio": round(predicted.total / measured.bytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "TASK", "METHOD", "HOW"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        name, task, method, how = options.one
        print(json.dumps(one(name, task, method, json.loads(how))))
        return
    rows = []
    for name, task, method, how in CASES:
        if (row := in_own_process(__file__, name, task, method, json.dumps(how))) is None:
            continue
        rows.append(row)
        total, took, shown = row["forecast"]["total"], row["measured_bytes"], " ".join(how.values())
        print(
            f"{name:12} {row['label']:18} {shown:14} forecast {format_bytes(total):>9} measured {format_bytes(took):>9} "
            f"ratio {row['ratio']:.4f}",
            flush=True,
        )
    names = ("torch", "transformers", "torchao", "bitsandbytes", "lowdim")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {
        "settings": {"batch_size": BATCH, "sequence_length": LENGTH, "threads": 1},
        "environment": {"python": platform.python_version(), **versions, "cpu": processor()},
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
