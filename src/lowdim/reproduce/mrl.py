"""MRL on Fashion-MNIST: one nested embedding against one model per size, a cut-off embedding and its SVD."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
from torch import Tensor, nn

from lowdim.errors import MissingExtraError
from lowdim.linalg import derive_seed, stream, svd
from lowdim.represent import MatryoshkaCascade, MatryoshkaCrossEntropy, MatryoshkaHead, adaptive_retrieve
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

DIMS = (2, 4, 8, 16, 64)
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def run(context: Context) -> Outcome:
    """1-NN accuracy at each size, adaptive retrieval and the cascade, three seeds."""
    data = _data(context)
    seeds, epochs = ((0,), 2) if context.quick else ((0, 1, 2), 10)
    tables, extras = [], []
    for seed in seeds:
        table, extra = _one_seed(data, seed, epochs, context.say)
        tables.append(table)
        extras.append(extra)

    columns = list(tables[0])
    means = {c: {m: mean(t[c][m] for t in tables) for m in DIMS} for c in columns}
    rows: list[dict] = [{"size": m, **{c: round(means[c][m], 4) for c in columns}} for m in DIMS]
    for seed, extra in zip(seeds, extras):
        rows.append({"seed": seed, **{key: round(value, 4) for key, value in extra.items()}})
    gain = mean(means["MRL"][m] - means["slice"][m] for m in (2, 4))
    behind = mean(means["MRL"][m] - means["indep"][m] for m in DIMS[1:])
    lost = [extra["full_accuracy"] - extra["adaptive_accuracy"] for extra in extras]
    dropped = [extra["head_accuracy"] - extra["cascade_accuracy"] for extra in extras]
    return Outcome(
        slug="mrl",
        setting=f"Fashion-MNIST, 8,000 train, 2,000 test images, 784-256-ReLU-64, dims {DIMS}, AdamW 1e-3, batch 128, "
        f"{epochs} epochs, seeds {seeds}; cosine 1-NN accuracy",
        rows=rows,
        checks=[
            Check("mean over sizes 2 and 4 of MRL - slice", gain, ">=", 0.08),
            Check("mean over sizes 4 to 64 of MRL - one model per size", behind, ">=", -0.01),
            Check("worst seed: accuracy lost by adaptive retrieval at 8, rerank at 64", max(lost), "<=", 0.005),
            Check("MFLOPs of full search over adaptive", extras[0]["full_mflops"] / extras[0]["adaptive_mflops"], ">=", 5.0),
            Check("worst seed: accuracy lost by the cascade", max(dropped), "<=", 0.02),
            Check("worst seed: expected size of the cascade", max(extra["expected_size"] for extra in extras), "<=", 32.0),
        ],
        notes=[
            f"At size 2 a model trained for it reaches {means['indep'][2]:.3f}, MRL {means['MRL'][2]:.3f}: very small sizes "
            "have their price.",
            f"At size 16 cutting the plain 64-model off gives {means['slice'][16]:.3f} (MRL {means['MRL'][16]:.3f}): "
            "above the task's own dimension nesting is not needed.",
            "pca is scikit-learn's on the 64-model's training embeddings, svd the same without centring.",
        ],
    )


def _data(context: Context) -> Data:
    train, train_y, test, test_y = fashion_mnist(context)
    n, q = (1000, 400) if context.quick else (8000, 2000)
    return train[:n].float() / 255, train_y[:n], test[:q].float() / 255, test_y[:q]


def _one_seed(
    data: Data, seed: int, epochs: int, say: Callable[[str], None]
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    x, y, q, target = data
    nested, head = _train(x, y, DIMS, seed, epochs)
    tied, _ = _train(x, y, DIMS, seed, epochs, efficient=True)
    alone = {m: _train(x, y, (m,), seed, epochs)[0] for m in DIMS}
    with torch.no_grad():
        base, query = alone[DIMS[-1]](x), alone[DIMS[-1]](q)
        right = svd(base)[2].T
        table = {
            "MRL": _by_size(nested(x), nested(q), y, target),
            "MRL-E": _by_size(tied(x), tied(q), y, target),
            "indep": {m: _nearest(alone[m](x), alone[m](q), y, target, m) for m in DIMS},
            "slice": _by_size(base, query, y, target),
            "svd": _by_size(base @ right, query @ right, y, target),
            "pca": _by_size(*_pca(base, query), y, target),
        }
        extra = _adaptive(nested(x), nested(q), y, target) | _cascade(torch.stack(head(nested(q))).softmax(-1), target)
    say(f"seed {seed}: " + ", ".join(f"{name} {scores[8]:.3f}" for name, scores in table.items()) + " at size 8")
    return table, extra


def _train(
    x: Tensor, y: Tensor, dims: tuple[int, ...], seed: int, epochs: int, *, efficient: bool = False
) -> tuple[nn.Module, MatryoshkaHead]:
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "mrl", "weights") % 2**32)
        encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, dims[-1]))
        head = MatryoshkaHead(dims[-1], 10, dims, efficient=efficient)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=1e-4)
    loss_fn, order = MatryoshkaCrossEntropy(), stream(seed, "mrl", "order")
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(128):
            optimizer.zero_grad()
            loss_fn(head(encoder(x[batch])), y[batch]).backward()
            optimizer.step()
    return encoder, head


def _nearest(database: Tensor, queries: Tensor, y: Tensor, target: Tensor, size: int) -> float:
    found = adaptive_retrieve(queries, database, retrieval_dim=size, rerank_dim=size, shortlist=1)
    return float((y[found.indices[:, 0]] == target).float().mean())


def _by_size(database: Tensor, queries: Tensor, y: Tensor, target: Tensor) -> dict[int, float]:
    return {m: _nearest(database, queries, y, target, m) for m in DIMS}


def _pca(database: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the PCA baseline") from error
    pca = PCA(DIMS[-1]).fit(database.numpy())
    return torch.from_numpy(pca.transform(database.numpy())), torch.from_numpy(pca.transform(queries.numpy()))


def _adaptive(database: Tensor, queries: Tensor, y: Tensor, target: Tensor) -> dict[str, float]:
    queries, target = queries[:500], target[:500]
    full = adaptive_retrieve(queries, database, retrieval_dim=64, rerank_dim=64, shortlist=1)
    small = adaptive_retrieve(queries, database, retrieval_dim=8, rerank_dim=64, shortlist=100, k=1)
    return {
        "full_accuracy": float((y[full.indices[:, 0]] == target).float().mean()),
        "adaptive_accuracy": float((y[small.indices[:, 0]] == target).float().mean()),
        "full_mflops": len(database) * 64 / 1e6,  # one search, nothing to reorder
        "adaptive_mflops": small.mflops,
    }


def _cascade(probabilities: Tensor, target: Tensor) -> dict[str, float]:
    half = len(target) // 2
    cascade = MatryoshkaCascade(DIMS).fit(probabilities[:, :half], target[:half])
    result = cascade.predict(probabilities[:, half:])
    return {
        "head_accuracy": float((probabilities[-1, half:].argmax(-1) == target[half:]).float().mean()),
        "cascade_accuracy": float((result.predictions == target[half:]).float().mean()),
        "expected_size": result.expected_dim,
    }
