"""Sharded tensors (DTensor), for code that works on sharded and plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "broadcast",
    "gather",
    "is_sharded",
    "local",
    "many_processes",
    "match",
    "mean_over_processes",
    "one_writes",
    "owner",
    "replicate",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor (checked without importing torch.distributed.tensor)."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """The shard of this process; a plain tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gather(tensor: Any) -> Tensor:
    """The whole tensor, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def replicate(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every process holds, as a DTensor on the mesh of `like`; unchanged if `like` is plain."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def match(tensor: Any, like: Any) -> Tensor:
    """Laid out as `like`, a tensor of the same shape."""
    if not is_sharded(like):
        return tensor
    return replicate(tensor, like).redistribute(placements=like.placements)  # type: ignore[attr-defined]


def owner(like: Any) -> bool:
    """Whether this process decides for all processes that hold a part of `like`."""
    if not is_sharded(like):
        return True
    coordinate = like.device_mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


def broadcast(tensor: Tensor, like: Any) -> None:
    """Overwrite `tensor` on every process with the owner's: bases must agree to the last bit on all hardware."""
    if is_sharded(like):
        mesh = like.device_mesh
        for axis in range(mesh.ndim):  # the owner's first line, then every line from its first member
            torch.distributed.broadcast(tensor, group=mesh.get_group(axis), group_src=0)


@contextmanager
def one_writes(parameters: Iterable[Any]) -> Iterator[bool]:
    """Whether this process writes what all have gathered: the first, if any parameter is sharded. The others wait for it."""
    if not any(map(is_sharded, parameters)):
        yield True
        return
    try:
        yield dist.get_rank() == 0
    finally:
        dist.barrier()


def many_processes() -> bool:
    """Whether the training runs in several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over the processes' tensors, in the tensor's layout."""
    if not many_processes():
        return tensor
    total = local(tensor).clone()
    dist.all_reduce(total)
    return replicate(total / dist.get_world_size(), tensor)
