"""Golden structured layers: the state dict of a model with them after some training, and what it must answer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden import bases
from lowdim import layers

FOLDER = bases.FILES / "layers"
STEPS = 5


@dataclass(frozen=True)
class Case:
    """One golden model.

    Attributes:
        swap: puts the layers into the base.
        base: its kind, see `bases.KINDS`.
        shrinks: whether components are pruned after the training.
    """

    swap: Callable[[nn.Module], nn.Module]
    base: str = "three"
    shrinks: bool = False


def of(cls: type, targets: Any = ("first", "second"), **options: Any) -> Callable[[nn.Module], nn.Module]:
    """Swap these layers."""
    return lambda model: layers.swap_linear(model, cls, list(targets), **options)


def _lorentz(model: nn.Module) -> nn.Module:
    model.second = layers.LorentzLinear(model.second)
    return model


CASES: dict[str, Case] = {
    "lorentz": Case(_lorentz),
    "low-rank": Case(of(layers.LowRankLinear, rank=3)),
    "low-rank-scaled": Case(of(layers.LowRankLinear, rank=3, alpha=6.0)),
    "maestro": Case(layers.maestro_decompose),
    "maestro-conv2d": Case(layers.maestro_decompose, base="conv2d"),
    "maestro-shrunk": Case(layers.maestro_decompose, shrinks=True),
    "monarch": Case(of(layers.Monarch, nblocks=2)),
    "sltrain": Case(of(layers.SLTrainLinear, rank=2, density=0.1)),
    "sst": Case(of(layers.SSTLinear, rank=3)),
}


def begin(name: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The base with the layers in it, and the batch."""
    model, batch = bases.read(CASES[name].base)
    return CASES[name].swap(model), batch


def write(name: str) -> None:
    """Train and store with the code as it stands."""
    model, batch = begin(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        bases.loss_of(model, batch).backward()
        optimizer.step()
    if CASES[name].shrinks:
        for layer in model.modules():
            if isinstance(layer, layers.MaestroLinear):
                layer.shrink(0.6, prune=True)
    FOLDER.joinpath(name).mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), FOLDER / name / "state.pt")
    save_file(answers(model, batch), FOLDER / name / "expected.safetensors")


def answers(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The output, that of the dense model, and the gradients."""
    model.zero_grad()
    bases.loss_of(model, batch).backward()
    grads = {
        f"grad.{name}": p.grad.clone(memory_format=torch.contiguous_format)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    dense = layers.densify(copy.deepcopy(model))
    return {"y": bases.output(model, batch[0]), "dense": bases.output(dense, batch[0]), **grads}


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the stored model answers now, and what it must answer."""
    model, batch = begin(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(torch.load(FOLDER / name / "state.pt", weights_only=True))
    return answers(model, batch), load_file(FOLDER / name / "expected.safetensors")
