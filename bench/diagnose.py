"""Measures the diagnostics against other libraries; one JSON on stdout or in --out.

    pip install curvlinops-for-pytorch==3.0.1 hessian-eigenthings==1.0.0a5 weightwatcher==0.7.7
    OMP_NUM_THREADS=1 python bench/diagnose.py --out results/bench-diagnose.json
    OMP_NUM_THREADS=1 python bench/diagnose.py --only curvature

A part whose peer is not installed says so in place of numbers. With --only its part of --out is replaced and the others stay.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def best_of(repeats: int, call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """The shortest of several times, and the last answer; other programs change processor time less than `perf_counter`."""
    times, value = [], None
    for _ in range(repeats):
        start = clock()
        value = call()
        times.append(clock() - start)
    return min(times), value


def _trained_digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    from lowdim.reproduce.batch_lr import _trained
    from lowdim.reproduce.settings.digits import digits

    data = digits(0)
    x, y = data.x.double(), data.y
    return _trained(0, x, y), x, y


def curvature() -> list[dict[str, Any]]:
    """Largest Hessian eigenvalue of one batch of digits: the fewest products that give it within 1 %, and their seconds."""
    from lowdim.diagnose import lanczos_quadrature
    from lowdim.linalg import stream

    net, x, y = _trained_digits()
    x, y = x[:128], y[:128]
    probe = torch.randn(sum(p.numel() for p in net.parameters()), generator=stream(0, "bench"), dtype=torch.float64)
    truth = float(lanczos_quadrature(_hessian(net, x, y), probe, steps=60).nodes[-1])

    def ours(steps: int) -> tuple[float, int]:
        found = lanczos_quadrature(_hessian(net, x, y), probe, steps=steps)
        return float(found.nodes[-1]), len(found.nodes)

    rows = []
    peers = {"lowdim": ours, "hessian-eigenthings": lambda steps: _eigenthings(net, x, y, steps)}
    for name, call in peers.items():
        try:
            steps = next(m for m in range(2, 60) if abs(call(m)[0] / truth - 1) <= 0.01)
        except ImportError as error:
            rows.append({"program": name, "skipped": str(error)})
            continue
        rows.append(_timed(name, lambda call=call, steps=steps: call(steps), truth))
    for tol in (1e-2, 0.0):
        name = f"curvlinops in scipy's eigsh, tol {tol:g}"
        try:
            rows.append(_timed(name, lambda tol=tol: _curvlinops(net, x, y, probe, tol), truth))
        except ImportError as error:
            rows.append({"program": name, "skipped": str(error)})
    return rows


def _timed(name: str, call: Callable[[], tuple[float, int]], truth: float) -> dict[str, Any]:
    seconds, (value, products) = best_of(3, call)
    off = abs(value / truth - 1)
    return {"program": name, "largest": value, "relative_error": off, "products": products, "seconds": round(seconds, 4)}


def _hessian(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Any:
    from lowdim.diagnose import hessian_matvec

    return hessian_matvec(lambda: F.cross_entropy(net(x), y), net.parameters())


def _curvlinops(net: nn.Module, x: torch.Tensor, y: torch.Tensor, probe: torch.Tensor, tol: float) -> tuple[float, int]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    from lowdim.linalg import as_operator

    operator = HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)], check_deterministic=False)
    counted = as_operator(operator)
    value = eigsh(counted.as_linear_operator(), k=1, which="LA", tol=tol, v0=probe.numpy(), return_eigenvectors=False)
    return float(value[0]), counted.products


def _eigenthings(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> tuple[float, int]:
    from hessian_eigenthings import HessianOperator, LambdaOperator, lanczos, supervised_loss

    operator, products = HessianOperator(net, [(x, y)], supervised_loss(F.cross_entropy)), [0]

    def counted(vector: torch.Tensor) -> torch.Tensor:
        products[0] += 1
        return operator.matvec(vector)

    found = lanczos(LambdaOperator(counted, operator.size, dtype=x.dtype), k=1, max_iter=steps, which="LA", seed=0)
    return float(found.eigenvalues[0]), products[0]


def fastfood() -> list[dict[str, Any]]:
    """`P θ` and its transpose for D numbers: Fastfood, dense and sparse, milliseconds a forward and backward."""
    from lowdim.adapters import intrinsic_subspace

    rows = []
    for total, dimension in ((4_650, 160), (55_210, 160), (400_000, 160)):
        row: dict[str, Any] = {"D": total, "d": dimension}
        for kind in ("fastfood", "dense", "sparse"):
            sub = intrinsic_subspace(nn.Linear(total, 1, bias=False), dimension, projection=kind)
            grad = torch.ones(1, total)

            def both(sub: Any = sub, grad: Any = grad) -> None:
                torch.autograd.grad(sub.offsets()["weight"], sub.theta, grad)

            row[f"{kind}_ms"] = round(1e3 * best_of(20, both)[0], 3)
        row["fastfood_over_dense"] = round(row["fastfood_ms"] / row["dense_ms"], 3)
        rows.append(row)
    return rows


def farms() -> list[dict[str, Any]]:
    """FARMS on MiniLM against weightwatcher's `analyze()`, processor seconds; and its memory on a checkpoint of shards."""
    from lowdim import models
    from lowdim.diagnose import farms as measure

    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # memory that an earlier part gave back would not be seen
        memory = fresh.submit(_farms_memory).result()
    folder, model = models.resolve("minilm").path, models.load_model("minilm", "classify").encoder
    rows: list[dict[str, Any]] = []
    ours, found = best_of(2, lambda: measure(folder), time.process_time)
    rows.append({"program": "lowdim, from the folder", "cpu_seconds": round(ours, 2), "layers": len(found.layers)})
    try:
        weightwatcher = importlib.import_module("weightwatcher")
    except ImportError as error:
        rows.append({"program": "weightwatcher", "skipped": str(error)})
    else:  # it measures the embeddings, too
        theirs, frame = best_of(2, lambda: weightwatcher.WeightWatcher(model=model).analyze(), time.process_time)
        rows.append({"program": "weightwatcher", "cpu_seconds": round(theirs, 2), "layers": len(frame)})
        rows.append({"program": "lowdim over weightwatcher", "ratio": round(ours / theirs, 3), "goal": 0.5})
        rows.append(_lapack_alone(folder, list(found.alphas), theirs))
        rows.append(_fewer_windows(folder, found, theirs))
    return [*rows, memory]


