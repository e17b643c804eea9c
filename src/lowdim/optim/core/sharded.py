"""Sharded parameters (FSDP2's DTensor), handled here so that the parts need not know about them.

A sharded gradient is gathered only where a subspace is chosen. All other products run on the local rows: projecting from the
right needs no communication, projecting from the left needs one reduction of the low gradient, and the update none or
one gathering of the low direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowdim.linalg import broadcast, gather, is_sharded, local, match, owner, replicate

__all__ = [
    "add_product",
    "average",
    "broadcast",
    "check_alone",
    "check_whole",
    "gather",
    "is_sharded",
    "local",
    "match",
    "owner",
    "replicate",
    "settle",
]


def settle(low: Any) -> Tensor:
    """Finish a pending sum over processes; the result is sharded along its longer side."""
    if not is_sharded(low):
        return low
    from torch.distributed.tensor import Shard

    axis = int(low.shape[-1] > low.shape[0])
    return low.redistribute(placements=[Shard(axis) if p.is_partial() else p for p in low.placements])


def add_product(weight: Any, left: Tensor, right: Tensor, *, alpha: float, beta: float) -> None:
    """`weight ← beta · weight + alpha · left @ right` in place, each process on its own block of the weight."""
    if is_sharded(weight):
        left, right = _along(left, weight, 0), _along(right, weight, 1)
        weight = weight.to_local()
    weight.addmm_(left, right, alpha=alpha, beta=beta)


def _along(tensor: Any, weight: Any, axis: int) -> Tensor:
    """The part of a factor for this process's block: sharded on `axis` where the weight is, else whole."""
    from torch.distributed.tensor import Replicate, Shard

    if not all(type(p) in (Shard, Replicate) for p in weight.placements):
        raise NotImplementedError(f"parameters must be sharded by Shard or Replicate placements; got {weight.placements}")
    placements = [Shard(axis) if p.is_shard(axis) else Replicate() for p in weight.placements]
    return replicate(tensor, weight).redistribute(placements=placements).to_local()  # type: ignore[attr-defined]


def check_whole(p: Tensor) -> None:
    """Raise ValueError for a parameter that another library has flattened or partitioned: a subspace needs the matrix."""
    flat = type(p).__name__ == "FlatParameter" or getattr(p, "_fsdp_flattened", False)
    if flat or hasattr(p, "ds_id"):
        who = "FSDP1 has flattened" if flat else "DeepSpeed ZeRO-3 has partitioned"
        raise ValueError(
            f"params: {who} a parameter (shape here {tuple(p.shape)}), and a subspace needs the matrix; shard with FSDP2 "
            "(torch.distributed.fsdp.fully_shard; accelerate: fsdp_version 2), which keeps each parameter a DTensor"
        )


def check_alone(p: Tensor, label: Callable[[Tensor], str]) -> None:
    """Raise ValueError if an update in the backward pass would use one process's gradient instead of the average."""
    import torch.distributed as dist

    if is_sharded(p) or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    raise ValueError(
        f"layerwise=True: {label(p)} is held by {dist.get_world_size()} processes, and DDP averages gradients too late for an "
        "update in the backward pass; shard with FSDP2 (fully_shard), or remove DDP and set replicas=True"
    )


def average(tensor: Tensor | None) -> None:
    """The mean over all processes, in place; a DTensor's gradient is already averaged."""
    import torch.distributed as dist

    if tensor is not None and not is_sharded(tensor) and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(dist.get_world_size())
