"""Measures the speed and memory of representations against their peers, one function a row, in results/bench-represent.json.

    OMP_NUM_THREADS=1 python bench/represent.py            every row
    OMP_NUM_THREADS=1 python bench/represent.py fewshot    one row; it replaces its entry of the file and keeps the others

Seconds are CPU seconds of the process. Each row runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench-represent.json"


def seconds_of(call: Callable[[], Any], repeats: int = 3) -> float:
    """The least CPU seconds of a few calls."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def fewshot() -> dict[str, Any]:
    """SLK at 20,000 points of 64 dimensions around ten places, one label each, against LabelSpreading over neighbours."""
    from sklearn.semi_supervised import LabelSpreading

    from lowdim.represent import TransductiveClustering

    rng = np.random.default_rng(0)
    truth = rng.integers(10, size=20_000)
    X = rng.normal(size=(10, 64))[truth] + rng.normal(size=(len(truth), 64))
    y = np.full(len(truth), -1)
    first = np.unique(truth, return_index=True)[1]
    y[first] = truth[first]
    few = slice(0, 200)
    TransductiveClustering().fit(X[few], np.where(y[few] == -1, truth[few], y[few]))  # loads what it needs
    before = peak_mb()
    ours = seconds_of(lambda: TransductiveClustering().fit(X, y))
    memory = peak_mb() - before
    peer = seconds_of(lambda: LabelSpreading(kernel="knn", n_neighbors=7).fit(X, y))
    accuracy = {
        "SLK": (TransductiveClustering().fit(X, y).transduction_ == truth).mean(),
        "LabelSpreading": (LabelSpreading(kernel="knn", n_neighbors=7).fit(X, y).transduction_ == truth).mean(),
    }
    return {
        "points": len(X),
        "seconds": round(ours, 3),
        "label_spreading_seconds": round(peer, 3),
        "ratio": round(ours / peer, 3),
        "target_ratio": 0.5,
        "peak_mb": round(memory, 1),
        "target_mb": 160,
        "accuracy": {name: round(float(value), 4) for name, value in accuracy.items()},
    }


def fccov() -> dict[str, Any]:
    """Fréchet cumulative covariance of two columns, forward and backward in float32: O(n² log n)."""
    from lowdim.represent import FCCovLoss

    rows, loss = [], FCCovLoss()
    for n in (500, 1000, 2000, 4000):
        generator = torch.Generator().manual_seed(0)
        y, U = (torch.randn(n, d, generator=generator) for d in (3, 2))
        distances = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist")
        seconds = seconds_of(lambda: loss(U.requires_grad_(), distances).backward())  # noqa: B023 (called at once)
        rows.append({"n": n, "seconds": round(seconds, 4), "ns_per_n2_log2_n": round(seconds * 1e9 / n**2 / np.log2(n), 2)})
    return {"rows": rows, "target_seconds_at_2000": 2.0}


