"""Compressed models against dense ones: time and bytes, system by system.

    OMP_NUM_THREADS=1 python bench/compress.py [--only matryoshka-kv] [--quick] [--out results/bench-compress.json]

Each system has a function with the decorator `section`, which gives rows; with `--only` the sections of the others stay in the
file as they are. Compared runs alternate in one process, so that other load on the machine affects both; a ratio is the median
of the ratios within a round. Times are of the processor, which are those of the clock on an idle machine with one thread.
"""

from __future__ import annotations

import argparse
import copy
import functools
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

Rows = list[dict[str, Any]]
#: Name -> function of `quick`, and the goals: column -> largest wanted value (or smallest, where the name has "dense /").
SECTIONS: dict[str, tuple[Callable[[bool], Rows], dict[str, float]]] = {}


def section(name: str, **targets: float) -> Callable[[Callable[[bool], Rows]], Callable[[bool], Rows]]:
    """Register the measurements of one system, and its goals as `column=bound` (`_` stands for a space)."""

    def register(measure: Callable[[bool], Rows]) -> Callable[[bool], Rows]:
        SECTIONS[name] = measure, {column.replace("_", " "): bound for column, bound in targets.items()}
        return measure

    return register


def alternate(
    rounds: int, runs: dict[str, Callable[[], Any]], between: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Processor seconds of each run in each round, after one round of warm-up; what is done `between` rounds is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
        between()
    return seconds


def ratio(seconds: dict[str, list[float]], first: str, second: str) -> float:
    """Median of first / second within a round."""
    return round(statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True)), 3)


# MatryoshkaKV: one more token at 2048


def smollm2(layers: int) -> Any:
    """A Llama in the shape of SmolLM2-135M (9 query and 3 KV heads of 64), with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, rope_theta=1e5)).eval()


def fill(cache: Any, model: Any, batch: int, tokens: int) -> Any:
    """Random keys and values in every layer, in the place of a prompt."""
    config, draw = model.config, torch.Generator().manual_seed(0)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, generator=draw), torch.randn(shape, generator=draw), layer)
    return cache


def decoder(model: Any, cache: Any, batch: int, steps: int) -> Callable[[], None]:
    """Generates `steps` tokens."""
    token = torch.full((batch, 1), 5)

    def run() -> None:
        for _ in range(steps):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return run


@section("matryoshka-kv", **{"MatryoshkaCache_/_DynamicCache": 1.0})
@torch.no_grad()
def matryoshka_kv(quick: bool) -> Rows:
    """Decoding at 2048 cached tokens and half of the cache, against DynamicCache with torch's fused attention."""
    from transformers import DynamicCache

    from lowdim.compress import MatryoshkaCache, MatryoshkaKVConfig, set_kv_ranks
    from lowdim.compress import matryoshka_kv as project

    rows, tokens, layers = [], 256 if quick else 2048, 2 if quick else 30
    dense = smollm2(layers)
    model = copy.deepcopy(dense, {id(p): p for p in dense.parameters()})
    project(model, MatryoshkaKVConfig(key_ranks=32, value_ranks=32), [{"input_ids": torch.arange(64)[None]}])
    draw = torch.Generator().manual_seed(0)
    uneven = 16 * torch.randint(1, 4, (2, layers, 3), generator=draw)  # 16, 32 or 48 of 64 in each head
    for what, ranks in (("rank 32 of 64 in every head", (32, 32)), ("ranks 16, 32 or 48 by head", uneven)):
        set_kv_ranks(model, *ranks)
        for batch in (1, 8):
            steps, rounds = (4, 2) if quick else (16, 5) if batch == 1 else (8, 3)
            theirs = fill(DynamicCache(config=dense.config), dense, batch, tokens)
            ours = fill(MatryoshkaCache(model), model, batch, tokens)
            runs = {"DynamicCache": decoder(dense, theirs, batch, steps), "MatryoshkaCache": decoder(model, ours, batch, steps)}
            held = sum(t.nbytes for layer in theirs.layers for t in (layer.keys, layer.values)), ours.nbytes()

            def shorten(caches: tuple[Any, ...] = (theirs, ours), batch: int = batch, steps: int = steps) -> None:
                for cache in caches:
                    cache.crop(-steps)
                    cache.reorder_cache(torch.arange(batch))  # a copy without room for more tokens

            seconds = alternate(rounds, runs, shorten)
            row: dict[str, Any] = {"model": "SmolLM2-135M's shape, float32", "ranks": what, "batch": batch, "tokens": tokens}
            row["milliseconds a token"] = {name: round(1e3 * statistics.median(s) / steps, 1) for name, s in seconds.items()}
            row["bytes / dense"] = round(held[1] / held[0], 3)
            row["MatryoshkaCache / DynamicCache"] = ratio(seconds, "MatryoshkaCache", "DynamicCache")
            rows.append(row)
    return rows


