"""Curvature of batches against random matrix theory: synthetic noise, and a small network on digits."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.diagnose import BatchSpectrum, batch_extremes, batch_spectrum, tune_sgd
from lowdim.linalg import stream
from lowdim.reproduce.settings.digits import batches, digits, mlp
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

P, SPIKES, VARIANCE, BATCH = 400, (6.0, -5.0), 0.4, 50  # the theorem
SIZES = (4, 8, 16, 32, 64, 128, 512)
STEPS, LR, TRAIN_BATCH = 300, 0.2, 64
DRAWS = 10  # of the noise: one draw moves an eigenvalue by 2 %
EPOCH = 14  # steps between two calls of tune_sgd; the first epoch has the constant rate


def run(context: Context) -> Outcome:
    """First the theorem on its own model, then batches of digits."""
    seeds, sizes = ((0,), (4, 8, 128)) if context.quick else ((0, 1), SIZES)
    how: dict[str, Any] = {"steps": 8, "batches": 2, "probes": 1} if context.quick else {"steps": 40, "batches": 6, "probes": 4}
    outcome = Outcome(
        "batch-lr",
        f"Theorem: {P} parameters, eigenvalues {SPIKES[0]:g} and {SPIKES[1]:g}, Wigner noise of variance {VARIANCE:g} per "
        f"sample, batch {BATCH}, means of {DRAWS} draws. Digits: 900 images, MLP 64-16-10 with tanh after {STEPS} steps of SGD "
        f"(lr {LR:g}, batch {TRAIN_BATCH}), float64; batch_spectrum with {how['steps']} Lanczos steps, {how['batches']} "
        f"batches, {how['probes']} probes; seeds {', '.join(map(str, seeds))}",
    )
    _theorem(outcome, seeds)
    found = {(seed, size): one for seed in seeds for size, one in _spectra(outcome, context, seed, sizes, how).items()}
    _inequalities(outcome, found, seeds, sizes)
    for seed in seeds:
        _tuning(outcome, seed, 60 if context.quick else STEPS)
    worst = max(one.measured_largest / one.predicted.largest for one in found.values())
    shown = max(max(one.largest_bound, one.measured_bound) for one in found.values())
    outcome.notes += [
        "The theorem's upper edge does not describe these batches: the measured largest eigenvalue is up to "
        f"{worst:.1f} times the predicted one. The noise of a real Hessian is low-rank and aligned with the outliers, and its "
        "variance, averaged over all entries, understates it. max_lr is an upper estimate at small batches; use measured_lr.",
        f"Every eigenvalue is within {shown:.1g} of the one given (Lanczos' own bound).",
        f"tune_sgd: {_tuned(outcome.rows)} tuned trainings end with a lower loss than the constant rate, the others with a "
        "higher one, or they diverge: both rules go to the edge of stability of one batch's quadratic model.",
        "One small network on one data set. The paper's ImageNet and CIFAR networks were not run.",
    ]
    return outcome


def _theorem(outcome: Outcome, seeds: tuple[int, ...]) -> None:
    predicted = batch_extremes(*SPIKES, VARIANCE, P, BATCH)
    H = torch.zeros(P, dtype=torch.float64)
    H[:2] = torch.tensor(SPIKES, dtype=torch.float64)
    for seed in seeds:
        draw = stream(seed, "batch-lr", "wigner")
        extremes = []
        for _ in range(DRAWS):
            noise = torch.randn(P, P, generator=draw, dtype=torch.float64)
            values = torch.linalg.eigvalsh(torch.diag(H) + (noise + noise.T) * math.sqrt(VARIANCE / BATCH / 2))
            extremes.append((float(values[0]), float(values[-1])))
        low, top = (statistics.fmean(each) for each in zip(*extremes))
        outcome.rows.append(
            {
                "part": "theorem", "seed": seed, "batch": BATCH, "largest measured": round(top, 3),
                "largest predicted": round(predicted.largest, 3), "smallest measured": round(low, 3),
                "smallest predicted": round(predicted.smallest, 3),
            }
        )  # fmt: skip
        off = max(abs(top / predicted.largest - 1), abs(low / predicted.smallest - 1))
        outcome.checks.append(Check(f"theorem, seed {seed}: relative error of the predicted extremes", off, "<=", 0.03))


def _spectra(
    outcome: Outcome, context: Context, seed: int, sizes: tuple[int, ...], how: dict[str, Any]
) -> dict[int, BatchSpectrum]:
    data = digits(seed)
    x, y = data.x.double(), data.y
    net = _trained(seed, x, y)
    found = {}
    for size in sizes:
        found[size] = one = batch_spectrum(net, F.cross_entropy, x, y, size, seed=seed, **how)
        context.say(f"seed {seed}: {one.summary}")
        outcome.rows.append(
            {
                "part": "digits", "seed": seed, "batch": size, "largest measured": round(one.measured_largest, 3),
                "largest predicted": round(one.predicted.largest, 3), "smallest measured": round(one.measured_smallest, 3),
                "smallest predicted": round(one.predicted.smallest, 3), "largest of all data": round(one.largest, 3),
                "deviation over batches": round(one.spread, 3), "rate by theory": round(one.max_lr, 3),
                "2 / measured": round(one.measured_lr, 3), "products": one.products,
            }
        )  # fmt: skip
    return found


def _inequalities(
    outcome: Outcome, found: dict[tuple[int, int], BatchSpectrum], seeds: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    for seed in seeds:
        here = {size: found[seed, size] for size in sizes}
        ratio = min(one.measured_largest / one.largest for one in here.values())
        outcome.checks.append(Check(f"seed {seed}: measured largest over that of all data, every batch size", ratio, ">=", 1.0))
        steep = here[4].measured_largest / here[128].measured_largest
        outcome.checks.append(Check(f"seed {seed}: measured largest at batch 4 over that at 128", steep, ">=", 1.5))
        edges = [one.predicted.smallest / one.measured_smallest for one in here.values()]
        off = max(max(edge, 1 / edge) for edge in edges)
        outcome.checks.append(Check(f"seed {seed}: factor between predicted and measured lower edge", off, "<=", 2.0))
        for name in ("measured", "predicted"):
            low = [_lower(here[size], name) for size in (8, 128)]
            fall = (low[0] / low[1]) / math.sqrt(128 / 8)
            check = f"seed {seed}: {name} lower edge, fall from batch 8 to 128 against the square root's (factor)"
            outcome.checks.append(Check(check, max(fall, 1 / fall), "<=", 2.0))


def _lower(one: BatchSpectrum, name: str) -> float:
    return one.measured_smallest if name == "measured" else one.predicted.smallest


def _tuning(outcome: Outcome, seed: int, steps: int) -> None:
    """The rates of both rules along a training, beside the loss that they reach."""
    data = digits(seed)
    x, y = data.x.double(), data.y
    for rule in ("heavy_ball", "gradient", "constant"):
        net, rates = _network(seed), []
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.0 if rule == "constant" else 0.5)
        fixed = next(iter(batches(len(x), 1, seed + 100, TRAIN_BATCH)))

        def closure(net: nn.Module = net, rows: Tensor = fixed) -> Tensor:
            return F.cross_entropy(net(x[rows]), y[rows])

        end = f"{steps} steps"
        for i, rows in enumerate(batches(len(x), steps, seed, TRAIN_BATCH)):
            try:
                if rule != "constant" and i and i % EPOCH == 0:
                    rates.append(tune_sgd(optimizer, closure, rule=rule, seed=seed))
            except ValueError as error:
                end = f"stopped at step {i}: {error}"
                break
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(F.cross_entropy(net(x), y))
        row: dict[str, Any] = {"part": "tuning", "seed": seed, "rule": rule, "loss of all data": round(loss, 4), "end": end}
        if rates:
            row |= {"median rate": round(statistics.median(lr for lr, _ in rates), 3)}
            row |= {"median momentum": round(statistics.median(momentum for _, momentum in rates), 3)}
        outcome.rows.append(row)


def _tuned(rows: list[dict[str, Any]]) -> str:
    """How many of the tuned trainings end better than the constant rate of the same seed."""
    runs = [row for row in rows if row["part"] == "tuning"]
    constant = {row["seed"]: row["loss of all data"] for row in runs if row["rule"] == "constant"}
    tuned = [row for row in runs if row["rule"] != "constant"]
    return f"{sum(row['loss of all data'] < constant[row['seed']] for row in tuned)} of {len(tuned)}"


def _network(seed: int) -> nn.Sequential:
    net = mlp((64, 16, 10), seed).double()
    net[1] = nn.Tanh()
    return net


def _trained(seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    net = _network(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for rows in batches(len(x), STEPS, seed, TRAIN_BATCH):
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net
