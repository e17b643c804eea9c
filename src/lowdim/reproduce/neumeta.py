"""NeuMeta: one field for networks of every width, against the pruned reference, with and without coordinate noise."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.compress import NeuMeta, NeuMetaConfig, neumeta, permute_channels, total_variation
from lowdim.linalg import stream
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

_TRAIN, _TEST = 10_000, 2_000
_SEEN, _UNSEEN, _REFERENCE = (4, 8, 12, 16), (6, 10, 14), 16
_TEACHER, _TEACHER_BATCH, _TEACHER_RATE = 500, 128, 3e-3
_STEPS, _BATCH, _SEEDS = 6000, 64, 1
_NOISES = (0.0, 1.0)
_GROUPS = (
    (("0.weight", 0), ("0.bias", 0), ("3.weight", 1)),
    (("3.weight", 0), ("3.bias", 0), ("7.weight", 1)),
)


def run(context: Context) -> Outcome:
    """One seed: a reference, its order, a field with and one without noise, and what each gives at seven widths."""
    teacher, steps, seeds = (60, 60, 1) if context.quick else (_TEACHER, _STEPS, _SEEDS)
    outcome = Outcome(
        "neumeta",
        f"Fashion-MNIST, {_TRAIN} training and {_TEST} test images, averaged to 14 x 14. Network: conv(1, w, 3), relu, maxpool"
        f" 2, conv(w, 2w, 3), relu, maximum over positions, linear(2w, 10). Reference w = {_REFERENCE}: {_TEACHER} steps of"
        f" {_TEACHER_BATCH}, Adam {_TEACHER_RATE:g}, then channels in a smooth order. Field: hidden 64, 4 layers, 8"
        f" frequencies, norm 16, lr 0.002, EMA 0.98, recon_weight 100, reg_weight 0, {_STEPS} steps of {_BATCH}, training"
        f" widths {', '.join(map(str, _SEEN))}. Two arms: coordinate_noise 0 and 1. Pruned: the reference cut to the channels"
        " of largest L2 norm, not tuned. Trained directly: a network of the width, in the reference's steps. Test accuracy of"
        " one seed (seed 0).",
    )
    data = _Data(context)
    scores: dict[str, dict[int, list[float]]] = {}
    found: dict[str, list[float]] = {name: [] for name in ("before", "after", "fall", "change", "ms")}
    sizes: dict[str, int] = {}

    def note(arm: str, width: int, net: nn.Module) -> None:
        scores.setdefault(arm, {}).setdefault(width, []).append(data.accuracy(net))

    for seed in range(seeds):
        reference = data.train(_REFERENCE, teacher, seed)
        outputs, before = data.logits(reference), total_variation(reference)
        permute_channels(reference, _GROUPS)
        found["before"].append(before)
        found["after"].append(total_variation(reference))
        found["fall"].append(1 - found["after"][-1] / before)
        found["change"].append(float((data.logits(reference) - outputs).abs().max()))
        for width in sorted(_SEEN + _UNSEEN):
            note("pruned", width, _pruned(reference, width))
            note("trained directly", width, reference if width == _REFERENCE else data.train(width, teacher, seed))
        for noise in _NOISES:
            config = NeuMetaConfig(
                hidden_dim=64, num_layers=4, num_freqs=8, coordinate_noise=noise, norm=16.0, recon_weight=100.0,
                reg_weight=0.0, ema_decay=0.98, lr=2e-3, steps=steps, seed=seed,
            )  # fmt: skip
            family = neumeta(_network, config, data.batches(seed), widths=_SEEN, reference=reference)
            sizes["field"] = sum(p.numel() for p in family.field.parameters())
            for width in sorted(_SEEN + _UNSEEN):
                note(f"noise {noise:g}", width, family.sample(width))
                if noise:
                    note(f"noise {noise:g}, mean of 8 samples", width, family.sample(width, samples=8))
            found["ms"].append(_milliseconds(family))
        sizes["network"] = sum(p.numel() for p in reference.parameters())
        context.say(f"seed {seed}: " + "; ".join(f"{arm} " + _line(rows, -1) for arm, rows in scores.items()))
    for arm, rows in scores.items():
        outcome.rows.append({"arm": arm, **{f"w {width}": round(_mean(rows[width]), 3) for width in sorted(rows)}})
    _check(outcome, {arm: {w: _mean(values) for w, values in rows.items()} for arm, rows in scores.items()}, found, sizes)
    return outcome


def _check(outcome: Outcome, mean: dict[str, dict[int, float]], found: dict[str, list[float]], sizes: dict[str, int]) -> None:
    smallest, full = min(_SEEN), mean["pruned"][_REFERENCE]
    arms = [f"noise {noise:g}" for noise in _NOISES]
    gaps = {arm: _mean([mean[arm][w] for w in _SEEN]) - _mean([mean[arm][w] for w in _UNSEEN]) for arm in arms}
    lowest = min(mean[arms[0]][width] for width in _SEEN)
    for arm in arms:
        name = f"accuracy at w = {smallest}, {arm}: above the pruned reference + 0.2"
        outcome.checks.append(Check(name, mean[arm][smallest], ">=", mean["pruned"][smallest] + 0.2))
    outcome.checks += [
        Check("accuracy, noise 0, lowest trained width: 0.85 of the reference", lowest, ">=", 0.85 * full),
        Check("trained widths above unseen ones, noise 1: a smaller gap than with noise 0", gaps[arms[1]], "<=", gaps[arms[0]]),
        Check("total variation: fall by the order of channels", _mean(found["fall"]), ">=", 0.15),
        Check("outputs changed by the order of channels, largest", max(found["change"]), "<=", 1e-4),
    ]  # fmt: skip
    noisy = mean[f"{arms[1]}, mean of 8 samples"]
    outcome.notes += [
        f"The reference has {full:.3f}; at its width the field gives {mean[arms[0]][_REFERENCE]:.3f} (noise 0) and"
        f" {mean[arms[1]][_REFERENCE]:.3f} (noise 1): the paper's full accuracy is not reached at this budget.",
        f"Mean over trained and over unseen widths: {_both(mean[arms[0]])} with noise 0, {_both(mean[arms[1]])} with noise 1,"
        f" {_both(noisy)} with 8 samples averaged, {_both(mean['trained directly'])} trained directly in {_TEACHER} steps.",
        f"The field has {sizes['field']} numbers, the reference network {sizes['network']}: it is"
        f" {sizes['field'] / sizes['network']:.1f} times as large.",
        f"Total variation: {_mean(found['before']):.0f} before the order of channels, {_mean(found['after']):.0f} after.",
        "One seed: nothing is known of the spread over seeds, and the two arms share reference, batches and start.",
        f"A network of width {_REFERENCE} is sampled in {_mean(found['ms']):.1f} ms.",
    ]


def _both(rows: dict[int, float]) -> str:
    return f"{_mean([rows[w] for w in _SEEN]):.3f} and {_mean([rows[w] for w in _UNSEEN]):.3f}"


def _line(rows: dict[int, list[float]], seed: int) -> str:
    return " ".join(f"{width}: {rows[width][seed]:.3f}" for width in sorted(rows))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _milliseconds(family: NeuMeta) -> float:
    """The fastest of five samples at the reference's width."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        family.sample(_REFERENCE)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def _network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(2 * width, 10),
    )  # fmt: skip


