"""DRS: certified accuracy of two smoothed halves against one smoothed image, at the same number of samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.linalg import stream
from lowdim.represent import (
    Certificates,
    DualRandomizedSmoothing,
    RandomizedSmoothing,
    checkerboard,
    dual_radius,
    fill_masked,
)
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.digits import mlp
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SIGMA, ALPHA = 0.5, 0.001


def run(context: Context) -> Outcome:
    """Train on noisy images and on noisy halves; certify sixty test images; the worst case of the theorem by brute force."""
    count, epochs, n, every = (600, 1, 400, 60) if context.quick else (6000, 6, 4000, 1)
    x, y, test_x, test_y = fashion_mnist(context)
    x, y = x[:count].view(-1, 1, 28, 28).float() / 255, y[:count]
    at = slice(0, 600, 10 * every)
    images, labels = test_x[at].view(-1, 1, 28, 28).float() / 255, test_y[at]
    rows, found = [], {}
    for name, sigma in (("Cohen", SIGMA), ("DRS", SIGMA), ("DRS", SIGMA / 2**0.5)):
        start = time.perf_counter()
        whole = _trained(_network(), x, y, sigma, lambda part: part, epochs, f"whole {sigma:.3f}")
        smoothed, samples = RandomizedSmoothing(whole, 10, sigma), n
        if name == "DRS":
            halves = [
                _trained(copy.deepcopy(whole), x, y, sigma, _half(side), epochs, f"{side} {sigma:.3f}") for side in (0, 1)
            ]
            smoothed, samples = DualRandomizedSmoothing(halves[0], halves[1], 10, sigma), n // 2
        trained = time.perf_counter() - start
        certificates = smoothed.certify_all(images, labels, n=samples, alpha=ALPHA)
        key = f"{name}, σ {sigma:.3f}"
        found[key] = certificates
        rows.append(_row(key, certificates, samples, trained))
        context.say(f"{key}: average radius {certificates.average_radius():.3f}, {certificates.seconds:.1f} s")
    cohen, same, lower = found.values()
    clean = float(lower.accuracy_at(0.0) - cohen.accuracy_at(0.0))
    gap = _worst_case_gap()
    return Outcome(
        slug="drs",
        setting=f"Fashion-MNIST, first {count} images, MLP 784-256-10, {epochs} epochs with noise (and {epochs} more on each "
        f"half), {len(images)} test images, n {n} for Cohen and {n // 2} for each half of DRS, alpha {ALPHA}",
        rows=rows,
        checks=[
            Check("average radius, DRS over Cohen at the same σ", same.average_radius() / cohen.average_radius(), ">=", 1.05),
            Check("largest radius, DRS over Cohen at the same σ", float(same.radii.max() / cohen.radii.max()), ">=", 1.2),
            Check("clean certified accuracy, DRS at σ/√2 minus Cohen", clean, ">=", 0.0),
            Check("average radius, DRS at σ/√2 over Cohen", lower.average_radius() / cohen.average_radius(), ">=", 0.9),
            Check("largest relative distance of the radius from the worst case by brute force", gap, "<=", 1e-6),
        ],
        notes=[
            "Radii are in units of the pixels, which are in [0, 1]. Sixty images: shares move in steps of 1/60.",
            "With equal samples DRS draws noise for half of the pixels in each.",
        ],
    )


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *mlp((784, 256, 10), seed=0))


def _half(side: int) -> Callable[[Tensor], Tensor]:
    mask = checkerboard(28, 28)[side]
    return lambda noisy: fill_masked(noisy, mask)


def _trained(
    model: nn.Module, x: Tensor, y: Tensor, sigma: float, seen: Callable[[Tensor], Tensor], epochs: int, purpose: str
) -> nn.Module:
    """Cross entropy on what the branch sees of noisy images."""
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-3), stream(0, "drs", purpose)
    model.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for at in torch.randperm(len(x), generator=generator).split(128):
                noisy = x[at] + sigma * torch.randn(len(at), *x.shape[1:], generator=generator)
                loss = F.cross_entropy(model(seen(noisy)), y[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def _row(name: str, found: Certificates, samples: int, trained: float) -> dict[str, Any]:
    shares = {f"at {radius:g}": round(float(share), 3) for radius, share in zip(RADII, found.accuracy_at(RADII))}
    return {
        "method": name,
        "samples": samples,
        **shares,
        "average_radius": round(found.average_radius(), 3),
        "largest_radius": round(float(found.radii.max()), 3),
        "milliseconds_per_image": round(1e3 * found.seconds / len(found.radii), 2),
        "training_seconds": round(trained, 1),
    }


def _worst_case_gap() -> float:
    """Of an attack of norms (s, t) on the halves: the smallest one that flips the sum, over directions, against the theorem."""
    from scipy.special import ndtr, ndtri

    worst, angles = 0.0, np.linspace(0.0, np.pi / 2, 4001)  # π/4 is among them
    for p, q, sigma in ((0.9, 0.9, 0.5), (0.95, 0.4, 0.25), (0.7, 0.6, 1.0), (0.999, 0.02, 0.5)):
        low, high = np.zeros_like(angles), np.full_like(angles, 20.0 * sigma)
        for _ in range(80):
            middle = (low + high) / 2
            s, t = middle * np.cos(angles), middle * np.sin(angles)
            holds = ndtr(ndtri(p) - s / sigma) + ndtr(ndtri(q) - t / sigma) > 1.0
            low, high = np.where(holds, middle, low), np.where(holds, high, middle)
        radius = dual_radius(p, q, sigma)
        worst = max(worst, abs(float(low.min()) - radius) / radius)
    return worst
