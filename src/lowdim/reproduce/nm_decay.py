"""N:M decay: masks that fade in against SR-STE, at two sparsities; a convolutional net at 2:4; the time of a step."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lowdim.compress import NMDecayConfig, NMLinear, SparseTraining, nm_decay
from lowdim.linalg import derive_seed, nm_mask, stream
from lowdim.reproduce.settings.data import fashion_mnist
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.reproduce.settings.paired_timing import step_pairs
from lowdim.threads import one_thread

__all__ = ["run"]

_TRAIN, _BATCH, _STEPS, _WARM, _RATE = 12_000, 128, 465, 30, 1e-3
#: Pattern -> hidden width, and what is trained: the options of the config, None for the dense model.
_ARMS: dict[str, dict[str, dict[str, Any] | None]] = {
    "1:16": {
        "dense": None,
        "SR-STE": {"method": "srste"},
        "step": {"decay": "step"},
        "exp": {},
        "exp, masked gradient": {"gradient": "masked"},
        "stepwise": {"structure": "stepwise", "decay": "step"},
    },
    "1:56": {"dense": None, "SR-STE": {"method": "srste"}, "exp": {}},
}
_WIDTHS = {"1:16": 512, "1:56": 448}
#: Options of the convolutional net.
_CONV: dict[str, dict[str, Any] | None] = {"dense": None, "exp": {}}
_CONV_STEPS = 93


def run(context: Context) -> Outcome:
    """Three seeds of each arm; then a step's time."""
    outcome = Outcome(
        "nm-decay",
        f"Fashion-MNIST, first {_TRAIN} training images, all 10000 test images; MLP 784-h-h-10 with GELU, h = 512 at 1:16 and"
        f" 448 at 1:56, both hidden layers masked along their inputs; AdamW {_RATE:g}, weight decay 0.01, batch {_BATCH},"
        f" {_STEPS} steps with {_WARM} of warm-up and cosine, the last 10 % without masked weights. Three convolutions"
        f" 1-16-32-64, stride 2, the last two at 2:4 along their channels, {_CONV_STEPS} steps."
        " Test accuracy (x 100) of the finalized model, mean of three seeds.",
    )
    data = _Data(context)
    seeds = range(1 if context.quick else 3)
    mean: dict[tuple[str, str], float] = {}
    for pattern, arms in _ARMS.items():
        for arm, options in arms.items():
            found = [data.trained(_mlp(_WIDTHS[pattern], seed), pattern, options, seed, ["0", "2"]) for seed in seeds]
            mean[pattern, arm] = _note(outcome, context, pattern, arm, found)
    for arm, options in _CONV.items():
        found = [data.trained(_conv_net(seed), "2:4", options, seed, ["2", "4"]) for seed in seeds]
        mean["2:4", arm] = _note(outcome, context, "2:4, convolutions", arm, found)
    _check(outcome, mean, _times(outcome, 2 if context.quick else 9))
    return outcome


def _note(outcome: Outcome, context: Context, pattern: str, arm: str, found: list[float]) -> float:
    mean = sum(found) / len(found)
    row = {"pattern": pattern, "arm": arm, "accuracy": round(mean, 2), "seeds": " ".join(f"{value:.2f}" for value in found)}
    outcome.rows.append(row)
    context.say(f"{pattern} {arm}: {row['seeds']}")
    return mean


def _check(outcome: Outcome, mean: dict[tuple[str, str], float], times: dict[str, float]) -> None:
    exp, other = mean["1:16", "exp"], mean["1:16", "SR-STE"]
    outcome.checks += [
        Check("1:16: accuracy of exp above SR-STE", exp, ">=", other),
        Check("1:16: accuracy of exp, at most 3 points below dense", exp, ">=", mean["1:16", "dense"] - 3),
        Check("1:56: accuracy of exp above SR-STE (the paper's claim is for high sparsity)", mean["1:56", "exp"], ">=",
              mean["1:56", "SR-STE"]),
        Check("2:4 step over a dense step, time", times["2:4"], "<=", 2.0),
        Check("2:4 step over torch.nn.utils.prune with a mask made anew, time", times["pruned"], "<=", 1.0),
    ]  # fmt: skip
    lead = mean["1:56", "exp"] - mean["1:56", "SR-STE"]
    outcome.notes += [
        f"1:16: exp is {exp - other:+.2f} points from SR-STE on three seeds; with masked gradients it has"
        f" {mean['1:16', 'exp, masked gradient']:.2f} against {exp:.2f}, stepwise structure {mean['1:16', 'stepwise']:.2f}.",
        f"1:56: exp is {lead:+.2f} points from SR-STE: the claim, which is for high sparsity, is "
        + ("seen here too." if lead >= 0 else "not reproduced on this small network."),
        "The paper trains transformers over 10^5 steps and more, out of reach here.",
        "Times: 768 to 3072 features, 2048 rows, forward, backward and AdamW, median of pairs; at 1:16"
        f" {times['1:16']:.2f} of dense. Nothing is faster for the zeros: products are dense.",
    ]


