"""Layers that are never called: the module around them reads their weight and computes with it."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator

from torch import nn

from lowdim.surgery.kinds import is_matrix_class

__all__ = ["never_called"]

#: What code asks of a weight that it does not compute with.
_ASKED = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_meta", "data_ptr", "element_size"}
)
#: Steps of the interpreter that load an attribute, and those without a meaning here.
_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_SILENT = frozenset({"CACHE", "EXTENDED_ARG", "NOP", "PRECALL"})
#: Methods that run before the first forward pass, or set weights.
_SETUP = ("__init__", "_init", "init", "reset", "tie", "_tie", "get_", "set_", "extra_repr", "load", "_load")


def never_called(model: nn.Module) -> dict[nn.Module, str]:
    """The matrix layers that their parent only reads, with the reason why an update of them would not act.

    The time-step projection and the convolution of Mamba's blocks are such layers, and embeddings of queries: an adapter in
    their place is never run. It is seen from the code of the parent's class: `self.layer.weight` is used there, and
    `self.layer` is neither called nor passed on.
    """
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        kind = type(parent)
        if kind.__module__.startswith("torch.") or not parent._modules:
            continue
        for name in _only_read(kind):
            child = parent._modules.get(name)
            if child is not None and is_matrix_class(child):
                found[child] = f"{kind.__name__} reads its weight and never calls it, so an adapter there would not act"
    return found


@functools.cache
def _only_read(kind: type) -> frozenset[str]:
    """Attributes of a module's class whose weight its methods compute with, and which they use in no other way."""
    codes = [code for function in _functions(kind) for code in _codes(function.__code__)]
    read = {name for code in codes if "weight" in code.co_names for name, as_weight in _uses(code) if as_weight}
    if not read:
        return frozenset()
    return frozenset(
        read - {name for code in codes if not read.isdisjoint(code.co_names) for name, yes in _uses(code) if not yes}
    )


def _functions(kind: type) -> Iterator[types.FunctionType]:
    """The methods of a class and its bases that may run in a forward pass."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            if name not in seen and isinstance(function, types.FunctionType) and not name.startswith(_SETUP):
                seen.add(name)
                yield function


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _uses(code: types.CodeType) -> Iterator[tuple[str, bool]]:
    """Each use of an attribute `self.a`: its name, and whether it is `self.a.weight`, in a computation.

    Questions about a layer (`self.a.bias`, `self.a.weight.dtype`) are no use.
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    for place, step in enumerate(steps[:-2]):
        owner, after, last = steps[place + 1], steps[place + 2], steps[place + 3 : place + 4]
        if not step.opname.startswith("LOAD_FAST") or owner.opname not in _LOADS:
            continue
        held = step.argval[-1] if isinstance(step.argval, tuple) else step.argval  # two loads in one step, from Python 3.13 on
        if held != "self":
            continue
        if owner.opname == "LOAD_METHOD" or after.opname not in _LOADS:
            yield owner.argval, False
        elif after.argval == "weight" and not (last and last[0].argval in _ASKED):
            yield owner.argval, True
