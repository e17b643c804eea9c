"""LLaMA-7B in little memory on one GPU: peak bytes, tokens per second and the time of a refresh, compared with torch's AdamW.

    python bench/gpu_training.py [--methods adamw,galore-8bit,q-galore] [--layers 32] [--out results/bench-gpu-training.json]

Needs torch and the source tree only: the model is written out here (shapes of `lowdim.models.architectures`, bfloat16, batch 1
of 256 tokens, checkpointing, random tokens: the measurements do not depend on them). Every method runs in its own process, so
that none inherits another's memory. A method that does not fit is reported as such. On a CPU (`--device cpu`) the sizes are
reduced, which only shows that it runs; peak memory is then unknown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from lowdim.models.architectures import SHAPES
from lowdim.optim import DCTAdamW, Fira, GaLore, QGaLore, param_groups, state_bytes

METHODS = ("adamw", "galore", "galore-8bit", "q-galore", "fira", "dct")
#: GiB at the peak that the method must not exceed at 7B, batch 1 x 256, and seconds of a refresh of the whole model.
TARGETS = {"galore-8bit": 19.0, "q-galore": 13.0}
REFRESH = 6.0


class Block(nn.Module):
    """A LLaMA block: attention and a gated perceptron, each after an RMS norm."""

    def __init__(self, width: int, inner: int, heads: int, **place: Any):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6, **place), nn.RMSNorm(width, eps=1e-6, **place)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False, **place) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False, **place) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False, **place)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`(1, time, width)`."""
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Llama(nn.Module):
    """Embedding, blocks (recomputed in the backward pass), norm, head."""

    def __init__(self, width: int, inner: int, layers: int, heads: int, vocabulary: int, **place: Any):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, **place)
        self.blocks = nn.ModuleList(Block(width, inner, heads, **place) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(width, eps=1e-6, **place), nn.Linear(width, vocabulary, bias=False, **place)
        self.half = width // heads // 2

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each next token."""
        x = self.embed(tokens)
        place = torch.arange(tokens.shape[1], device=x.device)[:, None]
        angles = place / 10_000 ** (torch.arange(self.half, device=x.device) / self.half)
        cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def build(method: str, model: nn.Module, rank: int, interval: int) -> Any:
    """The optimizer; its low-rank part does not refresh by itself within the timed steps."""
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=model.embed.weight.is_cuda)
    usual: dict[str, Any] = {"lr": 1e-3, "update_interval": interval, "layerwise": True}
    if method == "q-galore":
        QGaLore.prepare_model(model, rank=rank)
        return QGaLore(param_groups(model, rank=rank), **usual)
    if method == "dct":
        return DCTAdamW(param_groups(model, rank=rank), **{**usual, "update_interval": interval})
    if method == "fira":
        return Fira(param_groups(model, rank=rank), **usual)
    inner = "adamw8bit" if method == "galore-8bit" else "adamw"
    return GaLore(param_groups(model, rank=rank), inner=inner, **usual)


def clock(call: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def one(given: argparse.Namespace) -> dict[str, Any]:
    """One method: the first step (with the state, and the first subspaces), ordinary steps, and a step that refreshes all."""
    device = torch.device(given.device)
    width, inner, layers, heads, _ = SHAPES[given.model]
    layers = min(layers, given.layers or layers)
    torch.manual_seed(0)
    model = Llama(width, inner, layers, heads, given.vocabulary, device=device, dtype=torch.bfloat16)
    optimizer = build(given.method, model, min(given.rank, width // 2), given.interval)
    tokens = torch.randint(given.vocabulary, (1, given.length), device=device)

    def step() -> None:
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = clock(step, device)
    times = [clock(step, device) for _ in range(given.interval - 1)]
    row: dict[str, Any] = {
        "method": given.method,
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_step_s": round(first, 3),
        "step_s": round(statistics.median(times[1:] or times), 4),
        "tokens_per_s": round(given.length / statistics.median(times[1:] or times), 1),
        "state_gib": round(state_bytes(optimizer) / 2**30, 3),
    }
    if device.type == "cuda":
        row["usual_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if given.method != "adamw":  # the next step is a multiple of the interval
        again = clock(step, device)
        row["refreshing_step_s"] = round(again, 3)
        row["refresh_s"] = round(max(0.0, again - row["step_s"]), 3)
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        whole = given.model == "llama-7b" and layers == SHAPES["llama-7b"][2]
        if whole and given.method in TARGETS:
            row |= {"target_gib": TARGETS[given.method], "met": row["peak_gib"] <= TARGETS[given.method]}
        if whole and "refresh_s" in row:
            row |= {"refresh_target_s": REFRESH, "refresh_met": row["refresh_s"] <= REFRESH}
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-7b")
    parser.add_argument("--methods", default="adamw,galore,galore-8bit,q-galore,fira")
    parser.add_argument("--method", help="run only this method, in this process, and print its row")
    parser.add_argument("--layers", type=int, help="number of blocks, fewer than the model has")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--interval", type=int, default=8, help="steps between subspaces")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.device == "cpu" and given.model == "llama-7b":
        given.model, given.layers, given.length, given.vocabulary = "llama-tiny", 2, 64, 500
    return given


def main() -> None:
    given = arguments()
    if given.method:
        print(json.dumps(one(given)))
        return
    record: dict[str, Any] = {
        "what": f"{given.model}, bfloat16, 1 x {given.length} tokens, checkpointing, rank {given.rank}, layer-wise updates",
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu (reduced: shows that it runs)",
        },
        "rows": [],
    }
    passed = [f"--{k}={v}" for k, v in vars(given).items() if k not in ("method", "methods", "out") and v is not None]
    for method in given.methods.split(","):
        if method not in METHODS:
            raise SystemExit(f"--methods: {method!r} is none of {', '.join(METHODS)}")
        command = [sys.executable, __file__, f"--method={method}", *passed]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
            row = {"method": method, "failure": reason[:300]}
        else:
            row = json.loads(done.stdout.strip().splitlines()[-1])
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
