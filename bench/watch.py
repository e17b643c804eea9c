"""Measures what `lowdim run --watch` costs: seconds of a measurement beside those of a training step.

    OMP_NUM_THREADS=1 python bench/watch.py --out results/bench-watch.json

Steps and measurements take turns, so that other programs slow both alike; the load before is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

EVERY = 50  # steps between two measurements
BATCH, LENGTH = 16, 128  # those of a recipe without others
ROUNDS, STEPS = 9, 5


def share(model: str, method: str) -> dict[str, Any]:
    """One model trained by one method: median seconds of a step, of a measurement, and the share at `EVERY`."""
    from lowdim import models
    from lowdim.catalogue import variant
    from lowdim.methods import Setup, strategy_for
    from lowdim.train import LayerWatch

    torch.manual_seed(0)
    task = "causal-lm" if model == "stories260k" else "classify"
    net = models.load_model(model, task, **({} if task == "causal-lm" else {"num_labels": 2}))
    batch = {"input_ids": torch.randint(3, 500, (BATCH, LENGTH)), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
    batch["labels"] = batch["input_ids"] if task == "causal-lm" else torch.randint(2, (BATCH,))

    def loss_fn(called: Any, given: Any) -> Any:
        return called(**given).loss

    setup = Setup(lr=1e-3, steps=ROUNDS * STEPS, batches=[batch], loss_fn=loss_fn, head=models.head_modules(net, task))
    applied = strategy_for(variant(method)).apply(net, setup)
    start = time.perf_counter()
    watch = LayerWatch(applied.model, interval=EVERY)
    first = time.perf_counter() - start
    optimizer = applied.start(1e-3)
    steps, measurements = list[float](), list[float]()
    for _ in range(ROUNDS):
        for _ in range(STEPS):
            start = time.perf_counter()
            applied.loss(batch, loss_fn).total.backward()
            optimizer.step()
            applied.after_step(optimizer)
            optimizer.zero_grad()
            steps.append(time.perf_counter() - start)
        start = time.perf_counter()
        watch.measure()
        measurements.append(time.perf_counter() - start)
    step, measured = statistics.median(steps), statistics.median(measurements)
    return {
        "model": model,
        "method": method,
        "layers": len(watch.layers),
        "step_seconds": round(step, 4),
        "measurement_seconds": round(measured, 4),
        "start_seconds": round(first, 4),
        "share_of_training": round(measured / (EVERY * step), 4),
        "kept_bytes": sum(base.numel() * base.element_size() for base in watch.state_dict()["bases"].values()),
        "watched_bytes": sum(4 * net.get_submodule(n).in_features * net.get_submodule(n).out_features for n in watch.layers),  # type: ignore[operator]
    }


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from lowdim.train.environment import environment

    load = round(os.getloadavg()[0], 1)
    rows = [share(model, method) for model in ("stories260k", "minilm") for method in ("lora", "full")]
    how = {"interval": EVERY, "batch_size": BATCH, "length": LENGTH, "threads": torch.get_num_threads()}
    record = {**how, "load_average_before": load, "rows": rows, "environment": environment()}
    text = json.dumps(record, indent=1) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
