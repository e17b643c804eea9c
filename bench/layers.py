"""Structured and sparse layers against nn.Linear and other libraries: time of a pass, or of a training step.

    OMP_NUM_THREADS=1 python bench/layers.py [--quick] [--only monarch,sparse] [--out results/bench-layers.json]
    OMP_NUM_THREADS=1 python bench/layers.py --only crossover [--out results/bench-crossover.json]

All variants of a shape run in one process and alternate, so that other load on the machine affects all of them; a ratio is the
median of the ratios within a round. Shapes are (tokens, in, out), float32. torch-structured's Monarch product is loaded from
its file if the package is installed (its own __init__ imports triton); it also needs einops. It has no bias, so the
products are compared without. The same formula as two einsums is always measured.

Sparse training (N:M decay, PST) is a whole step with AdamW: against dense training, torch.nn.utils.prune with a mask made anew
by a stable sort, torchao's pruning-aware training (its optimizer projects onto N:M), and movement pruning with a score for each
entry. `state` is the ratio of the numbers that the optimizers hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lowdim.compress import NMDecayConfig, NMLinear, PSTConfig, PSTLinear
from lowdim.layers import BlockDense, BlockShuffle, HouseholderProjector, LowRankLinear, Monarch, SLTrainLinear
from lowdim.linalg import monarch_multiply, smallest_mask
from lowdim.train.environment import installed, processor

SHAPES = ((2048, 768, 3072), (2048, 3072, 768))
LOW_RANKS = ((2048, 768, 3072, 192), (2048, 768, 3072, 384), (1, 768, 3072, 192), (128, 768, 3072, 192))
TARGETS = {
    "product / torch-structured": 1.1,
    "Householder / parametrizations.orthogonal": 1.0,
    "N:M / dense": 2.0,
    "N:M / torch.nn.utils.prune": 1.0,
    "N:M / torchao PAT": 1.0,
    "PST / dense": 3.0,
}
#: Layers with a rank of a quarter of the width, or four blocks.
CROSSOVER: dict[str, Callable[[int, int], nn.Module]] = {
    "low rank": lambda n, m: LowRankLinear(n, m, rank=min(n, m) // 4),
    "BlockDense": lambda n, m: BlockDense(n, m, rank=min(n, m) // 4, nblocks=4),
    "BlockShuffle": lambda n, m: BlockShuffle(n, m, nblocks=4),
    "Monarch": lambda n, m: Monarch(n, m, nblocks=4),
    "SLTrain": lambda n, m: SLTrainLinear(n, m, rank=min(n, m) // 4, density=0.03, alpha=16.0),
}
PRODUCTS = "products"
TOKENS, WIDTHS = (1, 4, 16, 64, 256, 1024), ((256, 1024), (1024, 256), (768, 3072), (3072, 768))
SPARSITY = 0.9  # of PST and movement pruning

Step = Callable[[Tensor], Tensor]
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def einsums(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    (k, _, p), (l, _, r) = w1.shape, w2.shape
    hidden = torch.einsum("tkp,kqp->tkq", x.view(-1, k, p), w1).reshape(-1, r, l)
    return torch.einsum("trl,lsr->tsl", hidden, w2).reshape(len(x), -1)


def torch_structured() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    found = importlib.util.find_spec("torch_structured")
    if found is None or importlib.util.find_spec("einops") is None:
        return None
    path = Path(found.submodule_search_locations[0]) / "monarch" / "blockdiag_butterfly_multiply.py"
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.blockdiag_butterfly_multiply


def timed(step: Step, x: Tensor, grad: Tensor, backward: bool, clock: Callable[[], float]) -> float:
    x.grad = None
    start = clock()
    if backward:
        step(x).backward(grad)
    else:
        with torch.no_grad():
            step(x)
    return clock() - start


def compare(
    variants: dict[str, Step],
    shape: tuple[int, int, int],
    turns: int,
    backward: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    tokens, n_in, n_out = shape
    x, grad = torch.randn(tokens, n_in, requires_grad=backward), torch.randn(tokens, n_out)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 3):
        for name, step in variants.items():
            seconds = timed(step, x, grad, backward, clock)
            if turn >= 3:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    return round(statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True)), 3)


def monarch(turns: int) -> list[dict]:
    rows, peer = [], torch_structured()
    for shape in SHAPES:
        torch.manual_seed(0)
        layer, dense = Monarch(shape[1], shape[2], nblocks=4), nn.Linear(shape[1], shape[2])
        w1, w2 = layer.blkdiag1, layer.blkdiag2
        variants: dict[str, Step] = {
            "dense": dense,
            "Monarch": layer,
            "product": lambda x, a=w1, b=w2: monarch_multiply(x, a, b),
            "einsums": lambda x, a=w1, b=w2: einsums(x, a, b),
        }
        if peer is not None:
            variants["torch-structured"] = lambda x, a=w1, b=w2: peer(x, a, b)
        x = torch.randn(5, shape[1])
        for name in ("einsums", "torch-structured"):
            if name in variants:
                torch.testing.assert_close(variants[name](x), variants["product"](x), rtol=1e-4, atol=1e-4)
        times = compare(variants, shape, turns)
        row = {"layer": "Monarch, nblocks=4", "shape": shape, "pass": "forward + backward"}
        row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 1) for name, t in times.items()}
        row["flops / dense"] = round(layer.cost(1).flops_forward / (2 * dense.weight.numel()), 3)
        row["Monarch / dense"] = ratio(times, "Monarch", "dense")
        row["product / einsums"] = ratio(times, "product", "einsums")
        if peer is not None:
            row["product / torch-structured"] = ratio(times, "product", "torch-structured")
        rows.append(row)
    return rows


def low_rank(turns: int) -> list[dict]:
    rows = []
    for tokens, n_in, n_out, rank in LOW_RANKS:
        torch.manual_seed(0)
        layer, dense = LowRankLinear(n_in, n_out, rank=rank), nn.Linear(n_in, n_out)
        for backward in (True, False):
            times = compare({"dense": dense, "low rank": layer}, (tokens, n_in, n_out), turns, backward)
            row = {"layer": f"LowRankLinear, rank {rank}", "shape": (tokens, n_in, n_out)}
            row["pass"] = "forward + backward" if backward else "forward"
            row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()}
            row["flops / dense"] = round(layer.cost(1).flops_forward / (2 * dense.weight.numel()), 3)
            row["low rank / dense"] = ratio(times, "low rank", "dense")
            rows.append(row)
    return rows


def householder(turns: int) -> list[dict]:
    torch.manual_seed(0)
    thin = [
        parametrizations.orthogonal(nn.Linear(*n, bias=False), orthogonal_map="householder") for n in ((512, 10), (10, 512))
    ]
    layer, peer, dense = HouseholderProjector(512, 512, rank=10), nn.Sequential(*thin), nn.Linear(512, 512)
    times = compare({"dense": dense, "Householder": layer, "parametrizations.orthogonal": peer}, (512, 512, 512), turns)
    row = {"layer": "HouseholderProjector, rank 10", "shape": (512, 512, 512), "pass": "forward + backward"}
    row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()}
    row |= {f"Householder / {name}": ratio(times, "Householder", name) for name in ("dense", "parametrizations.orthogonal")}
    return [row]


class Pruned(nn.Module):
    """torch.nn.utils.prune with a mask of the n largest of m made anew before every forward pass."""

    def __init__(self, linear: nn.Linear, n: int, m: int):
        super().__init__()
        self.linear, self.n, self.m = linear, n, m
        prune.custom_from_mask(linear, "weight", torch.ones_like(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., out_features)`."""
        with torch.no_grad():
            groups = self.linear.get_parameter("weight_orig").abs().view(-1, self.m)
            gone = groups.argsort(dim=-1, stable=True)[:, : self.m - self.n]
            mask = self.linear.get_buffer("weight_mask")
            mask.copy_(torch.ones_like(groups).scatter(-1, gone, 0.0).view_as(mask))
        return self.linear(x)


