"""Modules as their own names have them, whatever they are wrapped in: compiled, data-parallel, checkpointed.

A wrapper has one child, the module that it wraps, and adds a part to every name below it (`_orig_mod.`, `module.`). What is
saved must carry the plain names, so names are read and looked up through wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

from torch import nn

__all__ = ["holder", "is_compiled", "named_layers", "plain_name", "submodule", "unwrap"]

#: Class name -> the attribute that holds the wrapped module.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "DeepSpeedEngine": "module",
}
_PARTS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrap(module: Any) -> Any:
    """The module inside `torch.compile`, (distributed) data parallelism, FSDP1, activation checkpointing or DeepSpeed.

    Example:
        >>> from torch import nn
        >>> from lowdim.surgery import unwrap
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    while (attribute := _inner(module)) is not None:
        module = module._modules[attribute]
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile(module)` returns: it calls the module that it was made for, whatever its child is."""
    return _inner(module) == "_orig_mod"


def _inner(module: Any) -> str | None:
    kind = type(module)
    if kind.__module__ == "torch.nn.modules.linear":  # most modules: nothing to search
        return None
    for cls in kind.__mro__:
        attribute = _INNER.get(cls.__name__)
        if attribute is not None and cls.__module__.startswith(("torch.", "deepspeed.")):
            return attribute if isinstance(getattr(module, "_modules", {}).get(attribute), nn.Module) else None
    return None


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module below `model` by each of its plain names, in model order; wrappers are left out."""
    found: dict[str, nn.Module] = {}
    for prefix, module in _walk(unwrap(model), ""):
        found.setdefault(prefix, module)
    return found


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            child = unwrap(child)
            yield prefix + name, child
            yield from _walk(child, f"{prefix}{name}.")


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of that plain name, looked up through wrappers.

    Raises:
        AttributeError: the model has no such module.
    """
    module = unwrap(model)
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(unwrap(model)).__name__} has no module {name!r}")
        module = unwrap(child)
    return module


def holder(name: str, modules: Container[str]) -> str | None:
    """The module among `modules` that holds the tensor or module of that name: the outermost one; None if none does.

    Example:
        >>> from lowdim.surgery import holder
        >>> holder("layers.1.q_proj.update.A", {"layers.1.q_proj", "head"})
        'layers.1.q_proj'
    """
    place = name.find(".")
    while place >= 0:
        if name[:place] in modules:
            return name[:place]
        place = name.find(".", place + 1)
    return None


def plain_name(name: str) -> str:
    """A parameter's or module's name without the parts that wrappers inside the model have added."""
    return _PARTS.sub("", name)
