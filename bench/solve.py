"""Measures solvers against those one would use otherwise: where each begins to pay, and where the other wins.

OMP_NUM_THREADS=1 python bench/solve.py --out results/bench-solvers.json

`regression`: sketched least squares against LAPACK over heights and widths. `smoothing`: certificates of two halves against
Cohen's at the same number of samples, in turns, in CPU time. Conjugate directions against scipy's cg and pyamg (extra `bench`)
are part of `lowdim reproduce dcd`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lowdim
from lowdim.represent import DualRandomizedSmoothing, RandomizedSmoothing
from lowdim.solve import linf_lstsq, sketch_rows
from lowdim.train.environment import processor


def in_turns(rounds: int, clock: Callable[[], float] = time.perf_counter, **calls: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns, so that other load on the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def regression(quick: bool) -> list[dict[str, Any]]:
    """Sketched least squares and LAPACK, normal matrices, in milliseconds (best of three)."""
    from scipy import linalg

    rows = []
    heights, widths = ((1 << 13,), (8, 64)) if quick else ((1 << 14, 1 << 16), (16, 64, 128, 256))
    for n in heights:
        for d in widths:
            rng = np.random.default_rng(7)
            A = rng.normal(size=(n, d))
            b = A @ np.ones(d) + rng.normal(size=n)
            m = sketch_rows(n, d, 0.5, 0.01)
            if m >= n:
                rows.append({"n": n, "d": d, "sketch_rows": m, "winner": "LAPACK (the sketch would save no row)"})
                continue
            taken = in_turns(
                3,
                lapack=lambda A=A, b=b: linalg.lstsq(A, b),
                lapack_qr=lambda A=A, b=b: linalg.lstsq(A, b, lapack_driver="gelsy"),
                srht=lambda A=A, b=b: linf_lstsq(A, b),
                pooled=lambda A=A, b=b: linf_lstsq(A, b, sketch="pooled"),
            )
            best = {name: round(1e3 * min(seconds), 2) for name, seconds in taken.items()}
            winner = min(best, key=lambda name: best[name])
            rows.append({"n": n, "d": d, "sketch_rows": m, **best, "winner": winner})
            print(rows[-1], file=sys.stderr)
    return rows


def smoothing(quick: bool) -> list[dict[str, Any]]:
    """CPU time of a certificate: two halves with n samples each over Cohen's with 2 n, median of the quotients in pairs."""
    torch.manual_seed(0)
    rows, n = [], 500 if quick else 2000
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    convolutions = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))
    )
    for name, net, shape in (("MLP, 1 x 28 x 28", perceptron, (1, 28, 28)), ("CNN, 3 x 32 x 32", convolutions, (3, 32, 32))):
        x = torch.rand(shape)
        for fill in ("neighbour", "zero"):
            halves, whole = DualRandomizedSmoothing(net, net, 10, 0.5, fill=fill), RandomizedSmoothing(net, 10, 0.5)
            taken = in_turns(
                4 if quick else 24,
                time.process_time,
                drs=lambda halves=halves, x=x: halves.certify(x, n0=100, n=n),
                cohen=lambda whole=whole, x=x: whole.certify(x, n0=200, n=2 * n),
            )
            quotients = [a / b for a, b in zip(taken["drs"], taken["cohen"])]
            row = {"model": name, "fill": fill, "samples": 2 * n, "drs_over_cohen": round(statistics.median(quotients[1:]), 3)}
            rows.append({**row, **{f"{k}_ms": round(1e3 * min(v), 1) for k, v in taken.items()}})
            print(rows[-1], file=sys.stderr)
    return rows


PARTS = {"regression": regression, "smoothing": smoothing}


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=tuple(PARTS), help="one part; the others of an existing --out stay")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start, load = time.perf_counter(), os.getloadavg()[0]
    chosen = [arguments.only] if arguments.only else list(PARTS)
    out: Path | None = arguments.out
    record: dict[str, Any] = json.loads(out.read_text()) if out is not None and arguments.only and out.is_file() else {}
    record |= {name: PARTS[name](arguments.quick) for name in chosen}
    record["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowdim": lowdim.__version__,
        "cpu": processor(),
        "threads": 1,
        "load_at_the_start": round(load, 1),  # above the number of cores: seconds are those of a busy machine
    }
    record["seconds"] = round(time.perf_counter() - start, 1)
    text = json.dumps(record, indent=1) + "\n"
    sys.stdout.write(text) if out is None else out.write_text(text)


if __name__ == "__main__":
    main()
