"""Bounds on what a model's configuration may ask for, so that a small file cannot keep a command busy or fill the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lowdim.errors import UnknownNameError, shown

__all__ = ["bounded_modules", "check_configuration"]

#: Numbers that a configuration class counts up to while it is built (one entry a layer, a label), by part of their name.
_COUNTED = ("layer", "label", "expert", "depth", "block", "stage", "codebook", "group", "level", "channels")
_MOST_COUNTED = 1_000_000
#: Any other number: sizes, positions, token ids. The largest in use are context lengths of ten million tokens.
_MOST = 2**40
#: Modules of one model. The largest model that is published with one module per expert has about 50,000.
_MOST_MODULES = 200_000


def check_configuration(content: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration (as in `config.json`) with numbers that no model has, before a class counts up to them.

    Raises:
        UnknownNameError: a number is too large (its key is named), or an attention kernel would be downloaded and run.

    Example:
        >>> from lowdim.models.limits import check_configuration
        >>> check_configuration({"num_hidden_layers": 32, "vocab_size": 128_256}, "config.json")
    """
    for key, value in _numbers(content, ""):
        most = _MOST_COUNTED if any(part in key.rpartition(".")[2] for part in _COUNTED) else _MOST
        if abs(value) > most:
            raise UnknownNameError(f"{where}: {shown(key)} is {shown(value)}; at most {most:,} is possible")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(content.get(key, "")):
            raise UnknownNameError(f"{where}: {key} names code to download, {shown(content[key])}; lowdim runs no such code")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    """Every integer of nested dicts and lists, with its dotted key; nesting is bounded by the JSON reader."""
    waiting = [(key, value)]
    while waiting:
        name, item = waiting.pop()
        if isinstance(item, Mapping):
            waiting += [(f"{name}.{inner}" if name else str(inner), content) for inner, content in item.items()]
        elif isinstance(item, (list, tuple)):
            waiting += [(name, content) for content in item]
        elif isinstance(item, int) and not isinstance(item, bool):
            yield name, item


@contextmanager
def bounded_modules(where: str) -> Iterator[None]:
    """Within it, building more than 200,000 modules is an error.

    Raises:
        UnknownNameError: the limit is reached.
    """
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise UnknownNameError(f"{where}: its configuration asks for more than {_MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