class Movement(nn.Module):
    """Movement pruning: a trained score for each entry of a trained weight, the same mask and straight-through gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.scores = linear, nn.Parameter(torch.zeros_like(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., out_features)`."""
        kept = ~smallest_mask(self.scores, int(self.scores.numel() * SPARSITY))
        return F.linear(x, self.linear.weight * (kept + self.scores - self.scores.detach()), self.linear.bias)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def pruning_aware(n: int, m: int) -> Optimizer | None:
    """Torchao's AdamW that projects weights onto n of m after each step; None without torchao."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.prototype.pat.optim import PruneOptimizer

    def make(model: nn.Module) -> torch.optim.Optimizer:
        weights = {"params": [p for p in model.parameters() if p.ndim == 2], "prox_type": "NMSparseConstraint",
                   "group_type": "KElementGrouper", "k": m, "n_nonzero": n}  # fmt: skip
        rest = {"params": [p for p in model.parameters() if p.ndim != 2]}
        return PruneOptimizer(torch.optim.AdamW([weights, rest], lr=1e-4))

    return make


def training(models: dict[str, tuple[nn.Module, Optimizer]], shape: tuple[int, int, int], turns: int) -> tuple[dict, dict]:
    """Seconds of each model's training steps, which alternate; and the numbers that its optimizer holds."""
    tokens, n_in, n_out = shape
    x, grad = torch.randn(tokens, n_in, requires_grad=True), torch.randn(tokens, n_out)
    optimizers = {name: make(model) for name, (model, make) in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(turns + 2):
        for name, (model, _) in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            model(x).backward(grad)
            optimizers[name].step()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    state = {
        name: sum(v.numel() for held in optimizer.state.values() for v in held.values() if torch.is_tensor(v) and v.ndim)
        for name, optimizer in optimizers.items()
    }
    return times, state


def sparse(turns: int) -> list[dict]:
    rows = []
    for n, m in ((2, 4), (1, 16)):
        torch.manual_seed(0)
        shape, config = (2048, 768, 3072), NMDecayConfig(n, m, total_steps=10**6)
        models: dict[str, tuple[nn.Module, Optimizer]] = {
            "dense": (nn.Linear(768, 3072), adamw),
            "N:M": (NMLinear(nn.Linear(768, 3072), config), adamw),
            "torch.nn.utils.prune": (Pruned(nn.Linear(768, 3072), n, m), adamw),
        }
        projected = pruning_aware(n, m)
        if projected is not None:
            models["torchao PAT"] = nn.Linear(768, 3072), projected
        times, _ = training(models, shape, turns)
        row = {"layer": f"N:M decay, {n}:{m}", "shape": shape, "pass": "step with AdamW"}
        row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 1) for name, t in times.items()}
        rows.append(row | {f"N:M / {name}": ratio(times, "N:M", name) for name in models if name != "N:M"})
    torch.manual_seed(0)
    shape, layer = (2048, 768, 768), PSTLinear(nn.Linear(768, 768), PSTConfig(total_steps=1, sparsity=SPARSITY))
    layer.step()  # the whole sparsity: before the first step nothing is selected
    models = {
        "dense": (nn.Linear(768, 768), adamw),
        "PST": (layer, adamw),
        "movement pruning": (Movement(nn.Linear(768, 768)), adamw),
    }
    times, state = training(models, shape, turns)
    row = {"layer": f"PST, ranks 8, {SPARSITY:.0%} sparse", "shape": shape, "pass": "step with AdamW"}
    row["milliseconds"] = {name: round(statistics.median(t) * 1e3, 1) for name, t in times.items()}
    row |= {f"PST / {name}": ratio(times, "PST", name) for name in ("dense", "movement pruning")}
    held = {name: round(state["PST"] / state[name], 4) for name in ("dense", "movement pruning")}
    rows.append(row | {f"state: PST / {name}": value for name, value in held.items()})
    return rows


