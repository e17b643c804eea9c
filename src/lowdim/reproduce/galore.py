"""GaLore: full-rank quality from a small optimizer state, better than training low-rank factors, and refreshing helps."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import DataError
from lowdim.linalg import stream
from lowdim.modules import LowRankLinear
from lowdim.optim import GaLore, state_bytes
from lowdim.reproduce.settings import tiny_lm
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

_TRAIN, _TEST, _BATCH, _EPOCHS = 20_000, 5_000, 128, 2
_NEVER = 10**9
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def run(context: Context) -> Outcome:
    """Train a perceptron by AdamW, by GaLore and with low-rank layers; then the language model, for numbers only."""
    outcome = Outcome(
        "galore",
        f"Fashion-MNIST, {_TRAIN} training and {_TEST} test images, MLP 784-256-256-10, batch {_BATCH}, {_EPOCHS} epochs;"
        " GaLore on the two hidden matrices (lr 0.01, scale 0.25, refresh every 50 steps), AdamW 1e-3 on the rest.",
    )
    data = _standardised(context)
    seeds = range(1 if context.quick else 6)
    arms: dict[str, list[float]] = {}
    state: dict[str, int] = {}
    for seed in seeds:
        for name, (accuracy, held) in _arms(data, seed, context).items():
            arms.setdefault(name, []).append(accuracy)
            state[name] = held
    full = state["AdamW"]
    for name, values in arms.items():
        row = {"method": name, **{f"accuracy, seed {s}": round(v, 2) for s, v in zip(seeds, values)}}
        row["mean accuracy"] = round(sum(values) / len(values), 2)
        row["state of the hidden matrices"] = state[name]
        row["share of AdamW's"] = round(state[name] / full, 4)
        outcome.rows.append(row)
    mean = {name: sum(values) / len(values) for name, values in arms.items()}
    lowrank = max((n for n in mean if n.startswith("LowRank 4")), key=lambda n: mean[n])
    outcome.checks += [
        Check("accuracy of GaLore, rank 16, >= AdamW's - 2 points", mean["GaLore 16"], ">=", mean["AdamW"] - 2.0),
        Check("state of the hidden matrices, GaLore 16 to AdamW", state["GaLore 16"] / full, "<=", 0.10),
        Check(f"accuracy of GaLore, rank 4, >= {lowrank}'s + 1 point", mean["GaLore 4"], ">=", mean[lowrank] + 1.0),
        Check("accuracy of GaLore, rank 4, >= never refreshed", mean["GaLore 4"], ">=", mean["GaLore 4, never refreshed"]),
    ]
    best = max(mean[n] for n in mean if n.startswith("LowRank 16"))
    outcome.notes += [
        "Best learning rate of {1e-3, 3e-3} for the low-rank layers, chosen on the test images in their favour.",
        f"At rank 16 no inequality between the two is asked for: GaLore {mean['GaLore 16']:.2f}, low-rank layers {best:.2f}.",
    ]
    if not context.quick:
        _language_model(outcome, context)
    return outcome


def _standardised(context: Context) -> Data:
    x, y, tx, ty = fashion_mnist(context)
    x, tx = x[:_TRAIN].float(), tx[:_TEST].float()
    mean, std = x.mean(), x.std()
    return (x - mean) / std, y[:_TRAIN], (tx - mean) / std, ty[:_TEST]


def _arms(data: Data, seed: int, context: Context) -> dict[str, tuple[float, int]]:
    """Test accuracy in percent, and bytes of state of the hidden matrices."""
    found = {}

    def arm(name: str, net: nn.Module, make: Any) -> None:
        optimizers = make(net)
        start = time.perf_counter()
        accuracy = _train(net, data, optimizers, seed, context.quick)
        found[name] = (accuracy, state_bytes(optimizers[0]))
        context.say(f"seed {seed}  {name}: {accuracy:.2f} % in {time.perf_counter() - start:.1f} s")

    def adamw(net: nn.Module) -> list[torch.optim.Optimizer]:
        hidden, rest = _split(net)
        return [torch.optim.AdamW(part, lr=1e-3, weight_decay=0.0) for part in (hidden, rest)]

    def galore(net: nn.Module, rank: int, interval: int, inner: str = "adamw") -> list[torch.optim.Optimizer]:
        hidden, rest = _split(net)
        options: dict[str, Any] = {"inner_options": {"min_size": 256}} if inner == "adamw8bit" else {}
        ours = GaLore(hidden, lr=0.01, rank=rank, update_interval=interval, scale=0.25, inner=inner, **options)
        return [ours, torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.0)]

    arm("AdamW", _mlp(seed), adamw)
    for rank in (16, 4):
        arm(f"GaLore {rank}", _mlp(seed), lambda net, r=rank: galore(net, r, 50))
    arm("GaLore 16, 8-bit", _mlp(seed), lambda net: galore(net, 16, 50, "adamw8bit"))
    arm("GaLore 4, never refreshed", _mlp(seed), lambda net: galore(net, 4, _NEVER))
    for rank in (16, 4):
        for lr in (1e-3, 3e-3):
            net = _mlp(seed, rank)
            named = [(name[-1] in "AB", p) for name, p in net.named_parameters()]
            hidden, rest = [p for factor, p in named if factor], [p for factor, p in named if not factor]
            rows = [torch.optim.AdamW(part, lr=lr, weight_decay=0.0) for part in (hidden, rest)]
            arm(f"LowRank {rank}, lr {lr:g}", net, lambda _, rows=rows: rows)
    return found


def _mlp(seed: int, rank: int | None = None) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if rank is None:
            first: nn.Module = nn.Linear(784, 256)
            second: nn.Module = nn.Linear(256, 256)
        else:  # alpha = rank: scale 1
            first, second = LowRankLinear(784, 256, rank=rank, alpha=rank), LowRankLinear(256, 256, rank=rank, alpha=rank)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(256, 10))


def _split(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The two hidden matrices, and everything else."""
    hidden = [p for p in net.parameters() if p.ndim == 2][:2]
    return hidden, [p for p in net.parameters() if not any(p is q for q in hidden)]


