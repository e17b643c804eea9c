"""Find a model's layers by name, as PEFT does: a name or a dotted suffix in a list, a regular expression as a string."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lowdim.errors import NoMatchingModuleError, nearest, warn_caller
from lowdim.surgery.behaviour import left_out_reason
from lowdim.surgery.callers import never_called
from lowdim.surgery.foreign import refuse_other_adapters
from lowdim.surgery.kinds import HEAD_NAMES, describe
from lowdim.surgery.matrices import is_matrix_layer
from lowdim.surgery.placement import refuse_offloaded
from lowdim.surgery.stacked import stacked_parameters
from lowdim.surgery.wrappers import named_layers, unwrap

__all__ = ["Patterns", "find_layers"]

Patterns = str | Iterable[str] | None
Accept = Callable[[nn.Module], Any]


def find_layers(
    model: nn.Module,
    target_modules: Patterns = None,
    *,
    exclude: Iterable[str] = (),
    accept: Accept = is_matrix_layer,
    other_adapters: bool = False,
    uncalled: bool = False,
) -> dict[str, nn.Module]:
    """The layers that patterns name, in model order.

    Names are those of the plain model, whatever it is wrapped in (compiled, data-parallel). A layer that does more than its
    class says (a router, an embedding of positions), or whose weight is read without calling it, is left out: by default in
    silence, with a warning where a pattern matches it among others, and with an error where a pattern matches nothing else.

    Args:
        target_modules: a list of module names or dotted suffixes (`"q_proj"`, `"layer.1.attention.query"`); a string is such a
            name, or a regular expression that must match the whole name; `"all-linear"` or None selects every layer that
            `accept` allows, except the model's prediction head. A module with two names is found by either and
            listed once, by its first.
        exclude: skip a layer whose name contains one of these.
        accept: which layers can be selected; a pattern that matches only others is an error.
        other_adapters: search a model that carries another library's adapter, too.
        uncalled: also layers that are read and never called, for methods that put nothing in their place.

    Raises:
        NoMatchingModuleError: a pattern matches nothing (the nearest names are listed), or only layers that cannot be selected.
        ValueError: the model carries another library's adapter, or accelerate has offloaded a layer's weight.

    Example:
        >>> from torch import nn
        >>> from lowdim.surgery import find_layers
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), ["2"]))
        ['2']
    """
    skip = tuple(exclude)
    if not other_adapters:
        refuse_other_adapters(model)
    modules = named_layers(model)
    unread = {} if uncalled else never_called(model)
    allowed = _remembered(lambda module: module not in unread and accept(module))
    if target_modules is None or target_modules == "all-linear":
        heads = _heads(unwrap(model))
        found = [n for n, m in modules.items() if m not in heads and n.rsplit(".", 1)[-1] not in HEAD_NAMES and allowed(m)]
    else:
        hits: set[str] = set()
        for pattern, match in _matches(target_modules, modules).items():
            taken = [n for n in match if allowed(modules[n])]
            if not taken:
                raise _no_match(pattern, match, model, modules, allowed, unread)
            _tell_left_out(pattern, [n for n in match if n not in taken], modules, unread)
            hits.update(taken)
        found = [n for n in modules if n in hits]
    found = [n for n in found if not any(part in n for part in skip)]
    if not found:
        raise NoMatchingModuleError(
            f"no layer is left: target_modules={target_modules!r} with exclude={list(skip)!r} on {type(unwrap(model)).__name__}"
            f"{_structured_already(modules)}{_all_odd(modules)}"
        )
    first: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first.setdefault(module, name)
    layers = {first[m]: m for m in dict.fromkeys(modules[n] for n in found)}
    for name, layer in layers.items():
        refuse_offloaded(layer, name)
    return layers


def _remembered(accept: Accept) -> Accept:
    """`accept`, asked once for each module."""
    known: dict[nn.Module, bool] = {}

    def allowed(module: nn.Module) -> bool:
        if module not in known:
            known[module] = bool(accept(module))
        return known[module]

    return allowed


def _heads(model: nn.Module) -> set[nn.Module]:
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return set()
    try:
        head = getter()
    except (NotImplementedError, AttributeError):
        return set()  # a transformers model without an output head
    return {head} if isinstance(head, nn.Module) else set()


def _matches(target_modules: str | Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The names that each pattern matches, in the order of the patterns."""
    single = isinstance(target_modules, str)
    patterns = [target_modules] if single else list(target_modules)
    if not patterns:
        raise NoMatchingModuleError("target_modules must name at least one module; got an empty list")
    match: dict[str, list[str]] = {str(pattern): [] for pattern in patterns}
    for name in modules:
        for suffix in _suffixes(name):
            if suffix in match:
                match[suffix].append(name)
    if single:
        expression = _expression(str(target_modules))
        named = set(match[str(target_modules)])
        match[str(target_modules)] = [n for n in modules if n in named or (expression is not None and expression.fullmatch(n))]
    return match