def mlc() -> dict[str, Any]:
    """MLC on digits, 10 epochs after 5 of the start, against KMeans plus the same network with a loss that costs nothing."""
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    from lowdim.represent import ManifoldLinearizingClustering
    from lowdim.represent.core.fitting import batches, train
    from lowdim.represent.mlc.clustering import _TwoHeads

    X = load_digits().data
    options = {"warmup_epochs": 5, "epochs": 10, "lr": 0.015, "lr_cluster": 0.02, "random_state": 0}
    ManifoldLinearizingClustering(10, warmup_epochs=1, epochs=1, random_state=0).fit(X[:300])  # loads what it needs
    ours = seconds_of(lambda: ManifoldLinearizingClustering(10, **options).fit(X))

    def network() -> None:
        net, samples = _TwoHeads(X.shape[1], 256, 32), torch.from_numpy(X).float()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=True)  # as MLC's own

        def loss(batch: torch.Tensor) -> torch.Tensor:
            Z, C = net(samples[batch])
            return Z.square().sum() + C.square().sum()

        train(net, loss, batches(len(X), 256, 15, 0), [optimizer], 0)

    network()
    alone, peer = seconds_of(network), seconds_of(lambda: KMeans(10, n_init=10, random_state=0).fit(X))
    calls = mlc_calls(len(X), 256, 32, full_batches=10 * (len(X) // 256))
    return {
        "samples": len(X),
        "seconds": round(ours, 3),
        "network_seconds": round(alone, 3),
        "kmeans_seconds": round(peer, 3),
        "ratio": round(ours / (alone + peer), 2),
        "target_ratio": 1.5,
        "seconds_of_calls_alone": {name: round(value, 3) for name, value in calls.items()},
        "ratio_of_network_and_calls": round((alone + sum(calls.values())) / (alone + peer), 2),
    }


def mlc_calls(samples: int, n: int, d: int, full_batches: int) -> dict[str, float]:
    """Seconds of the large calls that MLC's formulas lead to, each by itself: what is left if all around them cost nothing.

    A batch: the moments of n clusters and the two gradients through them, each a product (n, n) by (n, d (d + 1) / 2); the
    inverses of n matrices, in the quicker of two ways; the exponentials of Sinkhorn. Labels: the kernel of all samples and its
    product with a vector, 30 times. Batches of the start and the clustering of the eigenvectors are left out.
    """
    from lowdim.represent.mlc.blocks import inverse

    generator = torch.Generator().manual_seed(0)
    gamma, packed = torch.rand(n, n, generator=generator), torch.randn(n, d * (d + 1) // 2, generator=generator)
    rows = torch.randn(n, 2 * d, d, generator=generator)
    matrices, identity = rows.mT @ rows + torch.eye(d), torch.eye(d).expand(n, d, d)
    wide = torch.rand(samples, d, generator=generator, dtype=torch.float64) / d
    kernel = (wide @ wide.T).exp_()

    def products() -> None:
        gamma.T @ packed
        gamma @ packed
        packed @ packed.T

    def by_factors() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(matrices).L, identity, upper=False)

    inverses = min(seconds_of(way, 20) for way in (by_factors, lambda: inverse(matrices)))
    batch = {"products": seconds_of(products, 20), "inverses": inverses, "sinkhorn": seconds_of(lambda: gamma.exp(), 20)}
    labels = seconds_of(lambda: (wide @ wide.T).exp_()) + 30 * seconds_of(lambda: kernel @ wide[:, 0], 20)
    return {name: full_batches * seconds for name, seconds in batch.items()} | {"labels": labels}


def starbucks() -> dict[str, Any]:
    """A step of Starbucks on all-MiniLM-L6-v2 at six pairs, in turns with one of Matryoshka2dLoss of sentence-transformers."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, Matryoshka2dLoss

    from lowdim.models import load_sentence_encoder
    from lowdim.represent import StarbucksLoss

    pairs, rng = ((1, 32), (2, 64), (3, 128), (4, 192), (5, 256), (6, 384)), np.random.default_rng(0)
    words = ("the", "old", "man", "reads", "a", "paper", "near", "his", "window", "while", "rain", "falls")
    texts = [[" ".join(rng.choice(words, 16)) for _ in range(16)] for _ in range(2)]
    scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
    model = load_sentence_encoder("minilm", device="cpu").train()
    base, dims = CoSENTLoss(model), [dim for _, dim in pairs]
    losses = {
        "starbucks": StarbucksLoss(model, base, pairs),
        "matryoshka2d": Matryoshka2dLoss(model, base, dims),  # one other layer is drawn for each step
        "matryoshka2d_all_layers": Matryoshka2dLoss(model, base, dims, n_layers_per_step=-1),
    }
    columns = [model.preprocess(side) for side in texts]

    def step(loss: Any) -> float:
        start = time.process_time()
        model.zero_grad(set_to_none=True)
        loss([dict(column) for column in columns], scores).backward()
        return time.process_time() - start

    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(7):
        for name, loss in losses.items():
            times[name].append(step(loss))
    found = {f"{name}_ms": round(1e3 * float(np.median(each[1:])), 1) for name, each in times.items()}
    return {
        **found,
        "ratio": round(found["starbucks_ms"] / found["matryoshka2d_ms"], 3),
        "pairs": [list(pair) for pair in pairs],
    }


def replacement() -> dict[str, Any]:
    """The report on 10,000 vectors of 384 dimensions by two models, with labels of 100 classes and without."""
    from lowdim.represent import replacement_report

    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(10_000, 384, generator=generator) for _ in range(2))
    labels = torch.arange(10_000) % 100
    return {
        "seconds": round(seconds_of(lambda: replacement_report(old, new, labels), 2), 2),
        "seconds_without_labels": round(seconds_of(lambda: replacement_report(old, new), 2), 2),
        "peak_mb": round(peak_mb()),
    }


def funnel() -> dict[str, Any]:
    """Ten neighbours among 50,000 vectors of 384 coordinates: the first search at 64 by torch, by faiss and by usearch."""
    from lowdim.represent import adaptive_retrieve, index_bytes, nested_index

    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 385) ** -0.5  # the first coordinates say most, as training for nested sizes makes them
    database = torch.randn(50_000, 384, generator=generator) * scale
    queries = database[:200] + 0.5 * torch.randn(200, 384, generator=generator) * scale
    full = adaptive_retrieve(queries, database, retrieval_dim=384, rerank_dim=384, shortlist=10).indices
    rows = []
    for name, library in (("exact, 384", None), ("exact, 64", None), ("faiss, 64", "faiss"), ("usearch, 64", "usearch")):
        dim = int(name.rpartition(" ")[2])
        start = time.process_time()
        index = None if library is None else nested_index(database, dim, library=library)
        built = time.process_time() - start
        if library == "faiss":
            index.hnsw.efSearch = 200  # as many as the shortlist
        how = {"retrieval_dim": dim, "rerank_dim": 384, "shortlist": 200, "k": 10, "index": index}
        found = adaptive_retrieve(queries, database, **how).indices
        rows.append(
            {
                "first search": name,
                "ms a query": round(1e3 * seconds_of(lambda: adaptive_retrieve(queries, database, **how)) / 200, 3),  # noqa: B023
                "recall": round(float((found[:, :, None] == full[:, None]).any(1).double().mean()), 4),
                "index MB": 0.0 if index is None else round(index_bytes(index) / 1e6, 1),
                "seconds to build": round(built, 1),
            }
        )
    return {"rows": rows, "vectors MB": round(database.nbytes / 1e6, 1)}


ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "fewshot": fewshot,
    "fccov": fccov,
    "mlc": mlc,
    "starbucks": starbucks,
    "replacement": replacement,
    "funnel": funnel,
}


def main() -> None:
    """Run the rows and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; none means all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="run the one row in this process and print it")
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - set(ROWS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if arguments.here:
        torch.set_num_threads(1)
        (row,) = arguments.rows
        print(json.dumps(ROWS[row]()))
        return
    import sklearn

    import lowdim
    from lowdim.train.environment import processor

    record = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for name, earlier in record.items():  # of the machine that they were measured on
        if name in ROWS:
            earlier.setdefault("cpu", record["environment"]["cpu"])
    for row in arguments.rows or ROWS:
        command = [sys.executable, __file__, row, "--here"]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        record[row] = json.loads(done.stdout) | {"load": os.getloadavg()[0], "cpu": processor()}
        print(row, json.dumps(record[row]))
    record["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "lowdim": lowdim.__version__,
        "cpu": processor(),
        "threads": 1,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
