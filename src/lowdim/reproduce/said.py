"""SAID and DID on Fashion-MNIST: what pre-training does to the intrinsic dimension, and a bound that is not vacuous."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters import SubspaceModel, said
from lowdim.diagnose import compression_bound, intrinsic_dimension, quantize_subspace
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.digits import accuracy, batches
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

TRAIN, TEST, DOWNSTREAM, BATCH, BITS = 10_000, 4_000, 2_000, 64, 8
FIRST_GROUP = (0, 3, 4, 7, 9)  # against 1, 2, 5, 6, 8
DIMENSIONS = (16, 32, 64)
STARTS, KINDS = ("pre-trained", "random"), ("DID", "SAID")


@dataclass(frozen=True)
class Images:
    """Pixels in [0, 1]; the ten classes, and the two groups of them."""

    x: Tensor  # (samples, 784)
    classes: Tensor  # (samples,)
    groups: Tensor  # (samples,)

    def first(self, count: int) -> Images:
        """The first `count` samples."""
        return Images(self.x[:count], self.classes[:count], self.groups[:count])


def run(context: Context) -> Outcome:
    """A network of 40 thousand numbers, trained in 16, 32 and 64 dimensions from a pre-trained and from a random start."""
    train, test = _images(context)
    seeds = range(1) if context.quick else range(3)
    scores: dict[tuple[str, ...], list[float]] = {}
    compressed: list[dict[str, float]] = []
    for seed in seeds:
        context.say(f"seed {seed}")
        for key, score in _one_seed(context, train, test, seed, compressed).items():
            scores.setdefault(key, []).append(score)
    mean = {key: statistics.mean(values) for key, values in scores.items()}
    rows: list[dict[str, Any]] = []
    for start in STARTS:
        rows.append({"method": "full", "start": start, "dimension": "", **_row(scores["full", start])})
        for kind in KINDS:
            rows += [{"method": kind, "start": start, "dimension": d, **_row(scores[kind, start, str(d)])} for d in DIMENSIONS]
    reached = {(kind, start): _reached(scores, kind, start) for kind in KINDS for start in STARTS}
    checks = []
    for kind in KINDS:
        for d in (32, 64):
            gain = mean[kind, "pre-trained", str(d)] - mean[kind, "random", str(d)]
            checks.append(Check(f"{kind}, d = {d}: pre-trained start minus random start", gain, ">=", 0.05))
        fewer = reached[kind, "random"] - reached[kind, "pre-trained"]
        checks.append(Check(f"{kind}: d_90 of the random start minus that of the pre-trained (128: above 64)", fewer, ">=", 1))
    for d in (32, 64):
        gain = mean["SAID", "pre-trained", str(d)] - mean["DID", "pre-trained", str(d)]
        checks.append(Check(f"SAID minus DID, d = {d}, pre-trained start", gain, ">=", -0.01))
    worst = {key: max(one[key] for one in compressed) for key in compressed[0]}
    checks += [
        Check("accuracy lost by 8 bits, SAID, d = 32", statistics.mean(one["lost"] for one in compressed), "<=", 0.01),
        Check("test error minus bound, largest over seeds", worst["slack"], "<=", 0.0),
        Check("bound with 40 numbers of 8 bits, largest over seeds", worst["bound"], "<=", 0.999),
    ]
    average = {key: statistics.mean(one[key] for one in compressed) for key in compressed[0]}
    said_d90 = ", ".join(f"{kind} {start}: {_spoken(d)}" for (kind, start), d in reached.items())
    return Outcome(
        "said",
        "Fashion-MNIST, 784-48-48-c with LayerNorm, pre-trained on ten classes of 10,000 images (500 steps of 64, Adam 1e-3); "
        "then a two-way grouping with 2,000 images and a new head: full 150 steps at 1e-3, subspaces 100 steps of Adam 2e-2 "
        f"with linear decay to 5 %; accuracy on 4,000 test images, {len(seeds)} seeds.",
        rows=rows,
        checks=checks,
        notes=[
            f"d_90 (0.9 of the full score from the pre-trained start, {0.9 * mean['full', 'pre-trained']:.3f}): {said_d90}.",
            f"8 bits at d = 32: training error {average['train error']:.3f}, test error {average['test error']:.3f}, bound "
            f"{average['tight']:.3f} for 32 numbers and {average['bound']:.3f} with the quantizer's two ranges (40 numbers).",
            "A small network and one data set; RoBERTa was not run. Ten of SAID's numbers are scales, a lot at d = 16.",
            f"With 32 bits for each number the bound is {compression_bound(average['train error'], 32, DOWNSTREAM):.3f}.",
        ],
    )


def _one_seed(
    context: Context, train: Images, test: Images, seed: int, compressed: list[dict[str, float]]
) -> dict[tuple[str, ...], float]:
    pretrained = _network(10, seed)
    _train(pretrained, pretrained.parameters(), train.x, train.classes, 20 if context.quick else 500, 1e-3, seed)
    head = _network(2, 100 + seed)[-1]
    starts = {"pre-trained": pretrained, "random": _network(10, 200 + seed)}
    task = train.first(DOWNSTREAM)
    steps = 10 if context.quick else 100
    found: dict[tuple[str, ...], float] = {}
    for start, body in starts.items():

        def fresh(body: nn.Sequential = body) -> nn.Sequential:
            return nn.Sequential(*list(copy.deepcopy(body))[:-1], copy.deepcopy(head))

        full = fresh()
        _train(full, full.parameters(), task.x, task.groups, 15 if context.quick else 150, 1e-3, seed)
        found["full", start] = accuracy(full, test.x, test.groups)
        for kind in KINDS:
            for d in DIMENSIONS:
                sub = said(fresh(), d, structure_aware=kind == "SAID", seed=seed)
                trained = [p for p in sub.parameters() if p.requires_grad]
                _train(sub, trained, task.x, task.groups, steps, 2e-2, seed, decay=True)
                found[kind, start, str(d)] = accuracy(sub, test.x, test.groups)
                if (kind, start, d) == ("SAID", "pre-trained", 32):
                    compressed.append(_compress(sub, task, test))
    return found


@torch.no_grad()
def _compress(sub: SubspaceModel, task: Images, test: Images) -> dict[str, float]:
    before = accuracy(sub, test.x, test.groups)
    vectors = [sub.theta, *([] if sub.scales is None else [sub.scales])]
    for vector in vectors:
        vector.copy_(quantize_subspace(vector, BITS))
    train_error, test_error = 1 - accuracy(sub, task.x, task.groups), 1 - accuracy(sub, test.x, test.groups)
    described = sub.dimension + -(-32 * len(vectors) // BITS)
    bound = compression_bound(train_error, described, len(task.x), bits=BITS)
    return {
        "lost": before - (1 - test_error),
        "train error": train_error,
        "test error": test_error,
        "tight": compression_bound(train_error, sub.dimension, len(task.x), bits=BITS),
        "bound": bound,
        "slack": test_error - bound,
    }


def _reached(scores: dict[tuple[str, ...], list[float]], kind: str, start: str) -> int:
    """`d_90`, of the full score from the pre-trained start; twice the largest dimension where none reaches it."""
    full = scores["full", "pre-trained"]
    found = intrinsic_dimension(
        lambda d, seed: scores[kind, start, str(d)][seed],
        DIMENSIONS,
        baseline=statistics.mean(full),
        seeds=range(len(full)),
    )
    return found.dimension or 2 * DIMENSIONS[-1]


def _spoken(d: int) -> str:
    return str(d) if d in DIMENSIONS else f"above {DIMENSIONS[-1]}"


def _row(values: list[float]) -> dict[str, Any]:
    return {
        "test accuracy": round(statistics.mean(values), 4),
        "deviation over seeds": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
    }


def _network(classes: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n in (784, 48):
            layers += [nn.Linear(n, 48), nn.LayerNorm(48), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(48, classes))


def _train(
    model: nn.Module, parameters: Any, x: Tensor, y: Tensor, steps: int, lr: float, seed: int, decay: bool = False
) -> None:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * step / steps if decay else 1.0)
    with torch.enable_grad():
        for rows in batches(len(x), steps, seed, BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


def _images(context: Context) -> tuple[Images, Images]:
    x, y, test_x, test_y = fashion_mnist(context)
    first = torch.zeros(10, dtype=torch.int64).index_fill(0, torch.tensor(FIRST_GROUP), 1)
    pixels = lambda images, count: images[:count].float() / 255  # noqa: E731
    return (
        Images(pixels(x, TRAIN), y[:TRAIN], first[y[:TRAIN]]),
        Images(pixels(test_x, TEST), test_y[:TEST], first[test_y[:TEST]]),
    )
