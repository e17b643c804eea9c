"""Memory of pretraining: forecasts for LLaMA-7B, and forecasts next to measurements for a model that fits here.

    OMP_NUM_THREADS=1 python bench/pretraining_memory.py [--out results/bench-pretraining-memory.json]

LLaMA-7B: bfloat16, one block of 256 tokens, gradient checkpointing, rank 1024, layer-wise updates if the method has them;
nothing is allocated. LLaMA-60M: float32, one block of 256 tokens, rank 128; the measurement is the allocator's peak over three
steps including a refresh, with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from lowdim.catalogue import Variant, methods
from lowdim.errors import LowdimError
from lowdim.methods import apply
from lowdim.models import build, load_config
from lowdim.plan import forecast, measure


def at_rank(chosen: Variant, rank: int) -> Variant:
    options = dict(chosen.options)
    if "rank" in options:
        options["rank"] = rank
    return dataclasses.replace(chosen, options=options)


def with_16bit(chosen: list[Variant]) -> list[Variant]:
    """GaLore also with moments in bfloat16, as its authors keep them for such models."""
    found = []
    for variant in chosen:
        found.append(variant)
        if variant.name == "galore":
            half = {**variant.options, "inner": "adamw16bit"}
            found.append(dataclasses.replace(variant, name="galore-16bit", label="GaLore, 16-bit", options=half))
    return found


def layerwise(chosen: Variant) -> bool:
    return chosen.kind == "optimizer"


def large(chosen: Variant) -> dict[str, Any]:
    how = {"task": "pretrain", "batch_size": 1, "sequence_length": 256, "dtype": torch.bfloat16}
    start = time.perf_counter()
    row = forecast("llama-7b", at_rank(chosen, 1024), gradient_checkpointing=True, layerwise=layerwise(chosen), **how).to_dict()
    return {**row, "layerwise": layerwise(chosen), "forecast_seconds": round(time.perf_counter() - start, 1)}


def small(chosen: Variant, each_layer: bool) -> dict[str, Any]:
    gc.collect()  # or garbage of the previous run would be freed in the middle of this one
    variant = at_rank(chosen, 128)
    predicted = forecast("llama-60m", variant, task="pretrain", batch_size=1, sequence_length=256, layerwise=each_layer)
    options = dict(variant.options)
    if "update_interval" in options:
        options["update_interval"] = 2
    torch.manual_seed(0)
    config = load_config("llama-60m")
    model = build(config, "pretrain").train()
    chosen_here = dataclasses.replace(variant, options=options)
    applied = apply(chosen_here, model, lr=1e-3, steps=100, scratch=True, layerwise=each_layer)
    optimizer = applied.start(1e-3)
    tokens = torch.randint(config.vocab_size, (1, 256))
    batch = {"input_ids": tokens, "labels": tokens}

    def run() -> None:
        for _ in range(3):
            applied.loss(batch, lambda model, rows: model(**rows).loss).total.backward()
            optimizer.step()
            applied.after_step(optimizer)
            optimizer.zero_grad()

    taken = measure(run, model=applied.model, optimizer=optimizer, tensors=[tokens]).bytes
    return {
        "method": chosen.name,
        "label": chosen.label,
        "layerwise": each_layer,
        "trained_parameters": applied.trained(),
        "forecast_bytes": predicted.total,
        "measured_bytes": taken,
        "ratio": round(predicted.total / taken, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="training")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    record: dict[str, Any] = {
        "what": "forecasts for LLaMA-7B (bfloat16, 1 x 256, checkpointing, rank 1024), and of LLaMA-60M next to measurements",
        "environment": {"python": platform.python_version(), "torch": torch.__version__},
        "llama-7b": [],
        "llama-60m": [],
    }
    for chosen in with_16bit(methods(given.methods)):
        try:
            record["llama-7b"].append(large(chosen))
            print(chosen.label, "LLaMA-7B:", round(record["llama-7b"][-1]["total"] / 2**30, 2), "GiB", flush=True)
        except (ValueError, LowdimError) as error:
            record["llama-7b"].append({"method": chosen.name, "label": chosen.label, "failure": str(error)[:200]})
        for each_layer in {False, layerwise(chosen)}:
            row = small(chosen, each_layer)
            record["llama-60m"].append(row)
            print(row["label"], "layer-wise" if each_layer else "", row["measured_bytes"] / 2**20, row["ratio"], flush=True)
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
