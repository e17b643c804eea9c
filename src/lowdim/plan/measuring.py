"""Measured memory of a training step, from the allocator's own record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.plan.tracker import tensors_in, unique_bytes
from lowdim.results import Result

__all__ = ["Measured", "PeakMemory", "measure"]


@dataclass(frozen=True)
class Measured(Result):
    """Peak bytes of the measured code.

    Attributes:
        bytes: the peak: `start_bytes` plus the largest additional amount.
        start_bytes: bytes held before (weights, gradients, optimizer state and the given tensors).
        device: `"cpu"` or `"cuda"`.
    """

    bytes: int
    start_bytes: int
    device: str


class PeakMemory:
    """Context manager that measures the peak memory of what runs inside it, on top of a model and its optimizer.

    On CUDA the allocator keeps the peak itself. On a CPU, torch's profiler records each allocation and each release; their
    running sum is added to the bytes of the model, its gradients and the optimizer's state. Memory that libraries allocate
    outside torch's allocator (oneDNN's and MKL's packed operands), the interpreter and the program are not included.
    Recording makes the code about a fifth slower, so wrap one or two steps, not a run. Clear gradients before, not inside:
    on a CPU, memory allocated before and freed inside is not recorded.

    Args:
        model, optimizer: held while the code runs.
        tensors: other tensors that are held, such as the batch.

    Example:
        >>> import torch
        >>> from lowdim.plan import PeakMemory
        >>> layer = torch.nn.Linear(256, 256, bias=False)
        >>> with PeakMemory(layer) as memory:
        ...     y = layer(torch.ones(256, 256))
        >>> memory.bytes // 256**2  # the weight, the input and the output, in float32
        12
    """

    def __init__(self, model: nn.Module | None = None, optimizer: Any = None, tensors: Iterable[Tensor] = ()):
        self.model, self.optimizer, self.tensors = model, optimizer, tuple(tensors)
        self.measured: Measured | None = None

    @property
    def bytes(self) -> int:
        """The peak.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        if self.measured is None:
            raise RuntimeError("PeakMemory.bytes is known after the with-block has ended")
        return self.measured.bytes

    def __enter__(self) -> PeakMemory:
        held = list(self._held())
        self._start = unique_bytes(held)
        self._cuda = any(t.is_cuda for t in held) or (not held and torch.cuda.is_available())
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints to stderr
            self._profile = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.measured = Measured(torch.cuda.max_memory_allocated(), self._start, "cuda")
            return
        self._profile.__exit__(*error)
        if error[0] is None:
            self.measured = Measured(self._start + _highest(self._profile), self._start, "cpu")
        del self._profile

    def _held(self) -> Iterable[Tensor]:
        if self.model is not None:
            yield from self.model.parameters()
            yield from self.model.buffers()
            yield from (p.grad for p in self.model.parameters() if p.grad is not None)
        if self.optimizer is not None:
            yield from optimizer_tensors(self.optimizer)
        yield from self.tensors


def measure(
    step: Callable[[], Any], *, model: nn.Module | None = None, optimizer: Any = None, tensors: Iterable[Tensor] = ()
) -> Measured:
    """Run `step()` once and return its peak memory. See `PeakMemory`."""
    with PeakMemory(model, optimizer, tensors) as memory:
        step()
    assert memory.measured is not None
    return memory.measured


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """The tensors of an optimizer's state, also of a wrapper with an attribute `.optimizer`."""
    state = getattr(optimizer, "state", None)
    if not isinstance(state, dict):
        state = getattr(getattr(optimizer, "optimizer", None), "state", None)
    return tensors_in(state) if isinstance(state, dict) else []


def _highest(profile: Any) -> int:
    """The largest running sum of allocations minus releases."""
    events: list[tuple[int, int, int]] = []  # (time, bytes given out so far, bytes of this event)
    stack = list(profile.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    if not events:
        return 0
    first = min(events)
    before = first[1] - first[2]  # left over from an earlier recording
    return max(0, max(total for _, total, _ in events) - before)