def products_of(layer: nn.Module) -> Step:
    """The two batched products of a Monarch layer, without its last permutation and its bias."""
    w1, w2 = layer.blkdiag1, layer.blkdiag2
    (k, _, p), (l, s, r) = w1.shape, w2.shape

    def step(x: Tensor) -> Tensor:
        hidden = torch.bmm(w1, x.view(-1, k, p).transpose(0, 1).mT)
        return torch.bmm(hidden.view(l, r, -1).mT, w2.mT).view(-1, l * s)

    return step


def crossovers(turns: int) -> list[dict]:
    """From how many tokens in a call each layer is faster than the dense one, at that size and at all larger ones.

    The best CPU time of several calls: what else the machine does takes time from a call, not CPU time.
    """
    rows = []
    for n_in, n_out in WIDTHS:
        torch.manual_seed(0)
        variants: dict[str, Step] = {"dense": nn.Linear(n_in, n_out)}
        variants |= {name: make(n_in, n_out) for name, make in CROSSOVER.items()}
        for backward in (False, True):
            if not backward:
                variants[PRODUCTS] = products_of(variants["Monarch"])
            else:
                del variants[PRODUCTS]
            ratios: dict[str, dict[str, float]] = {name: {} for name in variants}
            dense = {}
            for tokens in TOKENS:
                calls = turns * (3 if tokens <= 64 else 1)
                times = compare(variants, (tokens, n_in, n_out), calls, backward, time.thread_time)
                best = {name: min(seconds) for name, seconds in times.items()}
                dense[str(tokens)] = round(best["dense"] * 1e3, 2)
                for name in variants:
                    ratios[name][str(tokens)] = round(best[name] / best["dense"], 3)
            for name, layer in variants.items():
                if name in CROSSOVER:
                    row = {"layer": name, "shape": (n_in, n_out), "pass": "forward + backward" if backward else "forward"}
                    row["flops / dense"] = round(layer.cost(TOKENS[-1]).flops_forward / (2 * n_in * n_out * TOKENS[-1]), 3)
                    slow = [tokens for tokens in TOKENS if ratios[name][str(tokens)] > 1]
                    later = [tokens for tokens in TOKENS if not slow or tokens > slow[-1]]
                    row |= {"faster from": later[0] if later else None, "time / dense": ratios[name], "dense ms": dense}
                    if not backward and name in ("Monarch", "BlockShuffle"):
                        row["products alone / dense"] = ratios[PRODUCTS]
                    rows.append(row)
    return rows


SECTIONS = {
    "monarch": monarch,
    "low-rank": low_rank,
    "householder": householder,
    "sparse": sparse,
    "crossover": crossovers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    turns = 3 if arguments.quick else 20
    rows = [row for name in arguments.only.split(",") for row in SECTIONS[name](turns)]
    for row in rows:
        print(json.dumps(row))
        for name, target in TARGETS.items():
            if name in row:
                print(f"  {name} {row[name]} {'<=' if row[name] <= target else '> (missed)'} {target}")
    if arguments.out:
        record = {
            "rows": rows,
            "targets": TARGETS,
            "environment": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torch-structured": installed("torch-structured"),
                "torchao": installed("torchao"),
                "cpu": processor(),
                "threads": torch.get_num_threads(),
                "turns": turns,
                "load": [round(each, 1) for each in os.getloadavg()],
            },
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
