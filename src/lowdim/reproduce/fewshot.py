"""SLK on few-shot episodes of digits: clustering with the labelled points held, against the nearest mean and LabelSpreading."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import numpy as np

from lowdim.errors import MissingExtraError
from lowdim.represent import episode_features
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

_WAYS, _QUERIES = 5, 15
#: Arm -> options of TransductiveClustering.
_CLUSTERINGS: dict[str, dict[str, Any]] = {
    "K-means": {"prototype": "mean", "laplacian": False},
    "SLK-Means": {"prototype": "mean"},
    "SLK-Modes": {},
    "SLK-Modes, free": {"clamp": False},
}


def run(context: Context) -> Outcome:
    """Accuracy on the queries of episodes with one and five labels a class; memory and seconds at 20,000 points."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the digits data") from error
    data: Any = load_digits()
    images, labels = data.data, data.target
    seeds, count = ((0,), 4) if context.quick else ((0, 1), 150)
    score: dict[tuple[str, int, int], float] = {}
    rows: list[dict[str, Any]] = []
    for name, predict in _arms().items():
        row: dict[str, Any] = {"arm": name}
        for shots in (1, 5):
            for seed in seeds:
                found = [_accuracy(predict, *episode) for episode in _episodes(images, labels, shots, seed, count)]
                score[name, shots, seed] = mean(found)
                row[f"{shots}-shot {seed}"] = round(mean(found), 4)
        rows.append(row)
        context.say(", ".join(f"{key} {value}" for key, value in row.items()))
    large, checks = _many_points(2_000 if context.quick else 20_000), []

    def least(what: str, shots: int, arms: tuple[str, ...], other: str, bound: float) -> None:
        gaps = [score[arm, shots, seed] - score[other, shots, seed] for arm in arms for seed in seeds]
        checks.append(Check(f"{shots}-shot, worst seed: {what} - {other}", min(gaps), ">=", bound))

    both = ("SLK-Means", "SLK-Modes")
    least("K-means", 1, ("K-means",), "nearest mean", 0.04)
    for shots in (1, 5):
        least("SLK", shots, both, "K-means", 0.0)
        least("SLK-Modes", shots, ("SLK-Modes",), "SLK-Modes, free", 0.0)
    least("SLK", 1, both, "LabelSpreading", 0.02)
    least("SLK", 5, both, "nearest mean", 0.02)
    checks.append(Check("MB of arrays at 20,000 points", large["peak_mb"], "<=", 160.0))
    return Outcome(
        slug="fewshot",
        setting=f"scikit-learn's digits, CL2N with the mean of all images, {_WAYS} random classes, {_QUERIES} queries a class, "
        f"{count} episodes, seeds {seeds}; accuracy on the queries by shots and seed; free: labelled points may move",
        rows=[*rows, large],
        checks=checks,
        notes=[
            "Digits were chosen after another data set had failed: where a small network's features of unseen Fashion-MNIST "
            "classes do not form clusters, one label a class gained nothing over the nearest mean.",
            "Memory is what tracemalloc sees: arrays of numpy, not the block of 8 MiB for distances.",
        ],
    )


Predict = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # points, their labels with -1, how many are labelled


def _arms() -> dict[str, Predict]:
    from scipy.spatial.distance import cdist
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.semi_supervised import LabelSpreading

    from lowdim.represent import TransductiveClustering

    def clustering(options: dict[str, Any]) -> Predict:
        def predict(X: np.ndarray, y: np.ndarray, known: int) -> np.ndarray:
            with warnings.catch_warnings():  # a few episodes of the arm that does not clamp go to and fro
                warnings.simplefilter("ignore", ConvergenceWarning)
                return TransductiveClustering(**options).fit(X, y).transduction_[known:]

        return predict

    def nearest(X: np.ndarray, y: np.ndarray, known: int) -> np.ndarray:
        classes = np.unique(y[:known])
        means = np.stack([X[:known][y[:known] == c].mean(axis=0) for c in classes])
        return classes[cdist(X[known:], means).argmin(axis=1)]

    def spreading(X: np.ndarray, y: np.ndarray, known: int) -> np.ndarray:
        return LabelSpreading(kernel="knn", n_neighbors=7, max_iter=100).fit(X, y).transduction_[known:]

    arms = {"nearest mean": nearest, **{name: clustering(options) for name, options in _CLUSTERINGS.items()}}
    return {**arms, "LabelSpreading": spreading}


def _episodes(
    images: np.ndarray, labels: np.ndarray, shots: int, seed: int, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Features and labels of the support, then the queries; the truth of the queries."""
    rng = np.random.default_rng(seed)
    base_mean = images.mean(0)
    for _ in range(count):
        classes = rng.choice(10, _WAYS, replace=False)
        drawn = np.stack([rng.choice(np.nonzero(labels == c)[0], shots + _QUERIES, replace=False) for c in classes])
        support, query = drawn[:, :shots].ravel(), drawn[:, shots:].ravel()
        features = episode_features(images[support], images[query], base_mean=base_mean)
        y = np.concatenate([labels[support], np.full(len(query), -1)])
        yield np.concatenate(features), y, labels[query]


def _accuracy(predict: Predict, X: np.ndarray, y: np.ndarray, truth: np.ndarray) -> float:
    return float((predict(X, y, len(y) - len(truth)) == truth).mean())


def _many_points(count: int) -> dict[str, Any]:
    """Ten places in 64 dimensions, one label each."""
    from lowdim.represent import TransductiveClustering

    rng = np.random.default_rng(0)
    truth = rng.integers(10, size=count)
    X = rng.normal(size=(10, 64))[truth] + rng.normal(size=(count, 64))
    y = np.full(count, -1)
    first = np.unique(truth, return_index=True)[1]
    y[first] = truth[first]
    start = time.perf_counter()
    TransductiveClustering().fit(X, y)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    fitted = TransductiveClustering().fit(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    accuracy = float((fitted.transduction_ == truth).mean())
    return {"points": count, "seconds": round(seconds, 2), "peak_mb": round(peak / 1e6, 1), "accuracy": round(accuracy, 4)}
