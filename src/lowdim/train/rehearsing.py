"""A rehearsal of saving: checks before the first step that checkpoints can be written and read."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.optim import ProjectedOptimizer
from lowdim.optim.core.parts import layout_bytes
from lowdim.units import format_bytes

__all__ = ["rehearse_saving"]


def rehearse_saving(model: nn.Module, optimizer: Any, companion: Any, folder: Path, kept: int) -> str | None:
    """Before the first step: is there room for a checkpoint, and is its state the same after loading?

    The optimizer's state is laid out (zeros) for the smallest parameter of each kind, written, read with `weights_only=True`
    and loaded; only a projected optimizer knows the layout of its state in advance.

    Returns:
        A warning if there is room for one checkpoint, but not for `kept`.

    Raises:
        OSError: the disk has no room for one checkpoint.
        ValueError: a saved state does not load.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, torch.Tensor))
    layouts = list(_layouts(optimizer))
    trained = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    one = weights + (sum(size for *_, size in layouts) if layouts else 2 * trained)
    free = shutil.disk_usage(folder if folder.is_dir() else _existing(folder)).free
    if free < one:
        reason = f"{os.strerror(errno.ENOSPC)}: it needs {format_bytes(one)}, and {format_bytes(free)} are free"
        raise OSError(
            errno.ENOSPC, f"could not write a checkpoint to {folder} ({reason}); free some space, or set save_steps to 0"
        )
    if layouts:
        _round_trip(optimizer.state_dict, optimizer.load_state_dict, _trial_state(optimizer, layouts))
        optimizer.state.clear()
    if companion is not None:
        _round_trip(companion.state_dict, companion.load_state_dict, companion.state_dict())
    if free < kept * one:
        return f"{kept} checkpoints of {format_bytes(one)} will be kept, and {folder} has {format_bytes(free)} left"
    return None


def _existing(folder: Path) -> Path:
    return next(p for p in [folder, *folder.absolute().parents] if p.is_dir())


def _layouts(optimizer: Any) -> Iterable[tuple[int, Any, Any, int]]:
    """For each parameter of a projected optimizer: its number, the parameter, the layout of its state, and bytes."""
    if not isinstance(optimizer, ProjectedOptimizer):
        return
    number = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            layout = optimizer.layout_of(p, group)
            yield number, p, layout, layout_bytes(layout)
            number += 1


def _trial_state(optimizer: Any, layouts: list[tuple[int, Any, Any, int]]) -> dict[str, Any]:
    smallest: dict[Any, tuple[int, Any, Any, int]] = {}
    for row in layouts:
        kind = tuple(sorted(row[2]))
        if kind not in smallest or row[3] < smallest[kind][3]:
            smallest[kind] = row
    trial = {
        number: {"step": 1, **{name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}}
        for number, _, layout, _ in smallest.values()
    }
    return {"state": trial, "param_groups": optimizer.state_dict()["param_groups"]}


def _round_trip(save: Callable[[], Any], load: Callable[[Any], Any], state: Any) -> None:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    load(torch.load(file, weights_only=True))
    back = save()
    if not _same(state, back):
        raise ValueError("a state changed when it was saved and loaded again, so checkpoints of this run would be wrong")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return isinstance(b, dict) and all(key in b and _same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return a == b
