"""Golden adapters: a folder of `Adapted.save` for each method and each way to use it, and what it must answer.

`expected.safetensors` next to the adapter holds `y`, the output in evaluation mode; `merged`, that of the merged model;
`losses`, those of three further training steps, which depend on the schedules that were saved; and `later`, the output after
them.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowdim
from golden import bases
from lowdim import adapters

FOLDER = bases.FILES / "adapters"
BEFORE, AFTER, RATE = 5, 3, 0.02


@dataclass(frozen=True)
class Case:
    """One golden adapter.

    Attributes:
        method: of the base model.
        base: its kind, see `bases.KINDS`.
        shrinks: whether it is the method's own smaller copy of the base that is adapted (LoRAM).
        ready: what is done between attaching and training (DiffoRA searches).
        merges: whether the method can be merged.
    """

    method: Callable[[nn.Module], Any]
    base: str = "blocks"
    shrinks: bool = False
    ready: Callable[[Any, tuple[Tensor, Tensor]], None] | None = None
    merges: bool = True


def train(adapted: Any, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """AdamW from an empty state; the loss of each step."""
    optimizer = torch.optim.AdamW(adapted.param_groups(RATE), weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = bases.loss_of(adapted.model, batch) + adapted.regularizer()
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
        losses.append(float(loss.detach()))
    return losses


def write(name: str) -> None:
    """Attach, train and save one adapter with the code as it stands."""
    case = CASES[name]
    model, batch = bases.read(case.base)
    method = case.method(model)
    subject = method.shrink(model) if case.shrinks else model
    adapted = lowdim.adapt(subject, method, batches=[batch] * 2, loss_fn=bases.loss_of, seed=7)
    if case.ready is not None:
        case.ready(adapted, batch)
    train(adapted, batch, BEFORE)
    adapted.save(FOLDER / name)
    save_file(answers(adapted, batch, case.merges), FOLDER / name / "expected.safetensors")


def answers(adapted: Any, batch: tuple[Tensor, Tensor], merges: bool) -> dict[str, Tensor]:
    """What is stored of an adapter, and computed again by the test. Trains it further."""
    x = batch[0]
    found = {"y": bases.output(adapted.model, x)}
    if merges:
        found["merged"] = bases.output(copy.deepcopy(adapted).merge(), x)
    found["losses"] = torch.tensor(train(adapted, batch, AFTER), dtype=torch.float64)
    found["later"] = bases.output(adapted.model, x)
    return found


def load(name: str) -> tuple[Any, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The stored adapter on its base, the base's batch, and what the adapter must answer."""
    case = CASES[name]
    model, batch = bases.read(case.base)
    subject = case.method(model).shrink(model) if case.shrinks else model
    adapted = lowdim.load_adapter(subject, FOLDER / name)
    return adapted, batch, load_file(FOLDER / name / "expected.safetensors")


def of(cls: type, **fields: Any) -> Callable[[nn.Module], Any]:
    """The method with these fields, whatever the model."""
    return lambda model: cls(**fields)


EVERY = ["q", "v", "up", "down"]
SOME = ["layer.0.q", "layer.1.v", "layer.1.down"]


def _vectors(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        {name: 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype) for name, p in model.named_parameters()}
        for _ in range(count)
    ]


def _task_vector_files(model: nn.Module) -> Any:
    """aTLAS over files: their names are relative, and the files travel with the adapter."""
    folder = FOLDER / "atlas-files"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"task{index}.safetensors" for index in range(2)]
    for name, vector in zip(names, _vectors(model), strict=True):
        if not (folder / name).exists():
            save_file({key: value for key, value in vector.items() if key.endswith("q.weight")}, folder / name)
    with _inside(folder):
        return adapters.ATLAS(names)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _channels(model: nn.Module) -> Any:
    groups = [adapters.ChannelGroup([f"layer.{i}.up"], [f"layer.{i}.down"], [0, 2, 3, 5, 7, 10]) for i in range(2)]
    return adapters.LoRAM(rank=2, dropout=0.0, groups=groups, target_modules=["up", "down"])


def _masks(model: nn.Module) -> Any:
    masks = {name: model.get_submodule(name).weight.abs() > 0.15 for name in SOME}
    return adapters.LoRAM(rank=2, dropout=0.0, masks=masks, target_modules=SOME)


def _search(adapted: Any, batch: tuple[Tensor, Tensor]) -> None:
    adapted.before_training([batch, batch], bases.loss_of, RATE, 15)


