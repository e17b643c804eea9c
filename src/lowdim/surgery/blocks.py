"""The blocks of a model: the entries of its outermost lists of modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["blocks_of"]


def blocks_of(model: nn.Module, layers: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the entries of the outermost `nn.ModuleList`s, which are the blocks of a transformer, in model order.

    Args:
        layers: names of modules; only blocks that hold one of them are returned. None: all.

    Example:
        >>> from torch import nn
        >>> from lowdim.surgery import blocks_of
        >>> model = nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> blocks_of(model), blocks_of(model, ["layers.1"])
        (('layers.0', 'layers.1'), ('layers.1',))
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    entries = [f"{name}.{i}" if name else i for name in outer for i in model.get_submodule(name)._modules]
    if layers is None:
        return tuple(entries)
    names = [f"{name}." for name in layers]
    return tuple(entry for entry in entries if any(name.startswith(f"{entry}.") for name in names))