def _times(outcome: Outcome, pairs: int) -> dict[str, float]:
    """A step's time over that of the dense layer, and over that of torch's pruning with the same mask."""
    x = torch.randn(2048, 768, generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}
    with one_thread():
        for name, first, second in (
            ("2:4", _thinned(2, 4), nn.Linear(768, 3072)),
            ("1:16", _thinned(1, 16), nn.Linear(768, 3072)),
            ("pruned", _thinned(2, 4), _Pruned(2, 4)),
        ):
            ratios = [a / b for a, b in step_pairs(first, second, x, pairs, 1)]
            found[name] = statistics.median(ratios)
            against = "torch.nn.utils.prune" if name == "pruned" else "dense"
            pattern = "2:4" if name == "pruned" else name
            outcome.rows.append({"pattern": pattern, "arm": f"step's time over {against}", "ratio": round(found[name], 3)})
    return found


def _thinned(n: int, m: int) -> NMLinear:
    return NMLinear(nn.Linear(768, 3072), NMDecayConfig(n, m, total_steps=1000))


class _Pruned(nn.Module):
    """torch.nn.utils.prune with a mask that is made anew before every forward pass, the stable sort of the weight."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.linear, self.n, self.m = nn.Linear(768, 3072), n, m
        prune.custom_from_mask(self.linear, "weight", torch.ones(3072, 768))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.linear.get_parameter("weight_orig")
            order = weight.abs().view(-1, self.m).argsort(dim=-1, stable=True)
            mask = torch.ones_like(weight).view(-1, self.m).scatter(-1, order[:, : self.m - self.n], 0.0)
            self.linear.get_buffer("weight_mask").copy_(mask.view_as(weight))
        return self.linear(x)


def _mlp(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "nm-decay", "model"))
        return nn.Sequential(nn.Linear(784, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))


def _conv_net(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "nm-decay", "conv"))
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)), nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GELU()),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip


class _Data:
    """Images with mean 0 and deviation 1."""

    def __init__(self, context: Context):
        x, y, tx, ty = fashion_mnist(context)
        x, tx = x[:_TRAIN].float(), tx.float()
        mean, std = x.mean(), x.std()
        self.x, self.y, self.tx, self.ty = (x - mean) / std, y[:_TRAIN], (tx - mean) / std, ty
        self.quick = context.quick

    def trained(self, net: nn.Module, pattern: str, options: dict[str, Any] | None, seed: int, names: list[str]) -> float:
        """Accuracy (x 100) of the network after training and `finalize`."""
        steps = 20 if self.quick else _CONV_STEPS if isinstance(net[0], nn.Unflatten) else _STEPS  # type: ignore[index]
        n, m = map(int, pattern.split(":"))
        companion = None
        if options is not None:
            nm_decay(net, NMDecayConfig(n, m, total_steps=steps, target_modules=names, **options))
            companion = SparseTraining(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=0.01)
        warm = min(_WARM, steps // 4)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (steps - warm)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        rows = torch.cat([torch.randperm(_TRAIN, generator=stream(seed, "nm-decay", epoch)) for epoch in range(5)])
        for batch in rows.split(_BATCH)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(net(self.x[batch]), self.y[batch]).backward()
            optimizer.step()
            schedule.step()
            if companion is not None:
                companion.step()
        if companion is not None:
            companion.finish()
            for name in names:
                weight: Any = net.get_submodule(name).weight
                assert torch.equal(weight, weight * nm_mask(weight, n, m, dim=1)), f"layer {name} is not {pattern}"
        with torch.no_grad():
            return 100 * float((net.eval()(self.tx).argmax(1) == self.ty).float().mean())
