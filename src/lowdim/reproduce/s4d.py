"""S4D: the diagonal of HiPPO-LegS tends to its basis functions, and the first diagonal decides what is learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.layers import S4D
from lowdim.linalg import s4d_init, stream
from lowdim.reproduce.settings.digits import digits
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

SIZES, POINTS, FUNCTIONS = (16, 64, 256), 60, 4
LENGTH, DELAY, WIDTH, STATE, BATCH, STEPS, WARMUP = 256, 96, 16, 32, 16, 250, 20
LR, SSM_LR = 1e-2, 1e-3
INITS = ("lin", "inv", "legs", "random", "real")
SIDE, FEATURES, DIGIT_STATE, DIGIT_BATCH, EPOCHS, TRAIN = 12, 24, 16, 35, 5, 1400
DIGIT_INITS = ("lin", "real")


def run(context: Context) -> Outcome:
    """The limit without training, then a delay and digits read pixel by pixel, from several first diagonals."""
    seeds, steps, epochs = ((0,), 10, 1) if context.quick else ((0, 1, 2), STEPS, EPOCHS)
    digit_seeds = seeds[:2]
    outcome = Outcome(
        "s4d",
        f"(a) Integrals of the first {FUNCTIONS} basis functions of HiPPO-LegS' diagonal with B/2 against the exact ones, "
        f"at {POINTS} times in [0.05, 3]. (b) White noise of length {LENGTH}, target: the input {DELAY} steps before; "
        f"Linear(1, {WIDTH}), S4D({WIDTH}, {STATE}) without its output map, Linear({WIDTH}, 1); AdamW {LR:g} (A, B and dt "
        f"{SSM_LR:g}), no decay, {WARMUP} steps of warm-up, cosine, {steps} steps of {BATCH}; mean squared error, 1 for "
        f"predicting 0; seeds {', '.join(map(str, seeds))}. (c) Digits at {SIDE} x {SIDE} read as {SIDE**2} pixels; two layers "
        f"S4D({FEATURES}, {DIGIT_STATE}), mean over time, linear head; {epochs} epochs of batches of {DIGIT_BATCH}, the same "
        f"rates; {TRAIN} for training, the rest for testing; seeds {', '.join(map(str, digit_seeds))}",
    )
    _limit(context, outcome)
    losses = {
        init: _arm(context, outcome, f"delay, {init}", "mean squared error", seeds, partial(_delay, init, steps=steps))
        for init in INITS
    }
    worst = max(losses["lin"], losses["inv"])
    outcome.checks += [
        Check("delay, mean error of lin", round(losses["lin"], 4), "<=", 0.85),
        Check("delay, mean error of inv", round(losses["inv"], 4), "<=", 0.85),
        Check("delay, larger mean error of lin and inv as a share of random's", round(worst / losses["random"], 4), "<=", 0.9),
        Check("delay, mean error of real", round(losses["real"], 4), ">=", 0.95),
    ]
    scores = {
        init: _arm(context, outcome, f"digits, {init}", "accuracy", digit_seeds, partial(_digits, init, epochs=epochs))
        for init in DIGIT_INITS
    }
    outcome.checks.append(
        Check("digits, mean accuracy of lin less real's", round(scores["lin"] - scores["real"], 4), ">=", 0.1)
    )
    outcome.notes += [
        "The basis functions themselves do not converge point by point: the diagonal ones ring. Their integrals do.",
        "Long Range Arena, the paper's main table, is not tried here: these are small tasks for a CPU.",
    ]
    return outcome


def _arm(
    context: Context, outcome: Outcome, arm: str, measure: str, seeds: Iterable[int], trained: Callable[[int], float]
) -> float:
    """The mean of what training gives for each seed, which has a row of its own."""
    found = []
    for seed in seeds:
        start = time.perf_counter()
        found.append(round(trained(seed), 4))
        context.say(f"{arm}, seed {seed}: {found[-1]:.3f}")
        outcome.rows.append(_row(arm, seed, measure, found[-1], start))
    return fmean(found)


def _row(arm: str, seed: int | None, measure: str, value: float, start: float) -> dict[str, Any]:
    row = {"arm": arm, "seed": seed, "measure": measure, "value": value, "seconds": round(time.perf_counter() - start, 1)}
    return {name: entry for name, entry in row.items() if entry is not None}


def _limit(context: Context, outcome: Outcome) -> None:
    """How the error falls with each fourfold state."""
    errors = []
    for size in SIZES:
        start = time.perf_counter()
        errors.append(basis_error(size))
        context.say(f"limit, state {size}: {errors[-1]:.2g}")
        outcome.rows.append(_row(f"limit, state {size}", None, "relative error", float(f"{errors[-1]:.3g}"), start))
    for size, before, after in zip(SIZES[1:], errors, errors[1:], strict=False):
        outcome.checks.append(
            Check(f"limit, error of state {size // 4} over that of {size}", round(before / after, 2), ">=", 4.0)
        )


def basis_error(size: int) -> float:
    """Relative error of the integrals from 0 to t of the basis functions of the diagonal system, over functions and times.

    Formula: `Re(V exp(t Λ) V* b / 2)[k]` against `√(2k+1) exp(−t) P_k(2 exp(−t) − 1)`, both integrated.
    """
    n = torch.arange(size, dtype=torch.float64)
    b, p = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    skew = torch.outer(p, p) - torch.outer(b, b).tril(-1) - torch.diag(n + 0.5)
    frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    first = s4d_init("legs", size)[0].imag
    torch.testing.assert_close(first, frequencies[size // 2 :].flip(0))  # the layer's diagonal is this one
    values = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    weights = vectors[:FUNCTIONS] * (vectors.mH @ b.to(vectors.dtype)) / 2
    times = torch.linspace(0.05, 3, POINTS, dtype=torch.float64)
    got = ((((times[:, None] * values).exp() - 1) / values) @ weights.mT).real
    s = 1 - torch.exp(-times)[:, None] * torch.ones(FUNCTIONS, dtype=torch.float64)
    x = 1 - s  # with y = exp(−t) the integral is that of √(2k+1) P_k(2y − 1) over y from exp(−T) to 1
    shifted = [2 * x[:, 0] - 1]
    legendre = [torch.ones_like(shifted[0]), shifted[0]]
    for k in range(1, FUNCTIONS):
        legendre.append(((2 * k + 1) * shifted[0] * legendre[k] - k * legendre[k - 1]) / (k + 1))
    exact = [s[:, 0]]
    exact += [(legendre[k - 1] - legendre[k + 1]) / (2 * (2 * k + 1)) for k in range(1, FUNCTIONS)]
    want = torch.stack([math.sqrt(2 * k + 1) * entry for k, entry in enumerate(exact)], 1)
    return float((got - want).norm() / want.norm())


class _Delay(nn.Module):
    def __init__(self, init: str, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.mixer = S4D(WIDTH, STATE, init=init, seed=seed)

    def forward(self, u: Tensor) -> Tensor:
        return self.last(self.mixer.linear(self.first(u)))


def _delay(init: str, seed: int, steps: int) -> float:
    """Mean squared error on fresh noise after training."""
    model, draw = _Delay(init, seed), stream(seed, "s4d", "noise")
    model.mixer.output_linear.requires_grad_(False)  # not used

    def loss(count: int = BATCH) -> Tensor:
        u = torch.randn(count, LENGTH, 1, generator=draw)
        return F.mse_loss(model(u)[:, DELAY:], u[:, :-DELAY])

    _train(model, (loss for _ in range(steps)), steps)
    with torch.no_grad():
        return float(loss(8 * BATCH))


class _Reader(nn.Module):
    """`x = LayerNorm(x + layer(x))` twice, the mean over time, a head."""

    def __init__(self, init: str, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.head = nn.Linear(1, FEATURES), nn.Linear(FEATURES, 10)
        self.mixers = nn.ModuleList(S4D(FEATURES, DIGIT_STATE, init=init, seed=2 * seed + i) for i in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(FEATURES) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels[..., None])
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            x = norm(x + mixer(x))
        return self.head(x.mean(1))


def _digits(init: str, seed: int, epochs: int) -> float:
    """Accuracy on the digits that were left out."""
    data, model = digits(0, TRAIN), _Reader(init, seed)
    x, test = (F.interpolate(t.view(-1, 1, 8, 8), (SIDE, SIDE), mode="bilinear").flatten(1) for t in (data.x, data.test_x))
    mean, std = x.mean(), x.std()
    x, test, draw = (x - mean) / std, (test - mean) / std, stream(seed, "s4d", "order")
    parts = [part for _ in range(epochs) for part in torch.randperm(len(x), generator=draw).split(DIGIT_BATCH)]

    def at(part: Tensor) -> Any:
        return lambda: F.cross_entropy(model(x[part]), data.y[part])

    _train(model, map(at, parts), len(parts))
    with torch.no_grad():
        return float((model(test).argmax(1) == data.test_y).float().mean())


def _train(model: nn.Module, losses: Iterable[Any], steps: int) -> None:
    """AdamW with a smaller rate for the state spaces, warm-up, cosine."""
    groups, taken = [], set()
    for module in model.modules():
        if isinstance(module, S4D):
            groups += module.param_groups(LR, ssm_lr=SSM_LR, weight_decay=0.0)
            taken |= {id(p) for p in module.parameters()}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizer = torch.optim.AdamW([*groups, {"params": rest}], lr=LR, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    with torch.enable_grad():
        for step, loss in enumerate(losses):
            part = min((step + 1) / WARMUP, (1 + math.cos(math.pi * step / steps)) / 2)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * part
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
