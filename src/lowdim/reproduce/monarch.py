"""Monarch layers against dense ones, with reverse sparsification, on Fashion-MNIST; and the Fourier matrix, exactly."""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.layers import Monarch, densify
from lowdim.linalg import derive_seed, monarch_dense, monarch_project, stream
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

BATCH, EPOCHS, SWITCH = 128, 4, 0.8
PEAK = {"dense": 1e-3, "Monarch": 2e-3, "reverse": 2e-3}


def run(context: Context) -> Outcome:
    """Three arms, three seeds: accuracy, multiply-adds and seconds; then one projection without training."""
    train_x, train_y, test_x, test_y = fashion_mnist(context)
    count = 1280 if context.quick else 20_000
    data = _pixels(train_x[:count]), train_y[:count], _pixels(test_x), test_y
    outcome = Outcome(
        "monarch",
        f"Fashion-MNIST, {count} training images, MLP 784-1024-1024-10 with GELU, hidden layers dense or Monarch(nblocks=4), "
        f"AdamW, {EPOCHS} epochs, batch {BATCH}; reverse: dense again after {SWITCH:.0%} of the steps",
    )
    seeds = (0,) if context.quick else (0, 1, 2)
    accuracy: dict[str, list[float]] = {arm: [] for arm in PEAK}
    work: dict[str, float] = {}
    for seed in seeds:
        for arm in PEAK:
            start = time.perf_counter()
            accuracy[arm].append(_train(arm, seed, data, work))
            seconds = time.perf_counter() - start
            context.say(f"seed {seed}, {arm}: accuracy {accuracy[arm][-1]:.4f} in {seconds:.1f} s")
            row = {"seed": seed, "arm": arm, "accuracy": accuracy[arm][-1], "seconds": round(seconds, 1)}
            outcome.rows.append({**row, "multiply_adds": round(work[arm])})
    mean = {arm: statistics.mean(values) for arm, values in accuracy.items()}
    for arm, share in (("Monarch", 0.5), ("reverse", 0.65)):
        outcome.checks.append(Check(f"mean accuracy, {arm}", mean[arm], ">=", mean["dense"] - 0.01))
        outcome.checks.append(Check(f"multiply-adds of dense, {arm}", work[arm] / work["dense"], "<=", share))
    error, low_rank = _fourier()
    outcome.rows.append({"arm": "Fourier matrix of size 24", "projection_error": error, "low_rank_error": round(low_rank, 4)})
    outcome.checks.append(Check("error of the projected Fourier matrix", error, "<=", 1e-12))
    outcome.checks.append(Check("error of the best low-rank matrix of equal size", low_rank, ">=", 0.5))
    outcome.notes += [
        "Accuracy and time on one small task; the paper's ViT, GPT-2 and BERT runs are out of reach here.",
        "Multiply-adds are per sample in the forward pass, for reverse the average over the steps.",
    ]
    return outcome


def _train(arm: str, seed: int, data: tuple[Tensor, Tensor, Tensor, Tensor], work: dict[str, float]) -> float:
    train_x, train_y, test_x, test_y = data
    model = _mlp(arm, seed)
    steps = EPOCHS * math.ceil(len(train_x) / BATCH)
    switch = round(SWITCH * steps) if arm == "reverse" else steps
    before, optimizer = _multiply_adds(model), _optimizer(model)
    order, done = stream(seed, "order"), 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train_x), generator=order).split(BATCH):
            if done == switch:
                optimizer = _optimizer(densify(model))  # the old one holds dead tensors
            for group in optimizer.param_groups:
                group["lr"] = PEAK[arm] * _schedule(done, steps)
            loss = F.cross_entropy(model(train_x[rows]), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    share = switch / steps
    work[arm] = share * before + (1 - share) * _multiply_adds(model)
    with torch.no_grad():
        return round(float((model(test_x).argmax(1) == test_y).float().mean()), 4)


def _mlp(arm: str, seed: int) -> nn.Sequential:
    generator = stream(seed, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "dense"))
        if arm == "dense":
            hidden = [nn.Linear(784, 1024), nn.Linear(1024, 1024)]
        else:
            hidden = [Monarch(784, 1024, nblocks=4, generator=generator), Monarch(1024, 1024, nblocks=4, generator=generator)]
        return nn.Sequential(hidden[0], nn.GELU(), hidden[1], nn.GELU(), nn.Linear(1024, 10))


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)


def _schedule(step: int, steps: int, warmup: int = 30) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _multiply_adds(model: nn.Module) -> int:
    layers = [layer for layer in model if not isinstance(layer, nn.GELU)]  # type: ignore[attr-defined]
    return sum(x.cost(1).flops_forward // 2 if isinstance(x, Monarch) else x.weight.numel() for x in layers)


def _pixels(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.286) / 0.353


def _fourier(size: int = 24, pieces: int = 6) -> tuple[float, float]:
    """Errors, relative to the norm: of the Monarch projection, and of the best low-rank matrix with as many numbers."""
    matrix = torch.fft.fft(torch.eye(size, dtype=torch.complex128), norm="ortho")
    rest = size // pieces
    columns = torch.arange(size).view(rest, pieces).T.reshape(-1)  # input a + pieces·b stands at a·rest + b
    matrix = matrix[:, columns]
    w1, w2 = monarch_project(matrix, (pieces, rest, rest), (rest, pieces, pieces))
    rank = (w1.numel() + w2.numel()) // (2 * size)
    norm = torch.linalg.matrix_norm(matrix)
    left_out = torch.linalg.svdvals(matrix)[rank:].norm()
    return float(torch.linalg.matrix_norm(matrix - monarch_dense(w1, w2)) / norm), float(left_out / norm)
