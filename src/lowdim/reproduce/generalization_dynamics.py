"""Theory of over-training against simulated linear networks, and random features of digits, few to many."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

from lowdim.diagnose import feature_dynamics, generalization_dynamics, optimal_stopping_time, ridge_test_error
from lowdim.diagnose.generalization_dynamics.flow import LinearFlow, Modes
from lowdim.linalg import stream
from lowdim.reproduce.settings.digits import digits
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

N, SNR, LATE, ALPHAS, DRAWS = 200, 5.0, 150.0, (0.25, 0.5, 1.0, 2.0, 4.0), 12
WIDTHS, SAMPLES, NOISE, END = (25, 50, 100, 200, 400, 800, 1600), 200, 0.3, 1e7


def run(context: Context) -> Outcome:
    """First theory against simulation, then over-training of a readout on random features."""
    draws, seeds = (2, (0,)) if context.quick else (DRAWS, (0, 1))
    widths = (25, 200, 400) if context.quick else WIDTHS
    outcome = Outcome(
        "generalization-dynamics",
        f"Theory: linear student and teacher, {N} weights, snr {SNR:g}, {draws} draws; test error at the best time and at t = "
        f"{LATE:g}. Digits: {SAMPLES} training images, targets one-hot - 0.1 plus noise {NOISE:g}, features relu(x J) "
        f"sqrt(2/H), readout by exact gradient flow from zero, errors without noise on the other images, late is t = {END:g}; "
        f"seeds {', '.join(map(str, seeds))}",
    )
    _theory(outcome, context, draws)
    for seed in seeds:
        _digits(outcome, context, seed, widths)
    outcome.notes += [
        "With as many features as samples the smallest eigenvalue decides, so the late error there varies between seeds.",
        "The readout alone is trained. Training of deep networks, which the paper compares with, was not run.",
        "Best times are chosen on the test images, so they are a lower bound of what early stopping reaches.",
    ]
    return outcome


def _theory(outcome: Outcome, context: Context, draws: int) -> None:
    begun, late_errors, off, gaps = time.perf_counter(), {}, 0.0, []
    for alpha in ALPHAS:
        best = optimal_stopping_time(alpha, SNR)
        theory = generalization_dynamics(alpha, SNR, [best, LATE]).test_error.tolist()
        ridge = ridge_test_error(alpha, SNR, 1.0 / SNR)
        seen = [_simulated(alpha, (best, LATE), seed) for seed in range(draws)]
        simulated = [statistics.fmean(each) for each in zip(*seen)]
        late_errors[alpha] = theory[1]
        off = max(off, *(abs(a / b - 1) for a, b in zip(theory, simulated)))
        gaps.append(theory[0] / ridge - 1)
        outcome.rows.append(
            {
                "part": "theory", "alpha": alpha, "best time": round(best, 3), "best, theory": round(theory[0], 3),
                "best, simulation": round(simulated[0], 3), "late, theory": round(theory[1], 3),
                "late, simulation": round(simulated[1], 3), "ridge": round(ridge, 3),
            }
        )  # fmt: skip
    context.say(f"theory and simulation: {time.perf_counter() - begun:.1f} s")
    others = max(error for alpha, error in late_errors.items() if alpha != 1.0)
    outcome.checks += [
        Check("largest relative difference of theory and simulation", off, "<=", 0.08),
        Check("late error at alpha = 1 over the largest of the others", late_errors[1.0] / others, ">=", 1.0),
        Check("best stopping over best ridge, largest excess", max(gaps), "<=", 0.03),
    ]


def _simulated(alpha: float, times: tuple[float, ...], seed: int) -> list[float]:
    """Expected test errors of one network: the distance to the teacher plus the noise."""
    g = stream(seed, "generalization-dynamics", alpha)
    X = torch.randn(int(alpha * N), N, generator=g, dtype=torch.float64) / math.sqrt(N)
    teacher = math.sqrt(SNR) * torch.randn(N, generator=g, dtype=torch.float64)
    flow = LinearFlow(X, X @ teacher + torch.randn(len(X), generator=g, dtype=torch.float64))
    return [float((flow.weights(t) - teacher).square().mean()) + 1.0 for t in times]


def _digits(outcome: Outcome, context: Context, seed: int, widths: tuple[int, ...]) -> None:
    data = digits(seed, SAMPLES)
    draw = stream(seed, "generalization-dynamics", "noise")
    y, test_y = (torch.eye(10, dtype=torch.float64)[labels] - 0.1 for labels in (data.y, data.test_y))
    noisy = y + NOISE * torch.randn(y.shape, generator=draw, dtype=torch.float64)
    times = torch.cat([torch.zeros(1), torch.logspace(-2, math.log10(END), 60)]).double()
    late, best = {}, {}
    for width in widths:
        begun = time.perf_counter()
        model = nn.Sequential(_Features(width, seed))
        found = feature_dynamics(model, "0", [data.x.double()], noisy, times=times, held_out=([data.test_x.double()], test_y))
        seconds = time.perf_counter() - begun
        assert found.test_error is not None
        errors = found.test_error / 10  # mean over the outputs
        late[width], best[width] = float(errors[-1]), float(errors.min())
        difference = _least_squares(model, data.x.double(), noisy)
        outcome.rows.append(
            {
                "part": "digits", "seed": seed, "features": width, "best error": round(best[width], 4),
                "late error": round(late[width], 4), "best time": found.best_time, "frozen": found.frozen_dim,
                "outside": round(found.outside, 4), "seconds": round(seconds, 2),
            }
        )  # fmt: skip
        context.say(f"seed {seed}, {width} features: best {best[width]:.4f}, late {late[width]:.4f}, {seconds:.1f} s")
        outcome.checks.append(
            Check(f"seed {seed}, {width} features: end against numpy's lstsq, relative", difference, "<=", 1e-6)
        )
        if width > SAMPLES:
            wrong = abs(found.frozen_dim - (width - SAMPLES))
            outcome.checks.append(Check(f"seed {seed}, {width} features: frozen_dim minus H - {SAMPLES}", wrong, "<=", 0))
    wide = widths[-1]
    others = max(error for width, error in late.items() if width != SAMPLES)
    outcome.checks += [
        Check(f"seed {seed}: late error at H = P over the largest of the others", late[SAMPLES] / others, ">=", 1.0),
        Check(f"seed {seed}: late error at H = P over that at H = {wide}", late[SAMPLES] / late[wide], ">=", 10.0),
        Check(f"seed {seed}: best error at H = {wide} minus that at H = P", best[wide] - best[SAMPLES], "<=", 0.0),
    ]


def _least_squares(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """How far the flow's end is from numpy's minimum-norm solution, on the training images."""
    X = model(x).detach()
    modes = Modes(X)
    want = X.numpy() @ np.linalg.lstsq(X.numpy(), y.numpy(), rcond=1e-10)[0]
    ours = torch.stack([X @ LinearFlow(X, column, modes=modes).weights(math.inf) for column in y.T], 1)
    return float((ours - torch.from_numpy(want)).norm()) / float(np.linalg.norm(want))


class _Features(nn.Module):
    """`relu(x J) √(2/H)`, entries of `J (64, H)` N(0, 1/64)."""

    J: Tensor

    def __init__(self, width: int, seed: int):
        super().__init__()
        g = stream(seed, "generalization-dynamics", "features", width)
        self.register_buffer("J", torch.randn(64, width, generator=g, dtype=torch.float64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.J) * math.sqrt(2 / self.J.shape[1])