# PELA: a step of the stage


@section("pela", **{"stage_/_distillation": 1.3})
def pela_stage(quick: bool) -> Rows:
    """A training step of `L_feat + L_pert`, and of the task with it, against one of distilling the logits."""
    from lowdim.compress import PELAConfig, PELAObjective, pela

    teacher = smollm2(1 if quick else 4)
    student = pela(copy.deepcopy(teacher), PELAConfig())
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-6)
    batch = {"input_ids": torch.randint(3, 49000, (2, 128), generator=torch.Generator().manual_seed(0))}

    def own(logits: torch.Tensor) -> torch.Tensor:
        return student.loss_function(logits=logits, labels=batch["input_ids"], vocab_size=logits.shape[-1])

    def stepper(config: PELAConfig, task: Any = None) -> Callable[[], None]:
        objective = PELAObjective(teacher, student, config)

        def step() -> None:
            objective(batch, task).total.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    logits = stepper(PELAConfig(feature_weight=0.0, perturbation_weight=0.0, logit_weight=1.0), own)
    runs = {"distillation": logits, "stage": stepper(PELAConfig(logit_weight=1.0), own)}
    seconds = alternate(2 if quick else 5, runs)
    row: dict[str, Any] = {"model": "SmolLM2-135M's shape, 4 layers, float32", "tokens": batch["input_ids"].numel()}
    row["milliseconds a step"] = {name: round(1e3 * statistics.median(s)) for name, s in seconds.items()}
    row["stage / distillation"] = ratio(seconds, "stage", "distillation")
    return [row]


# LR²VQ: quantizing a layer, and using it


@section("lr2vq", seconds_to_quantize=20.0)
@torch.no_grad()
def lr2vq_layer(quick: bool) -> Rows:
    """One square layer at m 8, k 256, d 4: quantizing it, and its product with the weight kept, or decoded at each call."""
    from torch import nn

    from lowdim.compress import LR2VQLinear

    torch.manual_seed(0)
    side = 512 if quick else 4096
    dense, rows = nn.Linear(side, side), []
    for dim in (4, 8):
        start = time.process_time()
        layer = LR2VQLinear.from_linear(dense, codebook_size=256, subvector_size=8, clustering_dim=dim).eval()
        seconds = round(time.process_time() - start, 1)
        for tokens in (1, 128):
            x = torch.randn(tokens, side)

            def decoded(layer: Any = layer, x: torch.Tensor = x) -> torch.Tensor:
                return nn.functional.linear(x, layer.dense_weight(), layer.bias)

            runs = {"dense": lambda x=x: dense(x), "cached": lambda x=x, layer=layer: layer(x), "decoded": decoded}
            times = alternate(3 if quick else 11, runs)
            row: dict[str, Any] = {"layer": f"{side} x {side}, m 8, k 256, d {dim}", "tokens": tokens}
            row["seconds to quantize"] = seconds
            row["bytes / dense"] = round(layer.compressed_bytes() / (4 * side * side), 4)
            row["milliseconds"] = {name: round(1e3 * statistics.median(s), 2) for name, s in times.items()}
            row["cached / dense"], row["decoded / dense"] = (ratio(times, name, "dense") for name in ("cached", "decoded"))
            rows.append(row)
    return rows


# WINA: one token through a layer, and through the MLPs of a model