def _train(net: nn.Module, data: Data, optimizers: list[torch.optim.Optimizer], seed: int, quick: bool) -> float:
    x, y, tx, ty = data
    draw = stream(seed, "galore", "batches")
    for _ in range(_EPOCHS):
        order = torch.randperm(len(x), generator=draw)
        for rows in order.split(_BATCH)[: 20 if quick else None]:
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    with torch.no_grad():
        return float((net(tx).argmax(1) == ty).float().mean()) * 100


def _language_model(outcome: Outcome, context: Context) -> None:
    """AdamW and GaLore on the LM set-up: numbers, no inequality."""
    try:
        corpus = tiny_lm.load_corpus(context)
    except DataError as error:
        outcome.notes.append(f"The language model was not trained: {error}")
        return
    settings = tiny_lm.Settings()
    for name, lr in (("AdamW, lr 0.005", 0.005), ("GaLore 16, lr 0.06", 0.06)):
        model = tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed=0)
        hidden = tiny_lm.matrices(model)
        rest = [p for p in model.parameters() if not any(p is q for q in hidden)]
        other = torch.optim.AdamW(rest, lr=0.005, weight_decay=0.0)
        if name.startswith("AdamW"):
            first: torch.optim.Optimizer = torch.optim.AdamW(hidden, lr=lr, weight_decay=0.0)
        else:
            first = GaLore(hidden, lr=lr, rank=16, update_interval=50, scale=0.25)
        loss = tiny_lm.train(model, corpus, [first, other], settings, seed=0)
        outcome.rows.append(
            {"method": f"language model: {name}", "validation loss": round(loss, 4), "state": state_bytes(first)}
        )
        context.say(f"language model  {name}: {loss:.4f}")
    outcome.notes.append(
        "Language model: Tiny Shakespeare by characters, 2 blocks of width 64, 300 steps, seed 0, the rest by AdamW 0.005."
    )
