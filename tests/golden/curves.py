"""Short runs of every way to train, as `lowdim run` makes them: the scores, each step's loss, and the size of the weights."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import tiny
from golden import bases
from lowdim.catalogue import variant, variants

FOLDER = bases.FILES / "curves"
MODELS = bases.FILES / "models"
STEPS = 8

#: Rows whose own hyperparameters do not fit the small model, or whose schedules would not act within eight steps.
OPTIONS: dict[str, dict[str, Any]] = {
    "block-lora": {"rank": 4},
    "corda": {"rank": 4},
    "dct": {"rank": 4, "update_interval": 2},
    "fira": {"rank": 4, "update_interval": 3},
    "flora": {"ranks": 4},
    "galore": {"rank": 4, "update_interval": 3},
    "galore-8bit": {"rank": 4, "update_interval": 3, "inner_options": {"min_size": 64}},
    "increlora": {"rank": 2, "target_rank": 3, "rank_step": 1, "init_warmup": 1, "update_interval": 2},
    "lamda": {"rank": 4, "freeze_fraction": 1.0},
    "lamda++": {"rank": 4, "rank_choices": (2, 4, 6)},
    "loldu": {"rank": 6, "alpha": 6},
    "lora": {"rank": 4},
    "lora-sb": {"rank": 4},
    "lora-xs": {"rank": 4, "alpha": 4},
    "low-rank": {"rank": 4},
    "low-rank-restart": {"rank": 4, "interval": 3, "recovery_steps": 1},
    "maestro": {"shrink_interval": 3},
    "monarch": {"nblocks": 2},
    "nola": {"rank": 4, "num_bases": 8, "alpha": 4},
    "q-galore": {"rank": 4, "update_interval": 3, "min_8bit_size": 64},
    "randlora": {"rank": 4},
    "said": {"dimension": 60},
    "sara": {"threshold": 0.02, "progressive_iter": 4},
    "s2ft": {"ratio": 0.2},
    "sltrain": {"rank": 4, "alpha": 4.0, "density": 0.1},
    "sora": {"rank": 4, "sparse_lambda": 0.5, "threshold": 1e-3},
    "sst": {"rank": 4, "steps_per_iteration": 2, "warmup": 1},
}
#: Further runs: a method trained in another way.
OTHERS: dict[str, dict[str, Any]] = {
    "full-recomputed": {"method": "full", "gradient_checkpointing": True},
    "full-bfloat16": {"method": "full", "bf16": True},
    "galore-layerwise": {"method": "galore", "layerwise": True},
    "lora-accumulated": {"method": "lora", "gradient_accumulation": 2},
    "q-galore-layerwise": {"method": "q-galore", "layerwise": True, "gradient_accumulation": 2},
    "sora-accumulated": {"method": "sora", "gradient_accumulation": 2},
}
#: Ways to train that also start from random weights.
SCRATCH = (
    "block-dense", "block-shuffle", "dct", "fira", "full", "galore", "galore-8bit", "low-rank", "low-rank-restart", "maestro",
    "monarch", "q-galore", "self-guided", "sltrain", "sst",
)  # fmt: skip


def cases() -> dict[str, dict[str, Any]]:
    """Run name -> what its recipe says beyond the common."""
    tuned = {name: {"method": name} for name in variants()}
    scratch = {f"{name}-from-scratch": {"method": name, "task": "pretrain", "eval_steps": 4} for name in SCRATCH}
    return {**tuned, **scratch, **OTHERS}


def write_models() -> None:
    """Two Llamas that read characters, a BERT that reads words, and texts for all; what is there stays."""
    rows = tiny.sentences(40)
    MODELS.mkdir(parents=True, exist_ok=True)
    text = "\n".join(text for text, _ in rows) + "\n"
    if not (MODELS / "text.txt").exists():
        tiny.write_jsonl(MODELS / "sentences.jsonl", rows)
        (MODELS / "text.txt").write_text(text, encoding="utf-8")
    wide = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    narrow = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, layers, sizes in (("llama", 2, wide), ("small", 1, narrow)):
        if not (MODELS / name).exists():
            _write_llama(MODELS / name, text, num_hidden_layers=layers, **sizes)
    if not (MODELS / "bert").exists():
        tiny.save_bert(MODELS / "bert", hidden_size=16, intermediate_size=24, num_attention_heads=2)


def _write_llama(folder: Path, text: str, **sizes: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowdim.train.tokenizers import character_tokenizer

    tokenizer = character_tokenizer(text)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder with the models and texts in it, as the current one: records then hold relative paths only."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        for path in MODELS.iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(place) / path.name)
        os.chdir(place)
        try:
            yield Path(place)
        finally:
            os.chdir(before)


def run(changes: dict[str, Any], out: str, *, resume: bool = False) -> dict[str, Any]:
    """One run in the current folder, which is a `workplace()`; returns the record."""
    from lowdim.train.recipes import Recipe
    from lowdim.train.run import run_recipe

    method = changes["method"]
    words = method == "linear-probe"  # needs a head
    common: dict[str, Any] = {
        "task": "classify" if words else "causal-lm",
        "model": "bert" if words else "llama",
        "data": "sentences.jsonl" if words else "text.txt",
        "metric": None if words else "loss",
        "options": OPTIONS.get(method, {}),
        # Eight steps at the rates of real trainings would hardly move a weight.
        "lr": None if changes.get("task") == "pretrain" else min(10 * variant(method).rates[0], 3e-2),
        "max_length": 12,
        "batch_size": 4,
        "steps": STEPS,
        "seed": 3,
    }
    return run_recipe(Recipe(**{**common, **changes, "out": out}), resume=resume)


def curve(name: str) -> dict[str, Any]:
    """What a run gives, as numbers."""
    with workplace() as place:
        return numbers_of(run(cases()[name], "out"), place / "out")


def numbers_of(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The numbers in a run's record, and the size of the weights in its folder."""
    weights = [tensor for file in sorted(folder.glob("*/*.safetensors")) for tensor in load_file(file).values()]
    numbers = torch.cat([tensor.double().flatten() for tensor in weights])
    kept = ("trained_parameters", "before", "losses", "evaluations", "validation", "test")
    return {
        **{key: record[key] for key in kept},
        "weights": {"count": len(numbers), "l1": float(numbers.abs().sum()), "l2": math.sqrt(float(numbers.square().sum()))},
        "environment": {
            **{key: record["environment"][key] for key in ("torch", "transformers", "cpu", "cores")},
            "instructions": torch.backends.cpu.get_cpu_capability(),  # one processor's name serves several generations
        },
    }


def write(name: str) -> None:
    """Run and store."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    place(name).write_text(json.dumps(curve(name), indent=1) + "\n", encoding="utf-8")


def place(name: str) -> Path:
    """Where a curve is stored."""
    return FOLDER / f"{name}.json"
