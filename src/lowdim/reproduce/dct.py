"""DCT-AdamW: how much of real gradients a few cosine columns hold, and whether training suffers from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.linalg import stream
from lowdim.optim import DCTAdamW, DCTProjector, GaLore, state_bytes
from lowdim.reproduce.settings import tiny_lm
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["run"]

_RANK, _INTERVAL, _STEPS = 16, 50, 50
_RATES = (0.01, 0.02)
_GALORE_RATES, _REST = (0.03, 0.06), 0.005
_SIDE = 2048


def run(context: Context) -> Outcome:
    """Energy captured by six kinds of columns; training compared with GaLore; the time of a step compared with an SVD."""
    outcome = Outcome(
        "dct",
        f"Tiny Shakespeare by characters, 2 blocks of width 64, the 8 matrices at rank {_RANK}; energy in the gradients after"
        f" {_STEPS} steps of AdamW 0.005; training over 300 steps with new columns in each (GaLore: every {_INTERVAL}).",
    )
    corpus = tiny_lm.load_corpus(context)
    _energies(outcome, context, corpus)
    _training(outcome, context, corpus)
    if not context.quick:
        _time(outcome, context)
    return outcome


def _energies(outcome: Outcome, context: Context, corpus: tiny_lm.Corpus) -> None:
    settings = tiny_lm.Settings(valid_batches=1)
    model = tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed=0)
    grads: list[Tensor] = []
    last = 4 if context.quick else _STEPS

    def keep(step: int) -> None:
        if step == last - 1:
            grads.extend(p.grad.clone() for p in tiny_lm.matrices(model) if p.grad is not None)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.0)
    tiny_lm.train(model, corpus, [optimizer], tiny_lm.Settings(steps=last, valid_batches=1), seed=0, each=keep)
    found = {name: sum(share(g, i) for i, g in enumerate(grads)) / len(grads) for name, share in _shares().items()}
    for name, value in found.items():
        outcome.rows.append({"method": f"energy: {name}", "share of ‖G‖² at rank 16": round(value, 4)})
        context.say(f"energy, {name}: {value:.4f}")
    fixed, chosen = "random orthogonal, fixed columns", "random orthogonal, best columns (l2)"
    outcome.checks += [
        Check("energy of dct3 l2 - dct3 l1", found["dct3 l2"] - found["dct3 l1"], ">=", 0.0),
        Check("energy of dct2 l2 - dct2 l1", found["dct2 l2"] - found["dct2 l1"], ">=", 0.0),
        Check("energy of dct3 l1 >= fixed random columns + 0.15", found["dct3 l1"], ">=", found[fixed] + 0.15),
    ]
    outcome.notes.append(
        f"The gain is the selection and not the cosines: the best {_RANK} columns of a RANDOM orthogonal matrix hold"
        f" {found[chosen]:.3f} of the energy, those of the DCT {found['dct2 l2']:.3f} (dct2) and {found['dct3 l2']:.3f} (dct3),"
        f" the singular vectors {found['SVD (upper bound)']:.3f}."
    )


def _shares() -> dict[str, Callable[[Tensor, int], float]]:
    """Captured energy `‖P Pᵀ G‖² / ‖G‖²` of a gradient, by the way in which columns are found."""

    def cosines(basis: str, norm: int) -> Callable[[Tensor, int], float]:
        def share(G: Tensor, index: int) -> float:
            projector, state = DCTProjector(_RANK, basis=basis, norm=norm), dict[str, Any]()
            projector.prepare(G, state, 0)
            return float(projector.down(G, state).square().sum() / G.square().sum())

        return share

    def singular(G: Tensor, index: int) -> float:
        s = torch.linalg.svdvals(G).square()
        return float(s[:_RANK].sum() / s.sum())

    def random(G: Tensor, index: int, best: bool) -> float:
        side = min(G.shape)
        draw = torch.randn(side, side, generator=stream(0, "dct", "random basis", index))
        Q = torch.linalg.qr(draw).Q
        scores = (G @ Q).square().sum(0) if G.shape[0] >= G.shape[1] else (Q.mT @ G).square().sum(1)
        kept = scores.topk(_RANK).values if best else scores[:_RANK]
        return float(kept.sum() / scores.sum())

    return {
        "SVD (upper bound)": singular,
        **{f"{basis} l{norm}": cosines(basis, norm) for basis in ("dct2", "dct3") for norm in (2, 1)},
        "random orthogonal, best columns (l2)": lambda G, i: random(G, i, True),
        "random orthogonal, fixed columns": lambda G, i: random(G, i, False),
    }


def _training(outcome: Outcome, context: Context, corpus: tiny_lm.Corpus) -> None:
    settings = tiny_lm.Settings(steps=8, warmup=2, valid_batches=1) if context.quick else tiny_lm.Settings()
    seeds = range(1 if context.quick else 3)
    mean: dict[str, float] = {}

    def arm(name: str, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], rest: float, over: range = seeds) -> None:
        losses, held, seconds = [], 0, 0.0
        for seed in over:
            model = tiny_lm.TinyTransformer(corpus.vocabulary, settings, seed)
            hidden = tiny_lm.matrices(model)
            others = [p for p in model.parameters() if not any(p is q for q in hidden)]
            first = make(hidden)
            start = time.perf_counter()
            losses.append(
                tiny_lm.train(model, corpus, [first, torch.optim.AdamW(others, rest, weight_decay=0.0)], settings, seed)
            )
            seconds += time.perf_counter() - start
            held = state_bytes(first)
            context.say(f"{name}, seed {seed}: {losses[-1]:.4f}")
        mean[name] = sum(losses) / len(losses)
        row = {"method": name, **{f"loss, seed {s}": round(v, 4) for s, v in zip(over, losses)}, "mean": round(mean[name], 4)}
        outcome.rows.append({**row, "state of the matrices": held, "seconds a run": round(seconds / len(losses), 1)})

    def ours(lr: float, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda hidden: DCTAdamW(hidden, lr=lr, rank=_RANK, **options)

    def galore(lr: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda hidden: GaLore(hidden, lr=lr, rank=_RANK, update_interval=_INTERVAL, scale=0.25)

    with _CountSVD() as count:
        for lr in _RATES:
            arm(f"DCT-AdamW, lr {lr:g}", ours(lr), _REST)
    for lr in _GALORE_RATES:
        arm(f"GaLore, lr {lr:g}", galore(lr), _REST)
    best, peer = (min((n for n in mean if n.startswith(kind)), key=lambda n: mean[n]) for kind in ("DCT", "GaLore"))
    outcome.checks += [
        Check(f"mean loss of {best} <= that of {peer} + 0.03", mean[best], "<=", mean[peer] + 0.03),
        Check("SVDs called by DCT-AdamW", float(count.calls), "<=", 0.0),
    ]
    outcome.notes.append("Learning rates: the better of two on the mean validation loss, for DCT-AdamW and for GaLore.")
    if context.quick:
        return
    one = range(1)
    arm("DCT-AdamW, lr 0.02, the rest at 0.01", ours(0.02), 0.01, one)
    arm("GaLore, lr 0.06, the rest at 0.01", galore(0.06), 0.01, one)
    arm("DCT-AdamW, lr 0.005", ours(0.005), _REST, one)
    arm("DCT-AdamW, lr 0.005, error feedback", ours(0.005, error_feedback=True), _REST, one)
    arm("DCT-AdamW, lr 0.005, error feedback in 8 bits", ours(0.005, error_feedback=8), _REST, one)
    arm("DCT-AdamW, lr 0.01, columns every 20 steps", ours(0.01, update_interval=20), _REST, one)
    arm("DCT-AdamW, lr 0.01, without rotation", ours(0.01, rotate=False), _REST, one)
    arm("DCT-AdamW, lr 0.01, residual as in Fira", ours(0.01, residual="norm_scaled"), _REST, one)


class _CountSVD:
    """Counts calls of torch's decompositions while it is entered."""

    names = ("svd", "svdvals", "eigh")

    def __init__(self) -> None:
        self.calls = 0
        self._plain: dict[str, Any] = {}

    def __enter__(self) -> _CountSVD:
        for name in self.names:
            self._plain[name] = getattr(torch.linalg, name)
            setattr(torch.linalg, name, self._counting(self._plain[name]))
        return self

    def __exit__(self, *why: object) -> None:
        for name, function in self._plain.items():
            setattr(torch.linalg, name, function)

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*args, **options)

        return call


def _time(outcome: Outcome, context: Context) -> None:
    """One step on a large matrix, including the choice of columns, compared with one SVD."""
    draw = stream(0, "dct", "time")
    p = nn.Parameter(torch.randn(_SIDE, _SIDE, generator=draw))
    p.grad = torch.randn(_SIDE, _SIDE, generator=draw)
    optimizer = DCTAdamW([p], rank=128)
    steps = []
    for _ in range(6):
        start = time.perf_counter()
        optimizer.step()
        steps.append(time.perf_counter() - start)
    start = time.perf_counter()
    torch.linalg.svd(p.grad, full_matrices=False)
    svd, step = time.perf_counter() - start, min(steps[1:])
    outcome.rows.append({"method": f"one step on {_SIDE} x {_SIDE}, rank 128", "milliseconds": round(step * 1e3, 1)})
    outcome.rows.append({"method": f"one SVD of {_SIDE} x {_SIDE}", "milliseconds": round(svd * 1e3, 1)})
    context.say(f"one step {step * 1e3:.1f} ms, one SVD {svd * 1e3:.0f} ms")
    outcome.checks.append(Check("time of one step, of one SVD's", step / svd, "<=", 0.2))
