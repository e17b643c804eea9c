"""Sharded training equals training in one process: tests of every optimizer and layer under FSDP2.

    SHARDED = {"mine": Subject(net=uneven_net, optimizer=lambda net: Mine(param_groups(net, rank=3), lr=0.05))}

    @pytest.mark.slow
    def test_two_processes_equal_one():
        check_sharded(SHARDED["mine"])

The functions must be importable by name in a fresh interpreter, so they are at the top level of a test module; a lambda in
a top-level dictionary is found through that module.
"""

from __future__ import annotations

import copy
import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.linalg import gather, stream
from lowdim.testing.processes import in_processes

__all__ = ["Subject", "check_sharded", "sharded_numbers", "uneven_net"]

STEPS = 10
HALF = 6  # where a checkpoint is taken


@dataclass(frozen=True)
class Subject:
    """The network to train, and how.

    Attributes:
        net: builds the network in float64, with the same numbers each time; takes rows of `features` numbers. Each of its
            direct children that has parameters is sharded on its own, then the whole.
        optimizer: `net -> optimizer`; a refresh should fall within ten steps.
        companion: `(net, optimizer) -> lowdim.companion.Companion`; it should act within ten steps.
        how: `"fsdp"` (FSDP2), `"ddp"`, or `"replicas"`: the same parameters in each process, and the optimizer averages.
        features: entries of an input row.
        tolerance: allowed difference, relative to how far the weights moved.
    """

    net: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    companion: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None
    how: str = "fsdp"
    features: int = 7
    tolerance: float = 1e-10


class _Training:
    """A network under training, in one process or as one of several."""

    def __init__(self, subject: Subject, rank: int = 0, world: int = 1, mesh: Any = None):
        self.subject, self.rank, self.world = subject, rank, world
        self.net = self.forward = subject.net()
        if mesh is not None and subject.how == "ddp":
            self.forward = nn.parallel.DistributedDataParallel(self.net)
        elif mesh is not None and subject.how == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for child in self.net.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        self.optimizer: Any = subject.optimizer(self.net)
        if hasattr(self.optimizer, "replicas") and (mesh is None or subject.how == "replicas"):
            self.optimizer.replicas = mesh is not None
        self.companion = None if subject.companion is None else subject.companion(self.net, self.optimizer)

    def run(self, steps: range) -> None:
        """Each process sees its share of every batch."""
        for step in steps:
            x = torch.randn(8, self.subject.features, generator=stream(0, "sharded", step), dtype=torch.float64)
            part = x.chunk(self.world)[self.rank]
            (self.forward(part) - part.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.companion is not None:
                self.companion.step(self.optimizer)

    def weights(self) -> dict[str, Any]:
        """Every tensor of the model, whole."""
        with torch.no_grad():
            return {name: gather(value).detach().clone().numpy() for name, value in self._tensors()}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in self.net.state_dict().items() if isinstance(value, Tensor)]

    def save(self) -> dict[str, Any]:
        """Model, optimizer and companion, whole, as a trainer writes them."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        model, optimizer = get_state_dict(
            self.net, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        acting = None if self.companion is None else self.companion.state_dict()
        return copy.deepcopy({"model": model, "optimizer": optimizer, "companion": acting})

    def load(self, saved: dict[str, Any]) -> None:
        """Into this number of processes, however many saved it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.net, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
        )
        if self.companion is not None:
            self.companion.load_state_dict(saved["companion"])


def uneven_net() -> nn.Module:
    """Tall, square and wide matrices, in float64, with sides that two does not divide."""
    net = nn.Sequential(nn.Linear(7, 18), nn.Tanh(), nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 9)).double()
    draw = stream(0, "sharded", "net")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return net


def sharded_numbers(rank: int, world: int, names: list[tuple[str, str]]) -> dict[str, Any]:
    """For each `(module, key)`: weights after ten steps, trained without interruption and through checkpoints in the middle."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for module, key in names:
        try:
            found[key] = _numbers(importlib.import_module(module).SHARDED[key], rank, world, mesh)
        except Exception:  # noqa: BLE001 - reported by check_sharded; the others go on
            found[key] = traceback.format_exc()
    return found


def _numbers(subject: Subject, rank: int, world: int, mesh: Any) -> Any:
    through = _Training(subject, rank, world, mesh)
    through.run(range(STEPS))
    alone = _Training(subject)
    alone.run(range(HALF))
    resumed = _Training(subject, rank, world, mesh)
    resumed.load(_for_all(alone.save()))
    resumed.run(range(HALF, STEPS))
    half = _Training(subject, rank, world, mesh)
    half.run(range(HALF))
    one = _Training(subject)
    one.load(_for_all(half.save()))
    one.run(range(HALF, STEPS))
    return through.weights(), resumed.weights(), one.weights()


def _for_all(saved: dict[str, Any]) -> dict[str, Any]:
    """What the first process holds (a whole state is given to no other), on all of them."""
    import torch.distributed as dist

    box = [saved]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_sharded(subject: Subject, numbers: Any = None, *, module: str = "", key: str = "") -> None:
    """Two gloo processes against one: trained through, resumed in two from one, resumed in one from two.

    Args:
        numbers: the result of `sharded_numbers` for the subject, if one pair of processes ran several.
        module, key: where to find the subject; by default the loaded modules are searched.
    """
    if numbers is None:
        import sys

        if not key:
            for name, found in list(sys.modules.items()):
                subjects = vars(found).get("SHARDED") if hasattr(found, "__dict__") else None
                for k, s in (subjects if isinstance(subjects, dict) else {}).items():
                    if s is subject:
                        module, key = name, k
        assert key, "the subject must be in a dictionary SHARDED at the top level of a module"
        numbers = in_processes(_one, 2, module, key)
    assert not isinstance(numbers, str), numbers
    plain = _Training(subject)
    start = plain.weights()
    plain.run(range(STEPS))
    want = plain.weights()
    moved = sum(float(((want[n] - start[n]) ** 2).sum()) for n in want if want[n].dtype.kind == "f") ** 0.5
    assert moved > 0
    for label, got in zip(("two processes", "resumed in two", "resumed in one"), numbers, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            if value.dtype.kind != "f":
                assert (got[name] == value).all(), f"{label}: {name} differs"
                continue
            error = float(((got[name] - value) ** 2).sum()) ** 0.5 / moved
            assert error <= subject.tolerance, f"{label}: {name} differs by {error:.3g}"


def _one(rank: int, world: int, module: str, key: str) -> Any:
    return sharded_numbers(rank, world, [(module, key)])[key]