@section("wina", **{"dense_/_sparse": 2.0, "dense_/_sparse,_MLPs": 1.5})
@torch.no_grad()
def wina_decode(quick: bool) -> Rows:
    """One token at half of the inputs: a square layer in float32, equal to the masked product; and a model's MLPs.

    The least possible is measured too: half of the dense weight, in one piece, as if the chosen inputs came first.
    """
    from torch import nn

    from lowdim.compress import WINAConfig, WINALinear, wina

    class FirstHalf(nn.Module):
        """A layer that uses the first half of its inputs."""

        def __init__(self, layer: Any):
            super().__init__()
            self.count = layer.in_features // 2
            self.weight = nn.Parameter(layer.weight[:, : self.count].contiguous())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x[..., : self.count], self.weight)

    torch.manual_seed(0)
    side = 512 if quick else 4096
    dense = nn.Linear(side, side, bias=False).eval()
    sparse = WINALinear.from_linear(dense, 0.5).eval()
    x = torch.randn(1, side)
    masked = nn.functional.linear(x * sparse.mask(x), dense.weight)
    calls, rounds = (5, 3) if quick else (20, 11)

    def often(layer: Any, given: torch.Tensor = x) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                layer(given)

        return run

    seconds = alternate(rounds, {"dense": often(dense), "sparse": often(sparse)})
    least = alternate(rounds, {"dense": often(dense), "first half": often(FirstHalf(dense))})
    row: dict[str, Any] = {"what": f"{side} x {side}, one token, half of its inputs"}
    row["milliseconds"] = _each(seconds | {"first half": least["first half"]}, calls)
    row["dense / sparse"], row["dense / first half"] = ratio(seconds, "dense", "sparse"), ratio(least, "dense", "first half")
    row["largest difference to the masked product"] = float((sparse(x) - masked).abs().max() / masked.abs().max())
    rows = [row]
    model = smollm2(1 if quick else 4)
    names = ["gate_proj", "up_proj", "down_proj"]
    thin = wina(copy.deepcopy(model), WINAConfig(sparsity=0.5, target_modules=names))
    halves = copy.deepcopy(model)
    for layer in halves.model.layers:
        for name in names:
            setattr(layer.mlp, name, FirstHalf(getattr(layer.mlp, name)))
    state = torch.randn(1, 1, 576)

    def decode(of: Any) -> Callable[[], None]:
        mlps = [layer.mlp for layer in of.model.layers]

        def run() -> None:
            for _ in range(calls):
                for mlp in mlps:
                    mlp(state)

        return run

    seconds = alternate(rounds, {"dense": decode(model), "sparse": decode(thin.eval())})
    least = alternate(rounds, {"dense": decode(model), "first half": decode(halves)})
    row = {"what": f"the MLPs of {len(model.model.layers)} blocks in SmolLM2's shape, one token, half of their inputs"}
    row["milliseconds"] = _each(seconds | {"first half": least["first half"]}, calls)
    row["dense / sparse, MLPs"] = ratio(seconds, "dense", "sparse")
    row["dense / first half, MLPs"] = ratio(least, "dense", "first half")
    return [*rows, row]


def _each(seconds: dict[str, list[float]], calls: int) -> dict[str, float]:
    return {name: round(1e3 * statistics.median(s) / calls, 3) for name, s in seconds.items()}


# LoRD: compressing a model of SmolLM2's size


