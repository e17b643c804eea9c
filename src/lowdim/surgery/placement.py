"""Layers whose `forward` was replaced on the instance: accelerate's hooks, patched methods; and weights that it took away.

accelerate (`device_map`, `dispatch_model`, `cpu_offload`) puts a function of its own at `layer.forward`, which calls the
layer's former forward method. A copy of the layer must call its own, or it computes with the other layer's weight.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

__all__ = ["OFFLOADED", "carry_hook", "is_offloaded", "rebind_methods", "refuse_offloaded"]

OFFLOADED = (
    "its weight is not in memory: accelerate has offloaded it to the CPU or to disk. Load the model without offloading "
    "(device_map={'': device}), or bring the weights back with accelerate.hooks.remove_hook_from_submodules(model), and call "
    "this again"
)


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate keeps the layer's own weights elsewhere and brings them in for each pass."""
    return "_hf_hook" in layer.__dict__ and any(p is not None and p.is_meta for p in layer._parameters.values())


def refuse_offloaded(layer: nn.Module, name: str = "") -> None:
    """Raise ValueError if the layer's weight is not in memory."""
    if is_offloaded(layer):
        raise ValueError(f"layer {name}: {OFFLOADED}" if name else OFFLOADED)


def rebind_methods(copy: nn.Module, layer: nn.Module) -> None:
    """Make the functions that were set on the instance `layer`, and so on its `copy`, act on the copy.

    Bound methods, `functools.partial` objects and functions that hold the layer or one of its methods in a closure or a
    default are made again with the copy in place of the layer.
    """
    for name, value in list(copy.__dict__.items()):
        if isinstance(value, (types.MethodType, types.FunctionType, functools.partial)):
            copy.__dict__[name] = _rebound(value, layer, copy)


def _rebound(value: Any, old: nn.Module, new: nn.Module, depth: int = 8) -> Any:
    """`value` with `new` wherever it holds `old`; the same object where it holds it nowhere."""
    if value is old:
        return new
    if depth == 0:
        return value
    again = lambda part: _rebound(part, old, new, depth - 1)  # noqa: E731
    if isinstance(value, types.MethodType):
        owner, function = again(value.__self__), again(value.__func__)
        unchanged = owner is value.__self__ and function is value.__func__
        return value if unchanged else types.MethodType(function, owner)
    if isinstance(value, functools.partial):
        parts = (again(value.func), tuple(map(again, value.args)), {key: again(part) for key, part in value.keywords.items()})
        made = functools.partial(parts[0], *parts[1], **parts[2])
        made.__dict__.update({key: again(part) for key, part in value.__dict__.items()})
        return made
    if isinstance(value, types.FunctionType):
        return _rebound_function(value, again)
    return value


def _rebound_function(function: types.FunctionType, again: Any) -> types.FunctionType:
    cells = function.__closure__ or ()
    filled = [_contents(cell) for cell in cells]
    held = [again(content) for content in filled]
    defaults = tuple(map(again, function.__defaults__)) if function.__defaults__ else None
    same = all(a is b for a, b in zip(held, filled)) and all(
        a is b for a, b in zip(defaults or (), function.__defaults__ or ())
    )
    if same:
        return function
    # A cell that holds nothing of the layer is shared, so that what the function counts or collects stays common.
    closure = tuple(cell if a is b else types.CellType(a) for cell, a, b in zip(cells, held, filled))
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure or None)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def carry_hook(old: nn.Module, new: nn.Module) -> None:
    """Put accelerate's hook of the layer `old` on the layer `new` that takes its place, so that inputs are moved for it too."""
    hook = old.__dict__.get("_hf_hook")
    if hook is None or "_hf_hook" in new.__dict__:
        return
    from accelerate.hooks import add_hook_to_module  # it has put the hook there, so it is installed

    flags = {name: p.requires_grad for name, p in new.named_parameters() if isinstance(p, Tensor)}
    add_hook_to_module(new, hook)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(flags[name])
