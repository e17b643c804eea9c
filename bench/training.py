"""Training in little memory: optimizer steps against other packages', and layers against nn.Linear, alternating in one process.

    python bench/training.py [--quick] [--threads 1 2] [--out results/bench-training.json]

Optimizers: one step on one float32 matrix, rank 128, without a refresh: milliseconds (median), the median of the ratios within
each round to the peer and to torch's fused AdamW, and bytes of state compared with the paper's formula. A refresh: time and
captured energy of a warm-started sketch compared with an exact decomposition. Layers: forward and backward, time and bytes
that autograd keeps, as ratios to nn.Linear, with the operations that the layer states. The load average shows how busy the
machine was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.layers import LowRankLinear, MaestroLinear, SLTrainLinear, SSTLinear
from lowdim.linalg import leading_vectors, stream
from lowdim.optim import DCTAdamW, Fira, GaLore, QGaLore, quantize_linears, state_bytes
from lowdim.plan.kept import kept_bytes
from lowdim.train.environment import processor

SHAPES = ((2048, 2048), (2048, 5504))
RANK, NEVER = 128, 10**9
#: ratio -> at most (or for the refresh, at least)
TARGETS = {"GaLore": 0.7, "GaLore 8-bit": 0.7, "Fira": 0.4}
LAYERS = ((512, 768, 768), (512, 2048, 2048))


def gradient(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Singular values 1, 1/2, 1/3, … in min(m, n)/4 random directions, and Gaussian noise of half that norm."""
    draw = stream(seed, "bench", "gradient")
    k = min(m, n) // 4
    left, right = torch.linalg.qr(torch.randn(m, k, generator=draw)).Q, torch.linalg.qr(torch.randn(n, k, generator=draw)).Q
    signal = (left / torch.arange(1, k + 1)) @ right.T
    noise = torch.randn(m, n, generator=draw)
    return signal + noise * (0.5 * signal.norm() / noise.norm())


def parameter(m: int, n: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(m, n, generator=stream(0, "bench", "weight")))


def peers(m: int, n: int) -> dict[str, tuple[Any, nn.Parameter]]:
    from apollo_torch import APOLLOAdamW
    from fira import FiraAdamW
    from galore_torch import GaLoreAdamW, GaLoreAdamW8bit

    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None  # galore-torch's 8-bit class synchronises a GPU even without one
    made = {}

    def add(name: str, build: Callable[[nn.Parameter], Any]) -> None:
        p = parameter(m, n)
        made[name] = (build(p), p)

    projected = {"rank": RANK, "update_proj_gap": NEVER, "proj_type": "std"}
    add("torch AdamW, fused", lambda p: torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0, fused=True))
    add("torch AdamW", lambda p: torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0, foreach=True))
    quiet = {"no_deprecation_warning": True}
    add("galore-torch", lambda p: GaLoreAdamW([{"params": [p], **projected, "scale": 0.25}], lr=1e-3, **quiet))
    add(
        "galore-torch 8-bit",
        lambda p: GaLoreAdamW8bit([{"params": [p], **projected, "scale": 0.25}], lr=1e-3, weight_decay=0.0),
    )
    add("fira", lambda p: FiraAdamW([{"params": [p], **projected, "alpha": 1.0}], lr=1e-3, **quiet))
    more = {"scale": 1.0, "scale_type": "channel", "proj": "random"}
    add("apollo-torch", lambda p: APOLLOAdamW([{"params": [p], **projected, **more}], lr=1e-3, **quiet))
    return made


def ours(m: int, n: int) -> dict[str, tuple[Any, nn.Parameter]]:
    made: dict[str, tuple[Any, nn.Parameter]] = {}
    usual: dict[str, Any] = {"lr": 1e-3, "rank": RANK, "update_interval": NEVER}
    for name, cls, options in (
        ("GaLore", GaLore, {}),
        ("GaLore 8-bit", GaLore, {"inner": "adamw8bit"}),
        ("GaLore Adafactor", GaLore, {"inner": "adafactor"}),
        ("Fira", Fira, {}),
        ("DCT-AdamW", DCTAdamW, {}),
    ):
        p = parameter(m, n)
        made[name] = (cls([p], **{**usual, **options}), p)
    linear = nn.Linear(n, m, bias=False)
    weight = quantize_linears(nn.Sequential(linear), "0")[0].weight
    made["Q-GaLore"] = (QGaLore([weight], **usual), weight)
    return made


PEER = {"GaLore": "galore-torch", "GaLore 8-bit": "galore-torch 8-bit", "Fira": "fira", "Q-GaLore": "galore-torch 8-bit"}


def give(optimizer: Any, p: nn.Parameter, grad: torch.Tensor) -> None:
    """Set the gradient; INT8 weights keep theirs in a separate attribute."""
    if hasattr(p, "float_grad"):
        p.float_grad = grad
    else:
        p.grad = grad


def formula(name: str, m: int, n: int) -> int | None:
    """Bytes of state by the papers' formulas: basis and moments in float32, or bytes with a scale for every 256."""
    s, long = min(m, n), max(m, n)
    moments8 = 2 * long * RANK * (1 + 4 / 256)
    return {
        "GaLore": 4 * (s * RANK + 2 * long * RANK),
        "GaLore 8-bit": int(4 * s * RANK + moments8),
        "GaLore Adafactor": 4 * (s * RANK + long + RANK),
        "Fira": 4 * (s * RANK + 2 * long * RANK) + 4,
        "DCT-AdamW": 2 * 4 * RANK + 4 * 2 * long * RANK,
        "Q-GaLore": int(s * RANK * (0.5 + 8 / 256) + 4 * s + moments8),
    }.get(name)


def clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def held(optimizer: Any) -> int:
    found = state_bytes(optimizer)
    for state in optimizer.state.values():
        matrix = getattr(state.get("projector"), "ortho_matrix", None)
        if isinstance(matrix, torch.Tensor):
            found += matrix.numel() * matrix.element_size()
    return found


def optimizers(m: int, n: int, repeats: int) -> dict[str, Any]:
    grad = gradient(m, n)
    made = {**peers(m, n), **ours(m, n)}
    for optimizer, p in made.values():
        give(optimizer, p, grad.clone())
        optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 2):
        for name, (optimizer, p) in made.items():
            give(optimizer, p, grad)
            took = clock(optimizer.step)
            if turn >= 2:
                times[name].append(took)

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[name], times[other])), 3)

    rows: dict[str, Any] = {}
    for name, (optimizer, _) in made.items():
        row: dict[str, Any] = {
            "step_ms": round(statistics.median(times[name]), 2),
            "best_ms": round(min(times[name]), 2),
            "to_fused_adamw": ratio(name, "torch AdamW, fused"),
            "state_bytes": held(optimizer),
        }
        if name in PEER:
            row |= {"peer": PEER[name], "to_peer": ratio(name, PEER[name])}
        if name in TARGETS:
            row |= {"target": TARGETS[name], "met": row["to_peer"] <= TARGETS[name]}
        if (wanted := formula(name, m, n)) is not None:
            row |= {"formula_bytes": wanted, "to_formula": round(row["state_bytes"] / wanted, 4)}
        rows[name] = row
    return rows


def refresh(m: int, n: int, repeats: int) -> dict[str, Any]:
    """The gradient has changed since the basis was chosen: half of its energy is in new directions."""
    before, now = gradient(m, n), (gradient(m, n) + gradient(m, n, 1)) / 2**0.5
    start, _ = leading_vectors(before, RANK, method="randomized", generator=stream(0, "cold"))
    calls: dict[str, Callable[[], Any]] = {
        "torch.linalg.svd": lambda: torch.linalg.svd(now, full_matrices=False),
        "first": lambda: leading_vectors(now, RANK, method="randomized", generator=stream(0, "first")),
        "refresh": lambda: leading_vectors(now, RANK, method="randomized", start=start, generator=stream(0, "warm")),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if turn < 2 or name != "torch.linalg.svd":
                times[name].append(clock(call))
    exact = float(leading_vectors(now, RANK, method="exact")[1])
    middle = {name: statistics.median(values) for name, values in times.items()}
    rows: dict[str, Any] = {name: {"ms": round(ms, 1)} for name, ms in middle.items()}
    for name in ("first", "refresh"):
        energy = float(calls[name]()[1])
        faster = round(middle["torch.linalg.svd"] / middle[name], 1)
        rows[name] |= {"faster_than_svd": faster, "of_exact_energy": round(energy / exact, 5)}
    rows["refresh"]["met"] = rows["refresh"]["faster_than_svd"] >= 20 and rows["refresh"]["of_exact_energy"] >= 0.99
    return rows


def layers(tokens: int, n_in: int, n_out: int, repeats: int) -> dict[str, Any]:
    rank = n_in // 16
    made: dict[str, nn.Module] = {
        "nn.Linear": nn.Linear(n_in, n_out),
        "LowRankLinear": LowRankLinear(n_in, n_out, rank=rank),
        "SLTrain": SLTrainLinear(n_in, n_out, rank=rank),
        "SST": SSTLinear(n_in, n_out, rank=rank),
        "Maestro": MaestroLinear(n_in, n_out),
    }
    x, grad = torch.randn(tokens, n_in, requires_grad=True), torch.randn(tokens, n_out)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 2):
        for name, layer in made.items():
            x.grad = None
            layer.zero_grad(set_to_none=True)
            took = clock(lambda layer=layer: layer(x).backward(grad))
            if turn >= 2:
                times[name].append(took)
    dense = kept_bytes(made["nn.Linear"], x)
    rows: dict[str, Any] = {}
    for name, layer in made.items():
        trained = sum(p.numel() for p in layer.parameters())
        row: dict[str, Any] = {"ms": round(statistics.median(times[name]), 2), "trained": trained}
        row["time / dense"] = round(statistics.median(a / b for a, b in zip(times[name], times["nn.Linear"])), 3)
        row["kept / dense"] = round(kept_bytes(layer, x) / dense, 3)
        if hasattr(layer, "cost"):
            cost = layer.cost(tokens)
            flops = cost.flops_forward + cost.flops_backward
            row["stated flops / dense"] = round(flops / (6 * tokens * n_in * n_out), 3)
        rows[name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="for optimizers and refreshes; layers: one")
    parser.add_argument("--quick", action="store_true", help="small matrices: only shows that it runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    version = importlib.metadata.version
    names = ("galore-torch", "fira", "apollo-torch")
    record: dict[str, Any] = {
        "what": f"one step on float32 matrices, rank {RANK}, median of {given.repeats}, alternating; layers on {LAYERS}",
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("lowdim", *names)},
            "cpu": processor(),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "threads": {},
        "layers": {},
    }
    shapes = ((512, 512),) if given.quick else SHAPES
    for threads in given.threads:
        torch.set_num_threads(threads)
        record["threads"][threads] = {
            f"{m}x{n}": {"step": optimizers(m, n, given.repeats), "refresh": refresh(m, n, given.repeats)} for m, n in shapes
        }
    torch.set_num_threads(1)
    for tokens, n_in, n_out in ((64, 256, 256),) if given.quick else LAYERS:
        record["layers"][f"{tokens} tokens, {n_in} -> {n_out}"] = layers(tokens, n_in, n_out, given.repeats)
    record["environment"]["load_average_after"] = round(os.getloadavg()[0], 2)
    print(json.dumps(record, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