A = adapters
#: Methods that take convolutions, with the fields that they have there.
CONVOLUTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "allora": (A.ALLoRA, {"rank": 2}),
    "block-lora": (A.BlockLoRA, {"rank": 4, "blocks": 2, "dropout": 0.0}),
    "corda": (A.CorDA, {"rank": 2}),
    "flora": (A.FLoRA, {"ranks": 2, "dropout": 0.0}),
    "lamda": (A.LaMDA, {"rank": 3, "total_steps": 8}),
    "loldu": (A.LoLDU, {"rank": 3}),
    "lora": (A.LoRA, {"rank": 2}),
    "lora-sb": (A.LoRASB, {"rank": 3, "lr": 1e-2}),
    "lora-xs": (A.LoRAXS, {"rank": 3}),
    "nola": (A.NOLA, {"rank": 2, "num_bases": 6}),
    "randlora": (A.RandLoRA, {"rank": 3}),
    "sara": (A.SaRA, {"threshold": 0.05}),
    "sora": (A.SoRA, {"rank": 3}),
    "svfit": (A.SVFit, {"rank": 3}),
}
CASES: dict[str, Case] = {
    "allora": Case(of(A.ALLoRA, rank=2)),
    "allora-step": Case(of(A.ALLoRA, rank=2, apply_to="step", target_modules=SOME)),
    "atlas": Case(lambda m: A.ATLAS(_vectors(m, 1))),
    "atlas-files": Case(_task_vector_files),
    "atlas-global": Case(lambda m: A.ATLAS(_vectors(m), blockwise=False)),
    "atlas-linearized": Case(lambda m: A.ATLAS(_vectors(m, 1), linearized=True), merges=False),
    "atlas-partition": Case(lambda m: A.ATLAS(_vectors(m, 1), partition=2)),
    "block-lora": Case(of(A.BlockLoRA, rank=4, blocks=2, dropout=0.0)),
    "corda": Case(of(A.CorDA, rank=2, target_modules=EVERY)),
    "corda-knowledge": Case(of(A.CorDA, rank=2, mode="knowledge", target_modules=SOME)),
    "did": Case(of(A.SAID, dimension=20, structure_aware=False)),
    "diffora": Case(of(A.DiffoRA, rank=2, target_modules=["q", "v"]), ready=_search),
    "diffora-alone": Case(of(A.DiffoRA, rank=2, target_modules=EVERY, share=False, select_ratio=0.3), ready=_search),
    "diffora-searching": Case(of(A.DiffoRA, rank=2, target_modules=["q", "v"]), merges=False),
    "flora": Case(of(A.FLoRA, ranks=2, dropout=0.0)),
    "flora-conv1d": Case(of(A.FLoRA, ranks=2, dropout=0.0), base="conv1d"),
    "flora-conv3d": Case(of(A.FLoRA, ranks=2, dropout=0.0), base="conv3d"),
    "increlora": Case(
        of(A.IncreLoRA, rank=1, target_rank=3, rank_step=1, init_warmup=1, update_interval=2, target_modules=EVERY)
    ),
    "increlora-done": Case(of(A.IncreLoRA, rank=1, target_rank=2, init_warmup=0, update_interval=1, target_modules=SOME)),
    "lamda": Case(of(A.LaMDA, rank=3, total_steps=20, freeze_fraction=1.0)),
    "lamda-random": Case(
        of(A.LaMDA, rank=3, alpha=6, init="random", freeze_schedule="code", total_steps=20, target_modules=SOME)
    ),
    "lamda++": Case(of(A.LaMDA, rank=3, rank_choices=(2, 3, 4), target_modules=EVERY)),
    "loldu": Case(of(A.LoLDU, rank=3)),
    "loldu-scale": Case(of(A.LoLDU, rank=4, init="normal", train_scale=True, target_modules=SOME)),
    "lora": Case(of(A.LoRA, rank=2, alpha=5)),
    "lora-stabilized": Case(of(A.LoRA, rank=4, rank_stabilized=True, target_modules=SOME)),
    "lora-embedding": Case(of(A.LoRA, rank=2, target_modules=["embedding"]), base="words"),
    "lora-sb": Case(of(A.LoRASB, rank=3, lr=1e-2, target_modules=EVERY)),
    "lora-sb-gradient": Case(of(A.LoRASB, rank=3, lr=1e-2, sign=False, target_modules=SOME)),
    "lora-xs": Case(of(A.LoRAXS, rank=3)),
    "loram": Case(of(A.LoRAM, rank=2, dropout=0.0, ratio=0.5)),
    "loram-channels": Case(_channels, shrinks=True),
    "loram-masks": Case(_masks, shrinks=True),
    "nola": Case(of(A.NOLA, rank=2, num_bases=6)),
    "randlora": Case(of(A.RandLoRA, rank=3)),
    "randlora-sparse": Case(of(A.RandLoRA, rank=3, base="sparse", target_modules=SOME)),
    "randlora-very-sparse": Case(of(A.RandLoRA, rank=3, base="very_sparse", sqrt_scaling=False, target_modules=SOME)),
    "s2ft": Case(of(A.S2FT, ratio=0.3)),
    "s2ft-rows": Case(of(A.S2FT, ratio=0.3, axis="out", selection="weight", block=2, target_modules=["up", "down"])),
    "s2ft-gradient": Case(of(A.S2FT, ratio=0.3, selection="gradient", largest=True, target_modules=SOME)),
    "said": Case(of(A.SAID, dimension=40)),
    "said-some": Case(of(A.SAID, dimension=12, parameters=["q.weight", "v.weight"])),
    "sara": Case(of(A.SaRA, threshold=0.05)),
    "sara-progressive": Case(
        of(A.SaRA, threshold=0.1, progressive_iter=6, lambda_rank=1e-2, nuclear_min_dim=4, nuclear_min_count=2)
    ),
    "sora": Case(of(A.SoRA, rank=3, sparse_lambda=0.5, threshold=0.2)),
    "sora-schedule": Case(
        of(A.SoRA, rank=3, proximal="soft", schedule="linear", max_threshold=0.1, num_thresholds=4, schedule_interval=2)
    ),
    "sora-embedding": Case(of(A.SoRA, rank=2, target_modules=["embedding"]), base="words"),
    "svfit": Case(of(A.SVFit)),
    "svfit-rank": Case(of(A.SVFit, rank=3, target_modules=SOME)),
    **{f"{name}-conv2d": Case(of(cls, **fields), base="conv2d") for name, (cls, fields) in CONVOLUTIONS.items()},
    "diffora-conv2d": Case(of(A.DiffoRA, rank=2, target_modules=["first", "second"]), base="conv2d", ready=_search),
}
