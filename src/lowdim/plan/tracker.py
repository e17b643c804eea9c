"""Tracks which tensors are alive, and their use, in every operation of a (fake or real) training step.

torch has a similar tool (`torch.distributed._tools.mem_tracker`), which visits every module at every operation; the cost
of this one per operation does not depend on the model's depth, and it counts work as well as bytes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowdim.linalg import local

__all__ = ["KINDS", "Peak", "Tracker", "tensors_in"]

#: Uses of memory. `workspace` lives within one operation, or between two operations of the backward pass.
KINDS: tuple[str, ...] = ("weights", "gradients", "optimizer_state", "activations", "workspace")


def _nothing() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


_DEVICE = torch.ops.prim.device.default
_ADD = torch.ops.aten.add.Tensor


@dataclass
class _Storage:
    """One live storage: its size, its use, and the operation that allocated it."""

    size: int
    kind: str
    born: int
    reference: Any = None


@dataclass
class Peak:
    """The largest sum of live bytes within one part of the step, by kind."""

    total: int = 0
    clock: int = 0
    by_kind: dict[str, int] = field(default_factory=_nothing)


class Tracker(TorchDispatchMode):
    """Sums the bytes of live storages by kind, and keeps the peak of each part that `enter` names.

    Args:
        granularity: allocators allocate blocks; sizes are rounded up to a multiple of it (512 on CUDA).
        hidden: `hidden(operation, args, out) -> bytes` that a kernel allocates and frees inside.
        work: `work(operation, args, kwargs, out, tensors_of_out) -> None`, called for each operation.

    Attributes:
        desugared: tensor classes that hand their operations on to plain tensors, which are seen instead.
        exchange: operations between devices, and `(args, kwargs) -> tensors` that are their buffers: workspace.
        paused: nothing is counted.
        trained: shapes of the trained parameters.
    """

    def __init__(
        self,
        granularity: int = 1,
        hidden: Callable[[Any, Any, Any], int] | None = None,
        work: Callable[[Any, Any, Any, Any, list[Tensor]], None] | None = None,
    ):
        super().__init__()
        self.granularity, self.hidden, self.work = granularity, hidden, work
        self.live: dict[int, _Storage] = {}
        self.by_kind = _nothing()
        self.total = 0
        self.clock = 0
        self.peaks: dict[Any, Peak] = {}
        self.kind = "activations"
        self.stretch: Any = "start"
        self.desugared: tuple[type, ...] = ()
        self.exchange: Mapping[Any, Callable[[Any, Any], Any]] = {}
        self.paused = False
        self.trained: frozenset[torch.Size] = frozenset()

    def enter(self, stretch: Any, kind: str | None = None) -> None:
        """Start this part of the step; new tensors are of this kind (None: as before)."""
        self.stretch = stretch
        if kind is not None:
            self.kind = kind
        self._record(0)

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count existing tensors, or set their kind."""
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            entry = self.live.get(storage._cdata)
            if entry is None:
                self._track(storage, kind)
            elif entry.kind != kind:
                self._relabel(entry, kind)
        self._record(0)

    def _track(self, storage: Any, kind: str) -> None:
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        if not size:
            return
        key = storage._cdata
        entry = _Storage(size, kind, self.clock)
        entry.reference = weakref.ref(storage, lambda _: self._drop(key))
        self.live[key] = entry
        self.by_kind[kind] += size
        self.total += size

    def _drop(self, key: int) -> None:
        entry = self.live.pop(key, None)
        if entry is not None:
            self.by_kind[entry.kind] -= entry.size
            self.total -= entry.size

    def resized(self, storage: Any) -> None:
        """Count a storage that has got another size."""
        entry = self.live.get(storage._cdata)
        if entry is None:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        self.by_kind[entry.kind] += size - entry.size
        self.total += size - entry.size
        entry.size = size
        self._record(0)

    def _relabel(self, entry: _Storage, kind: str) -> None:
        """Move a storage to another kind, also in the peaks that included it."""
        for counts in itertools.chain(
            [self.by_kind], (peak.by_kind for peak in self.peaks.values() if peak.clock >= entry.born)
        ):
            counts[entry.kind] -= entry.size
            counts[kind] += entry.size
        entry.kind = kind

    def _accumulates(self, out: Tensor) -> bool:
        """Whether a sum is that of two gradients of a parameter, which autograd takes in place unless a mode looks on.

        What it leaves is recorded with the next operation.
        """
        backward = isinstance(self.stretch, tuple) and self.stretch[1] == "backward"
        return backward and out.shape in self.trained and not torch.is_grad_enabled()

    def _record(self, extra: int) -> None:
        peak = self.peaks.get(self.stretch)
        if peak is None:
            peak = self.peaks[self.stretch] = Peak()
        if self.total + extra > peak.total:
            peak.total, peak.clock, peak.by_kind = self.total + extra, self.clock, dict(self.by_kind)
            peak.by_kind["workspace"] += extra

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled under this mode, so torch need not switch its compiler off at every operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked of fake tensors more often than all else together, so answered here
            asked = args[0]
            if isinstance(asked, FakeTensor) and not asked.fake_mode.in_kernel_invocation:
                return asked.fake_device
        kwargs = kwargs or {}
        if self.desugared and any(issubclass(each, self.desugared) for each in types):
            return NotImplemented
        out = func(*args, **kwargs)
        if self.paused or func is _DEVICE:
            return out
        self.clock += 1
        live = self.live
        tensors = tensors_in(out)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in live:
                self._track(storage, self.kind)
        if func in self.exchange:
            self.add(tensors_in(self.exchange[func](args, kwargs)), "workspace")
        if func is not _ADD or not self._accumulates(out):
            self._record(0 if self.hidden is None else self.hidden(func, args, out))
        if self.work is not None:
            self.work(func, args, kwargs, out, tensors)
        return out


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples, mappings and dataclass-like objects' tensors."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [t for item in value for t in tensors_in(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_in(item)]
    return []


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once; of sharded ones this process's part."""
    held = [local(t).untyped_storage() for t in tensors if _has_storage(t)]
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta"