def _lapack_alone(folder: Any, names: list[str], theirs: float) -> dict[str, Any]:
    """A lower bound: LAPACK's two steps from the finished Gram matrices of all windows to their eigenvalues, nothing else."""
    from scipy.linalg import lapack

    from lowdim.diagnose import farms_windows, weights_of

    weights, reduce, solve = weights_of(folder), 0.0, 0.0
    for name in names:
        weight = weights[name].double()
        starts, r, c = farms_windows((weight.shape[0], weight.shape[1]))
        pieces = torch.stack([weight[i : i + r, j : j + c] for i, j in starts])
        grams = (pieces @ pieces.mT).numpy()
        step = partial(lapack.dsytrd, lower=1, lwork=16 * r)
        took, forms = best_of(2, lambda grams=grams, step=step: [step(gram.T) for gram in grams], time.process_time)
        reduce += took
        solve += best_of(2, lambda forms=forms: [lapack.dsterf(form[1], form[2]) for form in forms], time.process_time)[0]
    seconds = {
        "reduction_to_tridiagonal_cpu_seconds": round(reduce, 2),
        "eigenvalues_of_tridiagonal_cpu_seconds": round(solve, 2),
    }
    return {"program": "LAPACK alone, from the windows' Gram matrices", **seconds, "ratio": round((reduce + solve) / theirs, 3)}


def _fewer_windows(folder: Any, found: Any, theirs: float, windows: int = 6) -> dict[str, Any]:
    """What fewer windows cost, and how far they move the exponents of the default."""
    from lowdim.diagnose import farms as measure

    seconds, fewer = best_of(2, lambda: measure(folder, windows=windows), time.process_time)
    moved = [abs(fewer.alphas[name] - alpha) for name, alpha in found.alphas.items()]
    return {
        "program": f"lowdim, windows={windows}",
        "cpu_seconds": round(seconds, 2),
        "ratio": round(seconds / theirs, 3),
        "goal": 0.5,
        "largest_change_of_alpha": round(max(moved), 4),
        "smallest_alpha_error": round(min(layer.alpha_error for layer in found.layers), 4),
        "spread_of_alpha": round(max(found.alphas.values()) - min(found.alphas.values()), 4),
        "rank_correlation": round(_rank_correlation(list(found.alphas.values()), list(fewer.alphas.values())), 4),
    }


def _rank_correlation(first: list[float], second: list[float]) -> float:
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _farms_memory(size: int = 2048, layers: int = 6) -> dict[str, Any]:
    """The most memory that is the program's own (without the mapped files), in layers of float32."""
    import tempfile
    import threading

    from lowdim.diagnose import farms as measure
    from lowdim.testing.diagnose_case import save_sharded

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    with tempfile.TemporaryDirectory() as folder:
        save_sharded({f"layer.{i}.weight": torch.randn(size, size) for i in range(layers)}, Path(folder), shards=3)
        measure({"w": torch.randn(300, 300)})  # what is loaded once
        before, most, done = own(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                most[0] = max(most[0], own())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            measure(folder)
        finally:
            done.set()
            thread.join()
    used = max(0, most[0] - before) / (4 * size * size)
    return {"program": f"lowdim, {layers} layers of {size} x {size} in shards", "peak_in_layers": round(used, 2), "goal": 2}


def aspect_ratio() -> list[dict[str, Any]]:
    """Spread of alpha over aspect ratios 1 to 8, mean over three seeds: FARMS over the full fit."""
    from lowdim.diagnose import farms as measure
    from lowdim.diagnose import fit_alpha
    from lowdim.reproduce.farms import ASPECTS, COLUMNS, LAWS

    def spread(alpha: Callable[[torch.Tensor], float], draw: Callable[[int, int], torch.Tensor]) -> float:
        means = [sum(alpha(draw(COLUMNS * a, seed)) for seed in range(3)) / 3 for a in ASPECTS]
        return max(means) - min(means)

    rows = []
    for law, draw in LAWS.items():
        full = spread(lambda w: fit_alpha(torch.linalg.svdvals(w).square()).alpha, draw)
        ours = spread(lambda w: measure({"w": w}, rows=64).layers[0].alpha, draw)
        shares = {"full_fit": round(full, 4), "farms": round(ours, 4), "farms_over_full": round(ours / full, 4)}
        rows.append({"law": law, **shares, "goal": 0.1})
    return rows


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "curvature": curvature,
    "fastfood": fastfood,
    "farms": farms,
    "aspect_ratio": aspect_ratio,
}


def main() -> None:
    """Run the parts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    from lowdim.train.environment import environment

    record = json.loads(arguments.out.read_text()) if arguments.out is not None and arguments.out.is_file() else {}
    for name in [arguments.only] if arguments.only else PARTS:
        load = round(os.getloadavg()[0], 1)  # of other programs: seconds mean little on a busy machine
        record[name] = {"rows": PARTS[name](), "load_average_before": load, "threads": torch.get_num_threads()}
    record["environment"] = environment()
    text = json.dumps(record, indent=1) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