@section("lord", **{"peak_/_model": 1.3, "processor_seconds": 360.0})
def lord_whole(quick: bool) -> Rows:
    """SmolLM2-135M's shape at 0.7 of its layers' parameters, in a process of its own: time, and memory."""
    code = (
        "import json, os, resource, sys, time, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from compress import smollm2\nfrom lowdim.compress import LoRDConfig, lord\n"
        "from transformers import LlamaForCausalLM\n"
        "layers, rows = map(int, sys.argv[1:])\n"
        "held = int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "model = smollm2(layers)\nsize = sum(p.numel() * p.element_size() for p in model.parameters())\n"
        "draw = torch.Generator().manual_seed(0)\n"
        "batches = [{'input_ids': torch.randint(3, 49000, (2, 128), generator=draw)} for _ in range(rows)]\n"
        "start = time.process_time()\n"
        "lord(model, LoRDConfig(param_ratio=0.7), batches)\n"
        "seconds = round(time.process_time() - start, 1)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held\n"
        "print(json.dumps({'processor seconds': seconds, 'peak bytes': peak, 'model bytes': size}))\n"
    )
    layers, batches = (2, 2) if quick else (30, 16)
    sizes = [str(layers), str(batches)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *sizes], capture_output=True, text=True, check=True)
    row: dict[str, Any] = {"model": f"SmolLM2-135M's shape, {layers} layers", "tokens": batches * 256}
    row |= json.loads(done.stdout.splitlines()[-1])
    row["peak / model"] = round(row["peak bytes"] / row["model bytes"], 3)
    return [row]


# Loading a compressed folder


@section("loading", **{"compressed_/_dense": 1.2})
def loading(quick: bool) -> Rows:
    """`from_pretrained` of a compressed folder, with its checksums, against the dense one, until every weight is read.

    transformers maps files into memory, so that a dense model is there at once and is read from the disk when it is used.
    The least possible is measured too: what transformers needs for the dense model, as if there were neither more modules nor
    more tensors, and the compressed file read twice, for the checksums and when it is used.
    """
    import mmap
    import tempfile

    import xxhash
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from lowdim.compress import PELAConfig, pela
    from lowdim.pretrained import save_compressed

    load = AutoModelForCausalLM.from_pretrained

    def used(path: str) -> None:
        for tensor in load(path).parameters():
            tensor.detach().sum()

    def summed(path: str) -> None:
        for tensor in load_file(f"{path}/model.safetensors").values():
            tensor.sum()

    def hashed(path: str) -> None:
        with Path(f"{path}/model.safetensors").open("rb") as stream:
            xxhash.xxh3_64_digest(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))

    rows = []
    with tempfile.TemporaryDirectory() as place:
        model = smollm2(2 if quick else 12)
        model.save_pretrained(f"{place}/dense")
        for ratio_of in (2.0, 1.25):
            small = pela(copy.deepcopy(model), PELAConfig(compression_ratio=ratio_of))
            size = save_compressed(small, f"{place}/small")
            folders = {"compressed": f"{place}/small", "dense": f"{place}/dense"}
            runs = {name: functools.partial(used, path) for name, path in folders.items()}
            seconds = alternate(2 if quick else 5, runs)
            parts: dict[str, Callable[[], Any]] = {
                "dense, not read": functools.partial(load, f"{place}/dense"),
                "checksum": functools.partial(hashed, f"{place}/small"),
                "read": functools.partial(summed, f"{place}/small"),
            }
            apart = alternate(2 if quick else 5, {"dense": runs["dense"], **parts})
            row: dict[str, Any] = {"model": f"SmolLM2-135M's shape, {len(model.model.layers)} layers, PELA at {ratio_of:g}"}
            row |= {"mebibytes": round(size / 2**20, 1), "milliseconds": _each(apart | seconds, 1)}
            row["compressed / dense"] = ratio(seconds, "compressed", "dense")
            apart["least"] = [sum(times) for times in zip(*(apart[name] for name in parts), strict=True)]
            row["least possible / dense"] = ratio(apart, "least", "dense")
            rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    import transformers

    from lowdim.train.environment import processor

    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "cpu": processor(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(SECTIONS), action="append")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    old = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
    found = old.get("systems", {})
    for name in arguments.only or SECTIONS:
        measure, targets = SECTIONS[name]
        print(f"== {name}")
        rows = measure(arguments.quick)
        for row in rows:
            print(json.dumps(row))
            for column, bound in targets.items():
                if column in row:
                    met = row[column] >= bound if column.startswith("dense /") else row[column] <= bound
                    print(f"  {column} {row[column]}, goal {bound}: {'met' if met else 'missed'}")
        found[name] = {"rows": rows, "targets": targets, "environment": environment()}
    if arguments.out:
        record = {"systems": dict(sorted(found.items())), "environment": environment()}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
