"""The capabilities of a method, read from its class instead of being listed in rows.

`tests/jobs/test_capabilities.py` checks each capability with each method that has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowdim.catalogue import Entry, Variant
from lowdim.errors import unknown

__all__ = ["CAPABILITIES", "Capability", "abilities", "parse_capabilities"]


@dataclass(frozen=True)
class Capability:
    """Something that some methods can do.

    Attributes:
        meaning: a short description.
        holds: `class -> whether`.
    """

    meaning: str
    holds: Callable[[Any], bool]


def _layerwise_adapter(cls: Any) -> bool:
    """An adapter that wraps single layers, not the whole model."""
    from lowdim.adapters import Method, ModelMethod

    return _is(cls, Method) and not _is(cls, ModelMethod)


def _merges(cls: Any) -> bool:
    from lowdim.adapters import Method

    return _is(cls, Method) or hasattr(cls, "to_linear")


def _converts(cls: Any) -> bool:
    """Convolutions: an adapter that supports them, or a layer with a convolution class in its module."""
    if _layerwise_adapter(cls):
        return "conv2d" in cls.takes
    twins = vars(inspect.getmodule(cls) or object()).values()
    return hasattr(cls, "from_linear") and any(hasattr(twin, "from_conv") for twin in twins)


def _embeds(cls: Any) -> bool:
    return _layerwise_adapter(cls) and "embedding" in cls.takes


def _frees_gradients(cls: Any) -> bool:
    from lowdim.optim import ProjectedOptimizer

    return _is(cls, ProjectedOptimizer)


def _trains_int8(cls: Any) -> bool:
    return _layerwise_adapter(cls) or (_frees_gradients(cls) and cls.hides_gradients)


def _is(cls: Any, base: type) -> bool:
    return inspect.isclass(cls) and issubclass(cls, base)


#: Name -> capability, in the order in which they are shown.
CAPABILITIES: dict[str, Capability] = {
    "merge": Capability("becomes a plain layer or model again", _merges),
    "conv": Capability("adapts or replaces convolutions", _converts),
    "embedding": Capability("adapts embeddings", _embeds),
    "int8": Capability("trains over, or in, weights of 8 bits", _trains_int8),
    "int4": Capability("trains over weights of 4 bits", _layerwise_adapter),
    "peft": Capability("is exported as a PEFT adapter", _layerwise_adapter),
    "layerwise": Capability("frees each gradient in the backward pass", _frees_gradients),
}


def abilities(thing: Entry | Variant) -> tuple[str, ...]:
    """The capabilities of a method, or of any method of a system.

    Example:
        >>> from lowdim.catalogue import find
        >>> from lowdim.jobs.capabilities import abilities
        >>> abilities(find("increlora"))
        ('merge', 'int8', 'int4', 'peft')
    """
    if not thing.target:
        return ()
    variants = thing.variants if isinstance(thing, Entry) else ()
    classes = [variant.build() for variant in variants] or [thing.build()]
    return tuple(name for name, capability in CAPABILITIES.items() if any(map(capability.holds, classes)))


def parse_capabilities(text: str) -> list[str]:
    """`"merge,conv"` as names.

    Raises:
        UnknownNameError: not a capability.
    """
    names = [name for part in text.split(",") if (name := part.strip())]
    for name in names or [text]:
        if name not in CAPABILITIES:
            raise unknown("--can", name, CAPABILITIES)
    return names