@torch.no_grad()
def _pruned(reference: nn.Module, width: int) -> nn.Module:
    """The channels of largest norm, in their order."""
    whole = dict(reference.named_parameters())
    keep = {}
    for name, count in (("0", width), ("3", 2 * width)):
        norms = whole[f"{name}.weight"].flatten(1).norm(dim=1)
        keep[name] = norms.topk(count).indices.sort().values
    net = _network(width)
    net.load_state_dict({
        "0.weight": whole["0.weight"][keep["0"]], "0.bias": whole["0.bias"][keep["0"]],
        "3.weight": whole["3.weight"][keep["3"]][:, keep["0"]], "3.bias": whole["3.bias"][keep["3"]],
        "7.weight": whole["7.weight"][:, keep["3"]], "7.bias": whole["7.bias"],
    })  # fmt: skip
    return net


class _Data:
    """Images of 14 x 14, in [0, 1]."""

    def __init__(self, context: Context):
        x, y, tx, ty = fashion_mnist(context)
        self.x, self.y = _small(x[:_TRAIN]), y[:_TRAIN]
        self.tx, self.ty = _small(tx[:_TEST]), ty[:_TEST]

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(_TRAIN, generator=stream(seed, "neumeta", "batches"))
        return [(self.x[rows], self.y[rows]) for rows in order.split(_BATCH)]

    def train(self, width: int, steps: int, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _network(width)
        draw = stream(seed, "neumeta", "teacher")
        optimizer: Any = torch.optim.Adam(net.parameters(), lr=_TEACHER_RATE)
        for _ in range(steps):
            rows = torch.randint(_TRAIN, (_TEACHER_BATCH,), generator=draw)
            F.cross_entropy(net(self.x[rows]), self.y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.eval()

    @torch.no_grad()
    def logits(self, net: nn.Module) -> Tensor:
        return net(self.tx)

    def accuracy(self, net: nn.Module) -> float:
        return float((self.logits(net).argmax(1) == self.ty).float().mean())


def _small(images: Tensor) -> Tensor:  # (n, 784) uint8 -> (n, 1, 14, 14)
    return F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 2)
