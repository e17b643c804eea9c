"""What an optimizer checks before it begins: its parameters, its rules together, and a state that it is to go on with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowdim.errors import CheckpointError
from lowdim.optim import sharded
from lowdim.optim.parts import Layout, State

__all__ = ["STATE_VERSION", "check_full_gradient", "check_params", "check_saved_group", "restored"]


#: Of the layout of optimizers' states; a state of another version is refused, not guessed at.
STATE_VERSION = 1


def check_params(params: list[Tensor], index: int) -> None:
    """Raise ValueError for parameters that were flattened, or that a group lists twice (torch only warns)."""
    for p in params:
        sharded.check_whole(p)
    if len(set(map(id, params))) < len(params):
        raise ValueError(f"params: group {index} lists a parameter twice; it would be updated twice a step")


def check_full_gradient(method: str, layerwise: bool, accumulate: int, max_norm: float | None) -> None:
    """Raise ValueError where a rule looks at the full gradient, which is gone once projected ones are summed or wait."""
    if accumulate > 1:
        raise ValueError(
            f"accumulate={accumulate}: {method} here looks at the full gradient, which the sum of projected gradients does not "
            "hold; take layerwise=False (.grad is then the sum), or no residual rule"
        )
    if max_norm is not None:
        way = "layerwise=False and torch.nn.utils.clip_grad_norm_" if layerwise else "torch.nn.utils.clip_grad_norm_"
        raise ValueError(f"max_norm={max_norm}: {method} here looks at the full gradient; clip that instead, with {way}")


def check_saved_group(index: int, saved: dict[str, Any], group: dict[str, Any], method: str, keys: Iterable[str]) -> None:
    """Raise unless the group was saved by this method, in this version, with the same value of each of these keys.

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
    """A copy of a parameter's saved state on its device, every tensor in its own dtype.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if "step" in saved:
        for name, (shape, _) in wanted.items():
            found = saved.get(name)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape:
                what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
                raise ValueError(f"state_dict: {label} needs {name!r} of shape {shape}; found {what}")
    return {k: v.detach().to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}


def _plain(value: Any) -> Any:
    """Lists and tuples that hold the same compare equal: a checkpoint may have passed through JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
