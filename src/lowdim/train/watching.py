"""What a long run should not have to be watched for: losses that jump, and checkpoints that cannot be written."""

from __future__ import annotations

import errno
import io
import os
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.units import format_bytes

__all__ = ["SpikeAlarm", "rehearse_saving"]


class SpikeAlarm:
    """Tells a jump of the loss from its usual noise.

    Formula: with the median `M` and `D`, 1.4826 times the median distance from it, of the last `window` losses, a loss above
    `M + max(factor · D, share · M)` is a spike. Spikes do not enter the window, so a loss that stays up is told again and
    again.

    Args:
        patience: losses that must have been seen before anything is called a spike.

    Example:
        >>> from lowdim.train.watching import SpikeAlarm
        >>> alarm = SpikeAlarm(patience=4)
        >>> [alarm.spike(loss) for loss in (3.0, 2.9, 3.1, 2.8, 2.9, 9.0)]
        [False, False, False, False, False, True]
    """

    def __init__(self, *, window: int = 50, patience: int = 20, factor: float = 6.0, share: float = 0.2):
        self.patience, self.factor, self.share = patience, factor, share
        self._seen: deque[float] = deque(maxlen=window)

    def spike(self, loss: float) -> bool:
        """Whether this loss is one; it is remembered if not."""
        if len(self._seen) >= self.patience and loss > self.threshold():
            return True
        self._seen.append(loss)
        return False

    def threshold(self) -> float:
        """Where spikes begin now."""
        middle = statistics.median(self._seen)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._seen)
        return middle + max(self.factor * spread, self.share * abs(middle))

    def recall(self, losses: Iterable[float]) -> None:
        """Look at the losses of a run that is resumed."""
        for loss in losses:
            self.spike(loss)


def rehearse_saving(model: nn.Module, optimizer: Any, companion: Any, folder: Path, kept: int) -> str | None:
    """Before the first step: is there room for a checkpoint, and does what it will hold come back as it was?

    The optimizer's state is laid out (zeros) for the smallest parameter of each kind, written, read with `weights_only=True`
    and loaded; a projected optimizer alone can say beforehand what its state will be.

    Returns:
        A warning where there is room for one checkpoint, but not for `kept`.

    Raises:
        OSError: the disk has no room for one checkpoint.
        ValueError: something that was saved does not load.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, torch.Tensor))
    layouts = list(_layouts(optimizer))
    trained = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    one = weights + (sum(size for *_, size in layouts) if layouts else 2 * trained)
    free = shutil.disk_usage(folder if folder.is_dir() else _existing(folder)).free
    if free < one:
        reason = f"{os.strerror(errno.ENOSPC)}: one needs {format_bytes(one)}, {format_bytes(free)} are left"
        raise OSError(errno.ENOSPC, f"could not write a checkpoint to {folder} ({reason}); free some, or set save_steps to 0")
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
    """For each parameter of a projected optimizer: its number, itself, the layout of its state, and bytes."""
    if not hasattr(optimizer, "parts"):
        return
    number = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            parts = optimizer.parts(group, p.ndim)
            shape = tuple(p.shape)
            yield number, p, parts.layout(shape, p.dtype), parts.nbytes(shape, p.dtype)
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
        raise ValueError("a state that was saved, read and loaded is not what it was: checkpoints could not be trusted")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return isinstance(b, dict) and all(key in b and _same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return a == b
