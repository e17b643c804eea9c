"""Forecasts for two devices compared with two processes: `python bench/plan_devices.py` writes results/plan-devices.json.

For each model and method: `lowdim plan --devices 2`, and the allocator's peak in the first of two processes (gloo, FSDP2): that
of the first step, or the least of four further ones if that is more. Such steps differ at times, perhaps by what gloo's threads
hold; the record has the largest, too.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch

from lowdim.catalogue import variant
from lowdim.files import write_json
from lowdim.methods import apply
from lowdim.models import build, head_modules, load_config, load_model
from lowdim.models.architectures import SHAPES
from lowdim.plan import forecast, measure
from lowdim.surgery import shard
from lowdim.testing.processes import in_processes
from lowdim.train.environment import environment
from lowdim.units import format_bytes
from plan import loss_of, stepping

RESULTS = Path(__file__).parents[1] / "results" / "plan-devices.json"
DEVICES, BATCH, LENGTH = 2, 2, 64
#: model, task, method, layer-wise
CASES = (
    *(("llama-60m", "pretrain", method, False) for method in ("full", "galore")),
    ("llama-60m", "causal-lm", "lora", False),
    *(("minilm", "classify", method, False) for method in ("lora", "full")),
)


def batch_of(model: Any, task: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (BATCH, LENGTH), generator=generator)
    if task != "classify":
        return {"input_ids": ids, "labels": ids.clone()}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 2, (BATCH,), generator=generator),
    }


def trained(rank: int, world: int, name: str, task: str, method: str, layerwise: bool) -> dict[str, int]:
    """What steps took in this process: one of `world`, over which the model is spread."""
    count_in_all_threads()
    torch.manual_seed(0)
    model = (build(load_config(name), task) if name in SHAPES else load_model(name, task)).train()
    batches = [batch_of(model, task, 10 * rank + seed) for seed in range(2)]
    how = {"lr": 1e-3, "steps": 100, "scratch": task == "pretrain", "layerwise": layerwise}
    applied = apply(variant(method), model, head=head_modules(model, task), batches=iter(batches), loss_fn=loss_of, **how)
    shard(applied.model)
    batch = batches[0]
    optimizer, step = stepping(applied, batch)
    held = {"model": applied.model, "optimizer": optimizer, "tensors": batch.values()}
    first, *usual = (measure(step, **held).bytes for _ in range(5))
    return {"measured_bytes": max(first, min(usual)), "measured_largest": max(first, *usual)}


def count_in_all_threads() -> None:
    """Let torch count what any thread allocates or frees, such as one of gloo's; the profiler sees its own thread's alone."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def row_of(name: str, task: str, method: str, layerwise: bool) -> dict[str, Any]:
    how = {"task": task, "batch_size": BATCH, "sequence_length": LENGTH, "layerwise": layerwise}
    alone, predicted = (without_times(forecast(name, method, devices=n, **how)) for n in (1, DEVICES))
    taken = in_processes(trained, DEVICES, name, task, method, layerwise)
    label = f"{predicted['label']}, layer-wise" if layerwise else predicted["label"]
    ratio = round(predicted["total"] / taken["measured_bytes"], 4)
    head = {"model": name, "task": task, "method": method, "label": label, "ratio": ratio}
    return {**head, **taken, "forecast": predicted, "alone": alone}


def without_times(found: Any) -> dict[str, Any]:
    return {key: value for key, value in found.to_dict().items() if "seconds" not in key}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        rows.append(row_of(*case))
        told = {key: format_bytes(rows[-1][key]) for key in ("measured_bytes", "measured_largest")}
        print(*case, format_bytes(rows[-1]["forecast"]["total"]), told, rows[-1]["ratio"], flush=True)
        settings = {"devices": DEVICES, "batch_size": BATCH, "sequence_length": LENGTH, "dtype": "float32", "threads": 1}
        head = {"command": "python bench/plan_devices.py", "settings": settings, "environment": environment()}
        write_json(RESULTS, {**head, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
