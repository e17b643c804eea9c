"""Checks before an optimizer starts: hyperparameters, parameters, combinations of rules, and a state to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import CheckpointError, check_float, check_int
from lowdim.optim.core import sharded
from lowdim.optim.core.parts import Layout, State

__all__ = [
    "STATE_VERSION",
    "check_betas",
    "check_full_gradient",
    "check_limiter",
    "check_masters",
    "check_matrix",
    "check_params",
    "check_rank",
    "check_ranks",
    "check_saved_group",
    "check_schedule",
    "restored",
]


#: Version of the layout of optimizers' states; a state of another version is rejected.
STATE_VERSION = 1


def check_params(params: list[Tensor], index: int) -> None:
    """Raise ValueError for parameters that were flattened, or that a group holds more than once (torch only warns)."""
    for p in params:
        sharded.check_whole(p)
    if len(set(map(id, params))) < len(params):
        raise ValueError(f"params: group {index} has a duplicate parameter, which would be updated twice per step")


def check_masters(group: dict[str, Any]) -> None:
    """Raise unless `master_weights` is a bool that fits the group's parameters."""
    if not isinstance(group["master_weights"], bool):
        raise ValueError(f"master_weights must be True or False; got {group['master_weights']!r}")
    if group["master_weights"] and any(not p.is_floating_point() for p in group["params"]):
        raise ValueError(
            "master_weights=True: 8-bit weights have no float32 copy, which would be four times their size; leave it False "
            "(they are rounded stochastically)"
        )


def check_full_gradient(method: str, layerwise: bool, accumulate: int, max_norm: float | None) -> None:
    """Raise ValueError if a rule needs the full gradient, which is not kept while projected ones are summed or clipped."""
    if accumulate > 1:
        raise ValueError(
            f"accumulate={accumulate}: {method} here needs the full gradient, which the sum of projected gradients does not "
            "hold; use layerwise=False (.grad is then the sum), or no residual rule"
        )
    if max_norm is not None:
        way = "layerwise=False and torch.nn.utils.clip_grad_norm_" if layerwise else "torch.nn.utils.clip_grad_norm_"
        raise ValueError(f"max_norm={max_norm}: {method} here needs the full gradient; clip that instead, with {way}")


def check_schedule(group: dict[str, Any]) -> None:
    """lr, betas, weight_decay, update_interval."""
    check_float("lr", float(group["lr"]), 0.0)
    check_float("weight_decay", group["weight_decay"], 0.0)
    check_int("update_interval", group["update_interval"], 1)
    check_betas(group["betas"])


def check_betas(betas: Any) -> None:
    """Two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers; got {betas!r}")
    for index, beta in enumerate(betas):
        check_float(f"betas[{index}]", beta, 0.0, 1.0, high_open=True)


def check_rank(rank: int | tuple[int, ...] | list[int] | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a parameter of this shape can be projected to this rank."""
    if rank is None:
        return
    if len(shape) < 2:
        raise ValueError(f"rank must be None for a group that holds vectors (shape {shape}); got rank={rank}")
    if isinstance(rank, int):
        check_int("rank", rank, 1)
        if len(shape) == 2 and rank > min(shape):
            raise ValueError(
                f"rank must be at most {min(shape)}, the smaller side of a matrix of shape {shape}; got {rank}; "
                "lowdim.optim.param_groups(model, rank=...) leaves such matrices unprojected, as a group with rank=None does"
            )
        return
    if not isinstance(rank, (tuple, list)) or len(shape) == 2 or len(rank) != len(shape):
        raise ValueError(f"rank must be an int, or for a tensor of shape {shape} one int a dimension; got {rank!r}")
    for mode, (r, size) in enumerate(zip(rank, shape)):
        check_int(f"rank[{mode}]", r, 1, size)


def check_ranks(group: dict[str, Any], check: Callable[[Any, tuple[int, ...]], None] = check_rank) -> None:
    """`check` the rank of a group against the shape of each parameter; the error names the parameter, if it has a name."""
    names = group.get("param_names")
    for place, p in enumerate(group["params"]):
        try:
            check(group["rank"], tuple(p.shape))
        except ValueError as error:
            raise ValueError(f"parameter {names[place]}: {error}" if names else str(error)) from None


def check_limiter(limiter: Any) -> None:
    """None, or a number of at least 1."""
    if limiter is not None:
        check_float("limiter", limiter, 1.0)


def check_matrix(rank: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a parameter of this shape is not projected, or is a matrix that can be projected to this rank."""
    if rank is not None and len(shape) > 2:
        raise ValueError(f"rank must be None for a group that holds tensors of more than two dimensions (shape {shape})")
    check_rank(rank, shape)


def check_saved_group(index: int, saved: dict[str, Any], group: dict[str, Any], method: str, keys: Iterable[str]) -> None:
    """Raise unless the group was saved by this method, in this version, with the same values of these keys.

    Raises:
        ValueError: another method, or another value.
        CheckpointError: another version.
    """
    if saved.get("method") != method:
        found = saved.get("method", "another optimizer")
        raise ValueError(f"state_dict must come from {method}; group {index} was saved by {found}")
    if saved.get("version") != STATE_VERSION:
        raise CheckpointError(
            f"state_dict: group {index} was saved in version {saved.get('version')!r} of the state; "
            f"this lowdim reads version {STATE_VERSION}"
        )
    for key in keys:
        if _plain(saved.get(key)) != _plain(group.get(key)):
            raise ValueError(
                f"state_dict: group {index} was saved with {key}={saved.get(key)!r}; this optimizer has {group.get(key)!r}"
            )


def restored(p: Tensor, saved: State, wanted: Layout, label: str) -> State:
    """A copy of a parameter's saved state on its device, every tensor in the dtype in which this optimizer keeps it.

    The state of a model in another floating dtype is converted, as torch does.

    Raises:
        ValueError: a tensor is missing, has another shape, or cannot be converted (bytes for floating numbers).
    """
    if "step" in saved:
        for name, (shape, dtype) in wanted.items():
            found = saved.get(name)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
                raise ValueError(f"state_dict: {label} needs {name!r} of shape {shape}; found {what}")
            if found.dtype != dtype and not (found.is_floating_point() and dtype.is_floating_point):
                raise ValueError(f"state_dict: {label} needs {name!r} in {dtype}; found {found.dtype}")
    return {k: _copied(v, p.device, wanted.get(k)) if isinstance(v, Tensor) else v for k, v in saved.items()}


def _copied(tensor: Tensor, device: torch.device, kept: tuple[tuple[int, ...], torch.dtype] | None) -> Tensor:
    return tensor.detach().to(device, tensor.dtype if kept is None else kept[1], copy=True)


def _plain(value: Any) -> Any:
    """Make lists and tuples with the same items compare equal: a checkpoint may have passed through JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
