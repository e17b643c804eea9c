"""A Householder projector in a trained generator: the decoder of an autoencoder of digits, tuned for 5 % of the steps."""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.layers import HouseholderProjector, LowRankLinear
from lowdim.linalg import derive_seed
from lowdim.reproduce.settings.digits import Digits, batches, digits
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.threads import one_thread

__all__ = ["run"]

_RANK, _STEPS, _TUNED = 10, 3000, 150


class _Autoencoder(nn.Module):
    """64-128-32, and back: a learned constant (64) times a modulation of the code, as in StyleGAN, then 64-128-64."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        self.constant = nn.Parameter(torch.randn(64))
        self.modulation: nn.Module = nn.Linear(32, 64)
        nn.init.ones_(self.modulation.get_parameter("bias"))
        self.decoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.constant * self.modulation(self.encoder(x)))


def run(context: Context) -> Outcome:
    """Three seeds: the trained autoencoder, and both projectors before and after their tuning; then the time of a step."""
    outcome = Outcome(
        "householder",
        "scikit-learn's digits, 1400 train, 397 test. Autoencoder 64-128-32-(modulation 32 to 64)-128-64 with GELU, Adam (0.9,"
        f" 0.99) at 2e-3, cosine, {_STEPS} steps of 64; then the modulation at rank {_RANK} (Householder projector with the"
        f" mean gain, or two free factors), all tuned for {_TUNED} steps at 1e-3. Squared error on the test part.",
    )
    error: dict[str, list[float]] = {"Householder": [], "low rank": []}
    ratio: dict[str, list[float]] = {"Householder": [], "low rank": []}
    for seed in (0,) if context.quick else (0, 1, 2):
        data, model = digits(seed, 1400), _built(seed)
        _train(model, data, 60 if context.quick else _STEPS, 2e-3, seed, cosine=True)
        full = _error(model, data)
        for arm, layer in (
            ("Householder", HouseholderProjector.from_linear(_modulation(model), rank=_RANK, scale="mean")),
            ("low rank", LowRankLinear.from_linear(_modulation(model), rank=_RANK)),
        ):
            tuned = copy.deepcopy(model)
            tuned.modulation = layer
            before = _error(tuned, data)
            _train(tuned, data, 10 if context.quick else _TUNED, 1e-3, derive_seed(seed, "tuned"), cosine=False)
            with torch.no_grad():
                s = torch.linalg.svdvals(layer.dense_weight())
            error[arm].append(_error(tuned, data))
            ratio[arm].append(float(s[0] / s[_RANK - 1]))
            row = {
                "seed": seed,
                "arm": arm,
                "full": round(full, 5),
                "before": round(before, 5),
                "tuned": round(error[arm][-1], 5),
            }
            outcome.rows.append({**row, "s_1 / s_10": round(ratio[arm][-1], 4)})
            context.say(f"seed {seed}, {arm}: {error[arm][-1]:.5f}, gains {ratio[arm][-1]:.4f}")
    mean = {arm: statistics.mean(values) for arm, values in error.items()}
    pace = _pace(outcome, 3 if context.quick else 21)
    outcome.checks += [
        Check("error of the Householder projector over the free factors'", mean["Householder"] / mean["low rank"], "<=", 1.05),
        Check("Householder: largest over smallest gain, less 1", max(ratio["Householder"]) - 1, "<=", 1e-4),
        Check("free factors: largest over smallest gain", min(ratio["low rank"]), ">=", 1.1),
        Check("time of a pass over that of torch's parametrization", pace, "<=", 1.0),
    ]
    outcome.notes += [
        "Only that the constraint costs no quality in a small generator, and that gains are equal, was tested: no GAN, no FID,"
        " no measure of disentanglement, which are the paper's claim.",
        "Both arms lose most of the full model's quality: ten directions for a code of 32.",
        "Time: 512 rows, 512 to 512, rank 10, forward and backward in CPU time on one thread, median of pairs; torch has"
        " parametrizations.orthogonal (householder) on two thin factors, which holds fewer numbers but cannot start from every"
        " matrix.",
    ]
    return outcome


def _pace(outcome: Outcome, pairs: int) -> float:
    """CPU time of a forward and backward pass over that of torch's parametrization on both thin factors."""
    parametrized = nn.utils.parametrizations.orthogonal
    first, second = (
        parametrized(nn.Linear(n, out, bias=False), orthogonal_map="householder") for n, out in ((512, _RANK), (_RANK, 512))
    )
    ours, theirs = HouseholderProjector(512, 512, rank=_RANK), nn.Sequential(first, second)
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_(True)

    def spent(layer: nn.Module) -> float:
        start = time.process_time()
        layer(x).square().mean().backward()
        return time.process_time() - start

    with one_thread(), torch.enable_grad():
        found = [(spent(ours), spent(theirs)) for _ in range(pairs + 3)][3:]
    ratio = statistics.median(a / b for a, b in found)
    outcome.rows.append({"arm": "time over torch's parametrization", "ratio": round(ratio, 3)})
    return ratio


def _built(seed: int) -> _Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "householder"))
        return _Autoencoder()


def _modulation(model: _Autoencoder) -> Any:
    return model.modulation


def _train(model: nn.Module, data: Digits, steps: int, rate: float, seed: int, *, cosine: bool) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.99))
    with torch.enable_grad():
        for step, rows in enumerate(batches(len(data.x), steps, seed)):
            if cosine:
                optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            F.mse_loss(model(data.x[rows]), data.x[rows]).backward()
            optimizer.step()


@torch.no_grad()
def _error(model: nn.Module, data: Digits) -> float:
    return float(F.mse_loss(model(data.test_x), data.test_x))
