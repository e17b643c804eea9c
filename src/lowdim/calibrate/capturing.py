"""The outputs or inputs of named modules, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate.batches import given_batches
from lowdim.calibrate.passes import as_it_was, call_model
from lowdim.errors import nearest

__all__ = ["capture", "capturing"]


@contextmanager
def capturing(model: nn.Module, names: Iterable[str], *, inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the `with` block, every pass of the model fills the returned mapping; the hooks are removed at the end.

    Values stay attached to the graph, so they can be used in a loss. Each pass replaces the values of the one before. For a
    module that runs several times in a pass, all uses are joined along the first dimension.

    Args:
        names: module names, as `model.named_modules()` has them.
        inputs: capture the first argument of each module instead of its output. If a module returns a tuple or list, the first
            entry is captured.

    Raises:
        ValueError: no name, or one that is not a module of the model (the nearest are listed).
        TypeError: at the pass, for a module whose output or input is not a tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.calibrate import capturing
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with capturing(model, ["0"]) as found:
        ...     _ = model(torch.zeros(2, 4))
        >>> found["0"].shape
        torch.Size([2, 3])
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = list(names)
    if not wanted:
        raise ValueError("names must hold at least one module name; got none")
    for name in wanted:
        if name not in modules:
            raise ValueError(f"names: {name!r} is not a module of the model; nearest: {', '.join(nearest(name, modules))}")
    uses: dict[str, list[Tensor]] = {}
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = (args[0] if args else next(iter(kwargs.values()), None)) if inputs else output
            if isinstance(value, (tuple, list)) and value:
                value = value[0]
            if not isinstance(value, Tensor):
                side = "input" if inputs else "output"
                raise TypeError(f"module {name}: its {side} must be a tensor; got {type(value).__name__}")
            seen = uses.setdefault(name, [])
            seen.append(value)
            found[name] = value if len(seen) == 1 else torch.cat(seen)

        return take

    def start(*_: Any) -> None:
        uses.clear()
        found.clear()

    handles = [model.register_forward_pre_hook(start)]
    try:
        handles += [modules[name].register_forward_hook(hook(name), with_kwargs=True) for name in wanted]
        yield found
    finally:
        for handle in handles:
            handle.remove()


def capture(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], *, inputs: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The outputs (or inputs) of the named modules on each batch, one batch at a time, without gradients.

    The model runs in evaluation mode and is restored after each batch: mode, gradients and hooks. Only one batch's values
    are held, so a caller that sums or samples needs no more memory than that.

    Args:
        names, inputs: as in `capturing`.
        batches: an iterable, consumed once: tensors (`model(x)`), tuples (`model(*b)`) or mappings (`model(**b)`).

    Yields:
        For each batch `{name: tensor}`. A module that this batch did not reach is missing.

    Raises:
        ValueError, TypeError: as in `capturing`; `batches` is missing, or one batch instead of an iterable of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.calibrate import capture
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [found["2"].shape for found in capture(model, ["2"], [torch.ones(5, 4)], inputs=True)]
        [torch.Size([5, 3])]
    """
    wanted = list(names)
    for batch in given_batches(batches, "module outputs must be captured from sample data"):
        with as_it_was(model, {}, want_gradient=False), capturing(model, wanted, inputs=inputs) as found, torch.no_grad():
            call_model(model, batch)
        yield dict(found)
