"""FCCov-Net on responses on a sphere without linear trend, also with outliers, against PLS and sliced inverse regression."""

from __future__ import annotations

from statistics import mean
from typing import Any

import numpy as np

from lowdim.errors import MissingExtraError
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

_TRAIN, _TEST = 600, 400


def run(context: Context) -> Outcome:
    """Rank correlation of the one component with the true signal on test samples."""
    seeds = (0,) if context.quick else (0, 1, 2, 3, 4)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        row = {"seed": seed, **{name: round(value, 4) for name, value in _one_seed(seed, 2 if context.quick else 100).items()}}
        rows.append(row)
        context.say(", ".join(f"{key} {value}" for key, value in row.items()))
    baseline = [max(row["PLS"], row["SIR"]) for row in rows]
    rows.append({"seed": "mean", **{name: round(mean(row[name] for row in rows), 4) for name in rows[0] if name != "seed"}})
    each = rows[:-1]
    return Outcome(
        slug="fccov",
        setting=f"X ~ N(0, I_6), Y on the unit sphere at the angle 1.2 (√(X₁² + X₂²) - 1.25) with noise, geodesic distances, "
        f"{_TRAIN} train, {_TEST} test samples, FCCovNet(1), seeds {seeds}; |Spearman| with the true signal",
        rows=rows,
        checks=[
            Check("worst seed: FCCov-Net", min(row["FCCov-Net"] for row in each), ">=", 0.9),
            Check(
                "worst seed: FCCov-Net - better baseline", min(r["FCCov-Net"] - b for r, b in zip(each, baseline)), ">=", 0.5
            ),
            Check("worst seed: lost by outliers", max(r["FCCov-Net"] - r["with outliers"] for r in each), "<=", 0.05),
        ],
        notes=[
            "The penalty, the learning rate and this signal were chosen after looking at seed 0; the others were then fresh.",
            "With outliers, 60 of the training responses are uniform points of the sphere.",
            f"With penalty 1 and all else the same, seed 0 gives {_penalty_one(context):.3f}.",
        ],
    )


def _one_seed(seed: int, epochs: int) -> dict[str, float]:
    try:
        from sklearn.cross_decomposition import PLSRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the baselines") from error
    X, signal, Y, strange = _data(seed)
    train, test = slice(0, _TRAIN), slice(_TRAIN, None)
    found = {
        "FCCov-Net": _net(X[train], Y[train], epochs, seed),
        "with outliers": _net(X[train], strange, epochs, seed),
        "PLS": lambda new: np.asarray(PLSRegression(1).fit(X[train], Y[train]).transform(new))[:, 0],
        "SIR": _sliced(X[train], Y[train]),
    }
    return {name: _rank_correlation(component(X[test]), signal[test]) for name, component in found.items()}


def _penalty_one(context: Context) -> float:
    X, signal, Y, _ = _data(0)
    component = _net(X[:_TRAIN], Y[:_TRAIN], 2 if context.quick else 100, 0, penalty=1.0)
    return _rank_correlation(component(X[_TRAIN:]), signal[_TRAIN:])


def _data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Samples, the signal, the responses, and training responses of which a tenth is replaced."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(_TRAIN + _TEST, 6))
    signal = np.hypot(X[:, 0], X[:, 1])
    angle = 1.2 * (signal - 1.25)
    Y = np.stack([np.cos(angle), np.sin(angle), 0.1 * rng.normal(size=len(X))], axis=1)
    Y /= np.linalg.norm(Y, axis=1, keepdims=True)
    strange = Y[:_TRAIN].copy()
    uniform = rng.normal(size=(60, 3))
    strange[rng.choice(_TRAIN, 60, replace=False)] = uniform / np.linalg.norm(uniform, axis=1, keepdims=True)
    return X, signal, Y, strange


def _net(X: np.ndarray, Y: np.ndarray, epochs: int, seed: int, **options: Any) -> Any:
    from lowdim.represent import FCCovNet

    geodesic = np.arccos(np.clip(Y @ Y.T, -1, 1))
    np.fill_diagonal(geodesic, 0)
    fitted = FCCovNet(1, metric="precomputed", epochs=epochs, random_state=seed, **options).fit(X, geodesic)
    return lambda new: fitted.transform(new)[:, 0]


def _sliced(X: np.ndarray, Y: np.ndarray, slices: int = 10) -> Any:
    """Sliced inverse regression on the first principal component of the responses."""
    first = np.linalg.svd(Y - Y.mean(0), full_matrices=False)[2][0]
    order = np.argsort(Y @ first)
    centre, values, vectors = X.mean(0), *np.linalg.eigh(np.cov(X.T))
    whiten = vectors / np.sqrt(values) @ vectors.T
    means = np.stack([((X[part] - centre) @ whiten).mean(0) for part in np.array_split(order, slices)])
    direction = whiten @ np.linalg.svd(means, full_matrices=False)[2][0]
    return lambda new: (new - centre) @ direction


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    correlation: Any = spearmanr(a, b)
    return abs(float(correlation.statistic))
