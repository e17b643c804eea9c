"""Structured layers against nn.Linear and against torch-structured: time of a forward and backward pass.

    OMP_NUM_THREADS=1 python bench/layers.py [--quick] [--out results/bench-layers.json]

All variants of a shape run in one process and alternate, so that other load on the machine affects all of them; a ratio is the
median of the ratios within a round. Shapes are (tokens, in, out), float32. torch-structured's Monarch product is loaded from
its file if the package is installed (its own __init__ imports triton); it also needs einops. It has no bias, so the
products are compared without. The same formula as two einsums is always measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lowdim.layers import LowRankLinear, Monarch
from lowdim.linalg import monarch_multiply

SHAPES = ((2048, 768, 3072), (2048, 3072, 768))
LOW_RANKS = ((2048, 768, 3072, 192), (2048, 768, 3072, 384), (1, 768, 3072, 192), (128, 768, 3072, 192))
TARGETS = {"product / torch-structured": 1.1}

Step = Callable[[Tensor], Tensor]


def einsums(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    (k, _, p), (l, _, r) = w1.shape, w2.shape
    hidden = torch.einsum("tkp,kqp->tkq", x.view(-1, k, p), w1).reshape(-1, r, l)
    return torch.einsum("trl,lsr->tsl", hidden, w2).reshape(len(x), -1)


def torch_structured() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    found = importlib.util.find_spec("torch_structured")
    if found is None or importlib.util.find_spec("einops") is None:
        return None
    path = Path(found.submodule_search_locations[0]) / "monarch" / "blockdiag_butterfly_multiply.py"
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.blockdiag_butterfly_multiply


def timed(step: Step, x: Tensor, grad: Tensor, backward: bool) -> float:
    x.grad = None
    start = time.perf_counter()
    if backward:
        step(x).backward(grad)
    else:
        with torch.no_grad():
            step(x)
    return time.perf_counter() - start


def compare(
    variants: dict[str, Step], shape: tuple[int, int, int], turns: int, backward: bool = True
) -> dict[str, list[float]]:
    tokens, n_in, n_out = shape
    x, grad = torch.randn(tokens, n_in, requires_grad=backward), torch.randn(tokens, n_out)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 3):
        for name, step in variants.items():
            seconds = timed(step, x, grad, backward)
            if turn >= 3:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    return round(statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True)), 3)


def monarch(turns: int) -> list[dict]:
    rows, peer = [], torch_structured()
    for shape in SHAPES:
        torch.manual_seed(0)
        layer, dense = Monarch(shape[1], shape[2], nblocks=4), nn.Linear(shape[1], shape[2])
        w1, w2 = layer.blkdiag1, layer.blkdiag2
        variants: dict[str, Step] = {
            "dense": dense,
            "Monarch": layer,
            "product": lambda x, a=w1, b=w2: monarch_multiply(x, a, b),
            "einsums": lambda x, a=w1, b=w2: einsums(x, a, b),
        }
        if peer is not None:
            variants["torch-structured"] = lambda x, a=w1, b=w2: peer(x, a, b)
        x = torch.randn(5, shape[1])
        for name in ("einsums", "torch-structured"):
            if name in variants:
                torch.testing.assert_close(variants[name](x), variants["product"](x), rtol=1e-4, atol=1e-4)
        times = compare(variants, shape, turns)
        row = {"layer": "Monarch, nblocks=4", "shape": shape, "pass": "forward + backward"}
        row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 1) for name, t in times.items()}
        row["flops / dense"] = round(layer.cost(1).flops_forward / (2 * dense.weight.numel()), 3)
        row["Monarch / dense"] = ratio(times, "Monarch", "dense")
        row["product / einsums"] = ratio(times, "product", "einsums")
        if peer is not None:
            row["product / torch-structured"] = ratio(times, "product", "torch-structured")
        rows.append(row)
    return rows


def low_rank(turns: int) -> list[dict]:
    rows = []
    for tokens, n_in, n_out, rank in LOW_RANKS:
        torch.manual_seed(0)
        layer, dense = LowRankLinear(n_in, n_out, rank=rank), nn.Linear(n_in, n_out)
        for backward in (True, False):
            times = compare({"dense": dense, "low rank": layer}, (tokens, n_in, n_out), turns, backward)
            row = {"layer": f"LowRankLinear, rank {rank}", "shape": (tokens, n_in, n_out)}
            row["pass"] = "forward + backward" if backward else "forward"
            row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()}
            row["flops / dense"] = round(layer.cost(1).flops_forward / (2 * dense.weight.numel()), 3)
            row["low rank / dense"] = ratio(times, "low rank", "dense")
            rows.append(row)
    return rows


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    turns = 3 if arguments.quick else 20
    rows = monarch(turns) + low_rank(turns)
    for row in rows:
        print(json.dumps(row))
        for name, target in TARGETS.items():
            if name in row:
                print(f"  {name} {row[name]} {'<=' if row[name] <= target else '> (missed)'} {target}")
    if arguments.out:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
        record = {
            "rows": rows,
            "targets": TARGETS,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torch-structured": version("torch-structured"),
                "cpu": cpu,
                "threads": torch.get_num_threads(),
                "turns": turns,
            },
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
