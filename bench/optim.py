"""One optimizer step on one matrix: lowdim's GaLore beside galore-torch and torch's fused AdamW, in one process, in turns.

    OMP_NUM_THREADS=2 python bench/optim.py --out results/bench-optim.json

Reported: milliseconds (median and best of the repeats), the median of the ratios within each turn to the peer and to fused
AdamW, bytes of state, and what a refresh of the subspace costs and captures beside an exact decomposition, on a gradient of low
rank plus noise. The load average tells how busy the machine was with other things.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowdim.linalg import leading_vectors, stream
from lowdim.optim import GaLore, state_bytes


def gradient(size: int, seed: int = 0) -> torch.Tensor:
    """`size x size`: singular values 1, 1/2, 1/3, … in size/4 random directions, and Gaussian noise of half that norm."""
    draw = stream(seed, "bench", "gradient")
    left, right = (torch.linalg.qr(torch.randn(size, size // 4, generator=draw)).Q for _ in range(2))
    signal = (left / torch.arange(1, size // 4 + 1)) @ right.T
    noise = torch.randn(size, size, generator=draw)
    return signal + noise * (0.5 * signal.norm() / noise.norm())


def drifted(size: int) -> torch.Tensor:
    """The gradient some steps later: half of its energy lies in new directions."""
    return (gradient(size, 0) + gradient(size, 1)) / 2**0.5


def weight(size: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(size, size, generator=stream(0, "bench", "weight")))


def peer_galore(size: int, rank: int) -> tuple[Any, torch.nn.Parameter]:
    from galore_torch import GaLoreAdamW

    p = weight(size)
    group = {"params": [p], "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([group], lr=1e-3, no_deprecation_warning=True), p


def peer_galore_8bit(size: int, rank: int) -> tuple[Any, torch.nn.Parameter]:
    from galore_torch import GaLoreAdamW8bit

    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None  # it synchronises a GPU whether there is one or not
    p = weight(size)
    group = {"params": [p], "rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW8bit([group], lr=1e-3, weight_decay=0.0), p


def ours(size: int, rank: int, **options: Any) -> tuple[Any, torch.nn.Parameter]:
    p = weight(size)
    return GaLore([p], lr=1e-3, rank=rank, update_interval=10**9, **options), p


def fused(size: int, rank: int) -> tuple[Any, torch.nn.Parameter]:
    p = weight(size)
    return torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0, fused=True), p


def clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def peer_bytes(optimizer: Any) -> int:
    found = state_bytes(optimizer)
    for state in optimizer.state.values():
        if "projector" in state:
            found += state["projector"].ortho_matrix.numel() * state["projector"].ortho_matrix.element_size()
    return found


def steps(size: int, rank: int, repeats: int) -> dict[str, Any]:
    grad = gradient(size)
    made = {
        "torch AdamW fused": fused(size, rank),
        "lowdim GaLore": ours(size, rank),
        "lowdim GaLore 8-bit": ours(size, rank, inner="adamw8bit"),
        "lowdim GaLore Adafactor": ours(size, rank, inner="adafactor"),
        "galore-torch AdamW": peer_galore(size, rank),
        "galore-torch AdamW8bit": peer_galore_8bit(size, rank),
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    first = {}
    for name, (optimizer, p) in made.items():
        p.grad = grad.clone()
        first[name] = clock(optimizer.step)
    for turn in range(repeats + 1):
        for name, (optimizer, p) in made.items():
            p.grad = grad  # the peer's 8-bit class leaves a projected gradient behind
            took = clock(optimizer.step)
            if turn:  # the first turn warms up
                times[name].append(took)

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[name], times[other])), 3)

    rows: dict[str, Any] = {}
    for name, (optimizer, _p) in made.items():
        peer = "galore-torch AdamW8bit" if "8" in name else "galore-torch AdamW"
        rows[name] = {
            "step_ms": round(statistics.median(times[name]), 3),
            "best_ms": round(min(times[name]), 3),
            "first_step_ms": round(first[name], 1),
            "to_fused_adamw": ratio(name, "torch AdamW fused"),
            f"to_{peer}": ratio(name, peer),
            "state_bytes": peer_bytes(optimizer),
        }
    return rows


def refresh(size: int, rank: int, repeats: int) -> dict[str, Any]:
    before, now = gradient(size), drifted(size)
    start, _ = leading_vectors(before, rank, method="randomized", generator=stream(0, "cold"))
    plain: dict[str, Callable[[], Any]] = {
        "torch.linalg.svd": lambda: torch.linalg.svd(now, full_matrices=False),
        "lowdim exact": lambda: leading_vectors(now, rank, method="exact"),
        "lowdim first": lambda: leading_vectors(now, rank, method="randomized", generator=stream(0, "first")),
        "lowdim refresh": lambda: leading_vectors(now, rank, method="randomized", start=start, generator=stream(0, "warm")),
    }
    slow = ("torch.linalg.svd", "lowdim exact")
    times: dict[str, list[float]] = {name: [] for name in plain}
    for turn in range(repeats):
        for name, call in plain.items():
            if turn < 3 or name not in slow:
                times[name].append(clock(call))
    middle = {name: statistics.median(values) for name, values in times.items()}
    exact = float(leading_vectors(now, rank, method="exact")[1])
    rows: dict[str, Any] = {
        name: {"ms": round(ms, 1), "faster_than_svd": round(middle["torch.linalg.svd"] / ms, 1)} for name, ms in middle.items()
    }
    for name in ("lowdim first", "lowdim refresh"):
        rows[name]["captured_energy"] = round(float(plain[name]()[1]), 5)
        rows[name]["of_exact"] = round(rows[name]["captured_energy"] / exact, 5)
    rows["lowdim exact"]["captured_energy"] = round(exact, 5)
    return rows


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    from importlib.metadata import version

    record: dict[str, Any] = {
        "what": f"one step on {given.size} x {given.size} float32, rank {given.rank}; median of {given.repeats}, in turns",
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lowdim": version("lowdim"),
            "galore-torch": version("galore-torch"),
            "bitsandbytes": version("bitsandbytes"),
            "cpu": cpu_name(),
        },
        "threads": {},
    }
    for threads in given.threads:
        torch.set_num_threads(threads)
        record["threads"][str(threads)] = {
            "load_average_before": round(os.getloadavg()[0], 2),
            "step": steps(given.size, given.rank, given.repeats),
            "refresh": refresh(given.size, given.rank, given.repeats),
        }
        print(json.dumps({threads: record["threads"][str(threads)]}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