def _suffixes(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c`."""
    yield name
    place = name.find(".")
    while place >= 0:
        yield name[place + 1 :]
        place = name.find(".", place + 1)


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise NoMatchingModuleError(f"target_modules: {pattern!r} is not a valid regular expression ({error})") from None


def _structured_already(modules: Mapping[str, nn.Module]) -> str:
    """A hint for a model whose layers were replaced before."""
    for name, module in modules.items():
        if callable(getattr(module, "to_linear", None)):
            return f"; {name} is a {type(module).__name__} already: lowdim.layers.densify makes compressed layers plain again"
    return ""


def _all_odd(modules: Mapping[str, nn.Module]) -> str:
    """A hint for a model whose layers cannot be taken."""
    for name, module in modules.items():
        reason = left_out_reason(module)
        if reason:
            return f"; {name} ({describe(module)}) is left out: {reason}"
    return ""


def _tell_left_out(pattern: str, names: list[str], modules: Mapping[str, nn.Module], unread: Mapping[nn.Module, str]) -> None:
    odd = {name: reason for name in names if (reason := unread.get(modules[name]) or left_out_reason(modules[name]))}
    if odd:
        name, reason = next(iter(odd.items()))
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        warn_caller(f"target_modules: {pattern!r} also matches {name} ({describe(modules[name])}){more}, left out: {reason}")


def _no_match(
    pattern: str,
    match: list[str],
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    accept: Accept,
    unread: Mapping[nn.Module, str],
) -> NoMatchingModuleError:
    stacked = [name for name in stacked_parameters(model) if pattern in _suffixes(name)]
    if stacked and not match:
        shape = tuple(stacked_parameters(model)[stacked[0]].shape)
        return NoMatchingModuleError(
            f"target_modules: {pattern!r} is a parameter, not a layer: {stacked[0]} of shape {shape} stacks one matrix for "
            "each expert, and an adapter needs a layer with one weight matrix. Name other layers (attention, a shared expert), "
            "or load the model with its experts as separate nn.Linear layers"
        )
    if match:
        first = modules[match[0]]
        why = unread.get(first) or left_out_reason(first) or _holds_stacked(match[0], model)
        return NoMatchingModuleError(
            f"target_modules: {pattern!r} matches only layers that cannot be adapted, "
            f"e.g. {match[0]} ({describe(modules[match[0]])}){why and f': {why}'}"
        )
    takeable = [n for n, m in modules.items() if accept(m)]
    leaves = sorted({n.rsplit(".", 1)[-1] for n in takeable})
    close = nearest(pattern, [*leaves, *takeable])
    return NoMatchingModuleError(
        f"target_modules: {pattern!r} matches no module; "
        f"nearest names: {', '.join(close) or 'none (the model has no matrix layer)'}"
    )


def _holds_stacked(name: str, model: nn.Module) -> str:
    inside = [n for n in stacked_parameters(model) if n.startswith(f"{name}.")]
    return f"it keeps its weights as stacked parameters ({', '.join(inside[:2])}), not as layers" if inside else ""
