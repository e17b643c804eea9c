"""Golden optimizer states: a model and its optimizer partway, as a checkpoint holds them, and what further steps give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden import bases
from lowdim import optim

FOLDER = bases.FILES / "optimizers"
BEFORE, AFTER = 5, 4


@dataclass(frozen=True)
class Case:
    """One golden state.

    Attributes:
        build: the optimizer of the groups.
        base: the model's kind, see `bases.KINDS`.
        prepare: turns its weights into those of another kind.
        dtype: of the model.
    """

    build: Callable[[Any], torch.optim.Optimizer]
    base: str = "three"
    prepare: Callable[[nn.Module], nn.Module] | None = None
    dtype: torch.dtype = torch.float64


def of(cls: type, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """The optimizer with these options and quick schedules."""
    return lambda groups: cls(groups, **{"lr": 0.02, "update_interval": 3, **options})


def _int8(model: nn.Module) -> nn.Module:
    return optim.quantize_linears(model, ["first", "second"], group_size=24)


CASES: dict[str, Case] = {
    "dct": Case(of(optim.DCTAdamW, update_interval=2)),
    "dct-feedback": Case(of(optim.DCTAdamW, error_feedback=True)),
    "dct-feedback-8bit": Case(of(optim.DCTAdamW, error_feedback=8, rotate=False), dtype=torch.float32),
    "dct-fira": Case(of(optim.DCTAdamW, residual="norm_scaled", weight_decay=0.05)),
    "fira": Case(of(optim.Fira, weight_decay=0.05)),
    "galore": Case(of(optim.GaLore, weight_decay=0.05)),
    "galore-16bit": Case(of(optim.GaLore, inner="adamw16bit"), dtype=torch.float32),
    "galore-8bit": Case(of(optim.GaLore, inner="adamw8bit", inner_options={"min_size": 8}), dtype=torch.float32),
    "galore-adafactor": Case(of(optim.GaLore, inner="adafactor", inner_options={"beta1": 0.9})),
    "galore-tucker": Case(of(optim.GaLore), base="conv2d"),
    "q-galore": Case(of(optim.QGaLore, min_8bit_size=16), prepare=_int8, dtype=torch.float32),
    "q-galore-plain": Case(of(optim.QGaLore, inner="adamw", projector_group_size=12)),
}


def begin(name: str) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    """A model from its stored base, a fresh optimizer and the batch."""
    case = CASES[name]
    model, (x, target) = bases.read(case.base)
    model = model.to(case.dtype)
    if case.prepare is not None:
        model = case.prepare(model)
    if case.base == "conv2d":
        kernels = [p for p in model.parameters() if p.ndim == 4]
        others = [p for p in model.parameters() if p.ndim != 4]
        groups: Any = [{"params": kernels, "rank": (3, 2, 2, 2)}, {"params": others, "rank": None}]
    else:
        groups = optim.param_groups(model, rank=3)
    return model, case.build(groups), (x.to(case.dtype), target.to(case.dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """The loss of each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = bases.loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def write(name: str) -> None:
    """Train and store with the code as it stands."""
    model, optimizer, batch = begin(name)
    train(model, optimizer, batch, BEFORE)
    FOLDER.joinpath(name).mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(copy.deepcopy(state), FOLDER / name / "state.pt")
    save_file(answers(model, optimizer, batch), FOLDER / name / "expected.safetensors")


def answers(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The losses of further steps, and the weights after them."""
    losses = train(model, optimizer, batch, AFTER)
    return {"losses": losses, **{key: value.detach().clone() for key, value in model.state_dict().items()}}


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the stored state gives now, and what it must give."""
    model, optimizer, batch = begin(name)
    state = torch.load(FOLDER / name / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return answers(model, optimizer, batch), load_file(FOLDER / name / "expected.safetensors")
