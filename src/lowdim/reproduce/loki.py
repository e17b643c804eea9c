"""loki on digits of which some classes were never seen, against argmax; and which class to label next, on random trees."""

from __future__ import annotations

from statistics import mean
from typing import Any

import numpy as np

from lowdim.errors import MissingExtraError
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

_KNOWN = (4, 6, 8)
_NODES, _FIRST = 20, 3
_STAGES = _NODES - _FIRST + 1


def run(context: Context) -> Outcome:
    """Mean squared distance between true and predicted class; sizes of the locus by the number of labelled classes."""
    seeds, trees = ((0,), 2) if context.quick else ((0, 1, 2, 3, 4), 20)
    rows: list[dict[str, Any]] = []
    for model in ("logistic regression", "5 neighbours"):
        for known in _KNOWN:
            each = [_digits(model, known, seed) for seed in seeds]
            row: dict[str, Any] = {"model": model, "known": known}
            rows.append({**row, **{name: round(mean(one[name] for one in each), 4) for name in each[0]}})
            context.say(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    sizes = {strategy: mean(_tree(strategy, seed) for seed in range(trees)) for strategy in ("farthest", "random")}
    linear = [row for row in rows if row["model"] == "logistic regression"]
    checks = [Check(f"{r['known']} known: risk of loki / of argmax", r["loki"] / r["argmax"], "<=", 1.0) for r in linear]
    checks.append(Check("6 known: share of the risk that is gone", 1 - linear[1]["loki"] / linear[1]["argmax"], ">=", 0.03))
    checks.append(Check("trees: mean locus, farthest - random", sizes["farthest"] - sizes["random"], ">=", 0.0))
    return Outcome(
        slug="loki",
        setting=f"scikit-learn's digits, pixels in [0, 1], half to train on, only of the known classes (drawn by seed), half "
        f"to test on, all ten; D between mean images of the classes; risk: mean D², seeds {seeds}. Trees: {trees} of {_NODES} "
        f"nodes, {_FIRST} labelled at first, mean size of the locus over {_STAGES} stages",
        rows=[*rows, *({"model": f"trees, {strategy}", "mean locus": round(size, 4)} for strategy, size in sizes.items())],
        checks=checks,
        notes=[
            "D is made from images of all ten classes, also of those that the model never sees: it stands for a metric from "
            "outside, such as a taxonomy or text embeddings.",
            "The checks are of logistic regression; the rows of 5 neighbours are for comparison.",
            "The paper's ImageNet and CLIP results were not repeated.",
        ],
    )


def _digits(model: str, known: int, seed: int) -> dict[str, float]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the digits data") from error
    from lowdim.represent import LokiClassifier, embedding_distances, squared_distance_risk

    data: Any = load_digits()
    X, y = data.data / 16, data.target
    D = embedding_distances(np.stack([X[y == c].mean(axis=0) for c in range(10)]))
    parts: Any = train_test_split(np.arange(len(y)), test_size=0.5, random_state=seed, stratify=y)
    train, test = parts
    seen = np.random.default_rng(seed).choice(10, known, replace=False)
    train = train[np.isin(y[train], seen)]
    inner: Any = LogisticRegression(max_iter=1000) if model == "logistic regression" else KNeighborsClassifier(5)
    loki = LokiClassifier(inner, distances=D).fit(X[train], y[train])
    found = {"argmax": loki.estimator_.predict(X[test]), "loki": loki.predict(X[test])}
    return {
        **{name: squared_distance_risk(y[test], guess, D) for name, guess in found.items()},
        **{f"accuracy, {name}": float((guess == y[test]).mean()) for name, guess in found.items()},
        "unseen predicted": float((~np.isin(found["loki"], seen)).mean()),
    }


def _tree(strategy: str, seed: int) -> float:
    """The locus of a random tree, mean over the stages of labelling one class after the other."""
    from lowdim.represent import active_selection, label_locus

    rng = np.random.default_rng(seed)
    D = np.zeros((_NODES, _NODES))
    for node in range(1, _NODES):  # hangs on an earlier node
        D[node, :node] = D[:node, node] = D[rng.integers(node), :node] + rng.uniform(0.5, 1.5)
    labelled = rng.choice(_NODES, _FIRST, replace=False).tolist()
    if strategy == "farthest":
        sizes = active_selection(D, labelled, method="tree")[1]
    else:
        sizes = []
        while len(sizes) < _STAGES:
            inside = label_locus(D, labelled, method="tree")
            sizes.append(int(inside.sum()))
            if inside.all():
                break
            labelled.append(int(rng.choice(np.flatnonzero(~inside))))
    return mean(sizes + [_NODES] * (_STAGES - len(sizes)))
