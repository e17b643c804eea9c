"""DeltaProduct's chunked recurrence against a naive one, against transformers' delta rule in chunks, and against attention.

    OMP_NUM_THREADS=1 python bench/mixers.py [--quick] [--out results/bench-mixers.json]

Forward and backward pass on the CPU, float32. All variants run in one process and alternate, so that other load on the machine
affects all of them; a ratio is the median of the ratios within a round. The naive recurrence is flash-linear-attention's,
from its file if `fla-core` is on the path (its own __init__ imports triton): `pip install --no-deps --target DIR fla-core`
and PYTHONPATH=DIR are enough. Peers must agree with ours before they are measured.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.linalg import delta_product, unit_rows
from lowdim.train.environment import installed, processor

BATCH, LENGTH, HEADS, SIZE = 2, 512, 4, 64
CHUNKS = (16, 32, 64)
TARGETS = {"n = 2: ours / fla naive": 0.2, "n = 1: ours / transformers": 1.0}

Variants = dict[str, Callable[[], Tensor]]


def arguments(n: int, length: int = LENGTH) -> dict[str, Tensor]:
    """Unit keys, rates in [0, 1], a weak decay."""
    draw = torch.Generator().manual_seed(0)
    shape, steps = (BATCH, length, HEADS), (BATCH, length * n, HEADS)
    given = {
        "q": torch.randn(*shape, SIZE, generator=draw),
        "k": unit_rows(torch.randn(*steps, SIZE, generator=draw)),
        "v": torch.randn(*steps, SIZE, generator=draw),
        "beta": torch.rand(steps, generator=draw),
        "g": -0.1 * torch.rand(shape, generator=draw),
    }
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


def fla_naive() -> Any:
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "ops" / "gated_delta_product" / "naive.py"
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return functools.partial(module.naive_recurrent_gated_delta_product, scale=SIZE**-0.5)


def variants(n: int) -> Variants:
    given = arguments(n)
    found: Variants = {
        f"ours, chunks of {c}": lambda c=c: delta_product(**given, num_householder=n, chunk_size=c)[0] for c in CHUNKS
    }
    naive = fla_naive()
    if naive is not None:
        found["fla naive"] = lambda: naive(**given, num_householder=n)[0]
    if n == 1:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as rule

        names = {"q": "query", "k": "key", "v": "value"}
        theirs = {names.get(name, name): tensor for name, tensor in given.items()}
        found["transformers"] = lambda: rule(**theirs)[0]
    want = delta_product(**given, num_householder=n)[0]
    for step in found.values():
        torch.testing.assert_close(step(), want, rtol=1e-4, atol=1e-5)
    width = HEADS * SIZE
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(width, HEADS, batch_first=True), torch.randn(BATCH, LENGTH, width, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    found["nn.MultiheadAttention"] = lambda: attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    return found


def measured(found: Variants, turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(turns + 1):
        for name, step in found.items():
            start = time.perf_counter()
            step().sum().backward()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def compare(n: int, turns: int) -> dict[str, Any]:
    times = measured(variants(n), turns)
    row: dict[str, Any] = {"n": n, "shape": [BATCH, LENGTH, HEADS, SIZE], "pass": "forward + backward"}
    row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 1) for name, t in times.items()}
    ours = times["ours, chunks of 32"]
    for name in ("fla naive", "transformers", "nn.MultiheadAttention"):
        if name in times:
            row[f"n = {n}: ours / {name}"] = round(statistics.median(a / b for a, b in zip(ours, times[name], strict=True)), 3)
    return row


def lengths(turns: int) -> dict[str, Any]:
    """Whether time grows with the length and no faster."""
    steps: Variants = {}
    for length in (512, 1024, 2048, 4096):
        given = arguments(2, length)
        steps[str(length)] = lambda given=given: delta_product(**given, num_householder=2, chunk_size=32)[0]
    times = measured(steps, turns)
    per_token = {name: round(statistics.median(t) * 1e6 / (BATCH * int(name)), 1) for name, t in times.items()}
    return {"n": 2, "chunk": 32, "microseconds per token, by length": per_token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    turns = 2 if given.quick else 10
    rows = [compare(2, turns), compare(1, turns), lengths(max(turns // 3, 1))]
    for row in rows:
        print(json.dumps(row))
        for name, target in TARGETS.items():
            if name in row:
                print(f"  {name} {row[name]} {'<=' if row[name] <= target else '> (missed)'} {target}")
    if given.out:
        packages = {name: installed(name) for name in ("fla-core", "transformers")}
        environment = {"python": platform.python_version(), "torch": torch.__version__, **packages, "cpu": processor()}
        environment |= {"threads": torch.get_num_threads(), "turns": turns}
        given.out.write_text(json.dumps({"rows": rows, "targets": TARGETS, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
