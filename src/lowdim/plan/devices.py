"""One process that stands for the first of several, so that FSDP2 itself is rehearsed: shards, gathered blocks, reductions.

torch's process group `fake` moves nothing. The first process holds the largest shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lowdim.surgery import shard

if TYPE_CHECKING:
    from torch import nn

    from lowdim.plan.tracker import Tracker

__all__ = ["as_one_of"]


@contextmanager
def as_one_of(devices: int, device: str, tracker: Tracker) -> Iterator[Callable[[nn.Module], Any]]:
    """Inside the block this process is the first of `devices`; gives a function that shards a model. Nothing is done for one.

    Raises:
        ValueError: the process is one of several already.
    """
    if devices == 1:
        yield lambda model: model
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if dist.is_initialized():
        raise ValueError(
            f"devices must be 1 inside a process group (torchrun, accelerate); got {devices}: make the forecast before"
        )
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 (registers the backend)
    from torch.distributed.tensor import DTensor

    dist.init_process_group("fake", rank=0, world_size=devices)
    try:
        mesh = init_device_mesh(device, (devices,))
        tracker.desugared = (DTensor,)
        tracker.exchange = _exchanges()
        with _resizes(tracker), _without_propagation(tracker):
            yield lambda model: shard(model, mesh)
    finally:
        dist.destroy_process_group()


def _exchanges() -> dict[Any, Callable[[Any, Any], Any]]:
    """FSDP2's operations, and the buffers for exchange among their arguments: whole weights and whole gradients."""
    import torch.distributed.fsdp

    fsdp = torch.ops.fsdp
    return {
        fsdp.all_gather_copy_in.default: lambda args, kwargs: args[1],
        fsdp.split_with_sizes_copy.default: lambda args, kwargs: kwargs["out"],
        fsdp.chunk_cat.default: lambda args, kwargs: kwargs["out"],
    }


@contextmanager
def _resizes(tracker: Tracker) -> Iterator[None]:
    """FSDP2 frees a gathered weight by giving its storage the size 0, which no operation shows."""
    usual = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        usual(storage, size)
        tracker.resized(storage)
        return storage

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = usual  # type: ignore[method-assign]


@contextmanager
def _without_propagation(tracker: Tracker) -> Iterator[None]:
    """DTensor runs each new operation on whole tensors without memory, to learn its shape: not part of the step."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "_propagate_tensor_meta_non_cached"
    usual = getattr(ShardingPropagator, name)

    def unseen(self: Any, schema: Any) -> Any:
        before, tracker.paused = tracker.paused, True
        try:
            return usual(self, schema)
        finally:
            tracker.paused = before

    setattr(ShardingPropagator, name, unseen)
    try:
        yield
    finally:
        setattr(ShardingPropagator, name, usual)
