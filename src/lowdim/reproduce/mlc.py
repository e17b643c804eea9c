"""MLC on digits: whether each class becomes low-dimensional and classes nearly orthogonal, and what the clusters are worth."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lowdim.errors import MissingExtraError
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

_OPTIONS: dict[str, Any] = {"n_components": 32, "lr": 0.015, "lr_cluster": 0.02}


def run(context: Context) -> Outcome:
    """Ranks, cosines and the accuracy of clusters, seed by seed."""
    try:
        from sklearn.cluster import SpectralClustering
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the digits data") from error
    data: Any = load_digits()
    count = 300 if context.quick else len(data.data)
    X, y = data.data[:count], data.target[:count]
    epochs = 2 if context.quick else 15
    rows: list[dict[str, Any]] = []
    for seed in (2,) if context.quick else (2, 3, 4):
        rows.append({"seed": seed, **_measured(X, y, seed, epochs)})
        context.say(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    means = _kmeans(X, 0)
    graph: Any = SpectralClustering(10, affinity="nearest_neighbors", n_neighbors=10, random_state=0).fit(X).labels_
    raw = {"KMeans on pixels": means, "spectral clustering": graph}
    table = [*rows, *({"seed": name, "accuracy": _accuracy(labels, y)} for name, labels in raw.items())]
    return Outcome(
        slug="mlc",
        setting=f"scikit-learn's digits, {count} x 64, 10 clusters, 32 components, {epochs} epochs of each part, "
        "rates 0.015 and 0.02, no augmentation; rank: directions that hold 95 % of the energy; cosines within and between "
        "classes",
        rows=table,
        checks=[
            Check("worst seed: rank of all features", min(row["rank"] for row in rows), ">=", 20),
            Check("worst seed: largest rank of a class", max(row["class_rank"] for row in rows), "<=", 12),
            Check("worst seed: |cosine| within over between", min(row["within"] / row["between"] for row in rows), ">=", 5.0),
            Check(
                "worst seed: accuracy - KMeans on the same features",
                min(row["accuracy"] - row["kmeans_on_z"] for row in rows),
                ">=",
                0.05,
            ),
        ],
        notes=[
            "The paper's lead in clustering over raw-pixel baselines is not reproduced: see the last rows. It rests on strong "
            "self-supervised features; what shows here is the linearisation.",
            "The rate 0.015 was chosen on seeds 0 and 1, which are therefore left out here: at 0.03 the first epochs of seed 0 "
            "put all features into one direction, and they stayed there: watch R.",
        ],
    )


def _measured(X: np.ndarray, y: np.ndarray, seed: int, epochs: int) -> dict[str, Any]:
    from sklearn.metrics import normalized_mutual_info_score

    from lowdim.represent import ManifoldLinearizingClustering

    start = time.perf_counter()
    fitted: Any = ManifoldLinearizingClustering(10, warmup_epochs=epochs, epochs=epochs, random_state=seed, **_OPTIONS).fit(X)
    seconds = time.perf_counter() - start
    Z = fitted.transform(X)
    cosines = np.abs(Z @ Z.T)
    same = y[:, None] == y
    np.fill_diagonal(cosines, np.nan)
    return {
        "rank": _rank(Z),
        "class_rank": max(_rank(Z[y == c]) for c in range(10)),
        "within": round(float(np.nanmean(cosines[same])), 4),
        "between": round(float(np.nanmean(cosines[~same])), 4),
        "accuracy": _accuracy(fitted.labels_, y),
        "nmi": round(float(normalized_mutual_info_score(y, fitted.labels_)), 4),
        "kmeans_on_z": _accuracy(_kmeans(Z, seed), y),
        "seconds": round(seconds, 1),
    }


def _kmeans(X: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    options: Any = {"n_init": 10, "random_state": seed}
    return np.asarray(KMeans(10, **options).fit(X).labels_)


def _rank(Z: np.ndarray) -> int:
    energy = np.linalg.svd(Z, compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(energy) / energy.sum(), 0.95) + 1)


def _accuracy(labels: np.ndarray, y: np.ndarray) -> float:
    """Share of samples in the class of their cluster, clusters given to classes as well as possible."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((10, 10), dtype=int)
    np.add.at(table, (labels, y), 1)
    return round(float(table[linear_sum_assignment(-table)].sum() / len(y)), 4)
