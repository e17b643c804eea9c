"""Parameter groups (which parameters are projected), and the size of optimizer states."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowdim.errors import NoMatchingModuleError, check_int
from lowdim.optim.core import sharded
from lowdim.optim.core.int8 import Int8Linear, Int8Parameter
from lowdim.surgery import find_layers, is_conv1d

__all__ = ["ParamGroups", "param_groups", "projected_layers", "state_bytes", "too_small"]

_LOG = logging.getLogger("lowdim.optim")


class ParamGroups(list):
    """Parameter groups for an optimizer, with the reason for each parameter's group.

    Attributes:
        rows: one `(name, shape, group)` per parameter, `group` being `"rank 128"` or the reason for leaving it unprojected.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, tuple[int, ...], str]] = []

    def describe(self) -> str:
        """A table with a line per parameter, and the share of projected numbers."""
        width = max((len(name) for name, _, _ in self.rows), default=4)
        sizes = [(torch.Size(shape).numel(), group.startswith("rank ")) for _, shape, group in self.rows]
        total, projected = sum(n for n, _ in sizes), sum(n for n, yes in sizes if yes)
        lines = [f"{name:<{width}}  {'x'.join(map(str, shape)) or 'scalar':>14}  {group}" for name, shape, group in self.rows]
        share = projected / total if total else 0.0
        return "\n".join([*lines, f"{projected:,} of {total:,} numbers projected ({share:.1%})"])


def param_groups(
    model: nn.Module,
    rank: int,
    *,
    target_modules: str | Iterable[str] | None = None,
    rest: dict[str, Any] | None = None,
    verbose: bool = False,
    **options: Any,
) -> ParamGroups:
    """Sort a model's trainable parameters into a projected and an unprojected group.

    Projected: weight matrices of the named layers, by default of all linear layers (and attention or recurrent matrices of
    torch's own modules) except prediction heads. Not projected: vectors, embeddings, heads, convolutions, matrices whose
    smaller side is not above the rank, and a matrix tied to any of these. A tied matrix appears once.

    Args:
        rank: of the projected group.
        target_modules: names, dotted suffixes or a regular expression, as everywhere (`lowdim.surgery.find_layers`).
        rest: hyperparameters of the unprojected group, e.g. `{"lr": 1e-3}`.
        verbose: print `describe()`; it is logged to `lowdim.optim` in any case.
        options: hyperparameters of the projected group, e.g. `scale=0.25`.

    Returns:
        A list of groups (empty groups are left out) with `.describe()` and `.rows`.

    Raises:
        ValueError: rank < 1, a pattern that matches nothing, or no trainable parameter.

    Warns:
        UserWarning: nothing is projected.

    Example:
        >>> from torch import nn
        >>> from lowdim.optim import param_groups
        >>> groups = param_groups(nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32)), rank=4)
        >>> print(groups.describe())
        0.weight           50x16  embedding
        1.weight           32x16  rank 4
        1.bias                32  vector
        512 of 1,344 numbers projected (38.1%)
    """
    why = _reasons(model, rank, target_modules)
    if not why:
        raise ValueError(f"model must have a parameter with requires_grad; {type(model).__name__} has none")
    projected = [p for p, (reason, _) in why.items() if not reason]
    others = [p for p, (reason, _) in why.items() if reason]
    groups = ParamGroups()
    if projected:
        groups.append({"params": projected, "rank": rank, **options})
    if others:
        groups.append({"params": others, "rank": None, **(rest or {})})
    groups.rows = [
        (" = ".join(dict.fromkeys(names)), tuple(p.shape), reason or f"rank {rank}") for p, (reason, names) in why.items()
    ]
    _LOG.info("%s", groups.describe())
    if verbose:
        print(groups.describe())
    if not projected:
        warnings.warn(f"rank={rank}: no parameter of {type(model).__name__} is projected:\n{groups.describe()}", stacklevel=2)
    return groups


def projected_layers(model: nn.Module, rank: int, target_modules: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers whose weight `param_groups` would project, by name."""
    chosen = {p for p, (reason, _) in _reasons(model, rank, target_modules).items() if not reason}
    return {path: m for path, m in model.named_modules() if _is_linear(m) and m._parameters.get("weight") in chosen}


def too_small(rank: int) -> str:
    """The reason for a matrix that has no `rank` directions to spare."""
    return f"smaller side not above rank {rank}"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; for sharded ones, the bytes that this process holds.

    Example:
        >>> import torch
        >>> from lowdim.optim import state_bytes
        >>> p = torch.nn.Parameter(torch.ones(10)); p.grad = torch.ones(10)
        >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        >>> optimizer.step(); state_bytes(optimizer)
        40
    """
    return sum(_bytes(state) for state in optimizer.state.values())


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        piece = sharded.local(value)
        return piece.numel() * piece.element_size()
    if isinstance(value, dict):
        return sum(_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(v) for v in value)
    return 0


def _reasons(
    model: nn.Module, rank: int, target_modules: str | Iterable[str] | None
) -> dict[nn.Parameter, tuple[str, list[str]]]:
    """For each trained parameter: why it is not projected (empty if it is), and its names."""
    check_int("rank", rank, 1)
    wanted = _matrices(model, target_modules)
    why: dict[nn.Parameter, tuple[str, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, p in module._parameters.items():
            if p is None or not _trained(p):
                continue
            name = f"{path}.{leaf}" if path else leaf
            reason = _reason(p, module, (id(module), leaf) in wanted, rank)
            before, names = why.get(p, ("", []))
            why[p] = (before or reason, [*names, name])  # a reason under any of its names counts
    return why


def _trained(p: nn.Parameter) -> bool:
    return p.trainable if isinstance(p, Int8Parameter) else p.requires_grad


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Int8Linear)) or is_conv1d(module)


def _matrices(model: nn.Module, target_modules: str | Iterable[str] | None) -> set[tuple[int, str]]:
    """`(id of the module, name of the parameter)` of the matrices that may be projected."""
    try:
        layers = find_layers(model, target_modules, accept=_is_linear, uncalled=True)
    except NoMatchingModuleError:
        if target_modules is not None:
            raise
        layers = {}
    found = {(id(layer), "weight") for layer in layers.values()}
    if target_modules is None:
        for module in model.modules():
            if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
                found |= {(id(module), leaf) for leaf, p in module._parameters.items() if p is not None and p.ndim == 2}
    return found


def _reason(p: nn.Parameter, module: nn.Module, wanted: bool, rank: int) -> str:
    """Why it is not projected; empty if it is."""
    if p.ndim < 2:
        return "vector" if p.ndim else "scalar"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if not wanted:
        return "head or not targeted" if p.ndim == 2 else "not a matrix"
    return too_small(rank) if min(p.shape) <= rank else ""
