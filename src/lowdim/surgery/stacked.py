"""Weight matrices that are no layer's: experts stacked into one parameter, matrices that a module keeps by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from lowdim.surgery.behaviour import left_out_reason
from lowdim.surgery.kinds import CONVOLUTIONS, HEAD_NAMES, describe, is_linear_class, is_matrix_class
from lowdim.surgery.quantized import unreadable
from lowdim.surgery.wrappers import holder, named_layers, plain_name, unwrap

__all__ = ["loose_matrices", "stacked_parameters", "unreached_note"]

#: A smaller share of the model's numbers is not worth a warning: of experts and left-out layers, and of other matrices.
_WORTH_SAYING, _MUCH = 0.01, 0.05


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters `(n, rows, columns)` with n > 1 that are not the kernel of a convolution: routed experts, by name."""
    return _loose(model)[0]


def loose_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of two or more dimensions, all larger than 1, of modules that are not layers of one matrix, by name."""
    stacked, others = _loose(model)
    return stacked | others


def _loose(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Stacked matrices, and the other ones: of torch's own layers (attention, recurrent, transposed) and of two dimensions."""
    stacked: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, module in named_layers(model).items():
        if is_matrix_class(module) or isinstance(module, CONVOLUTIONS):
            continue
        own = type(module).__module__.startswith("torch.nn.")
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2 and min(parameter.shape) > 1:
                (others if own or parameter.ndim == 2 else stacked)[f"{name}.{leaf}"] = parameter
    return stacked, others


def unreached_note(model: nn.Module, taken: Iterable[str], patterns: str | Iterable[str] | None) -> str:
    """What to say of weights that an adapter does not reach, with their share of the model's numbers; or nothing.

    Args:
        taken: names of the adapted layers; what is inside them is theirs.
        patterns: the user's patterns; only parameters that one of them names are mentioned. None: all, and the layers that
            are left out since they do more than their class says.
    """
    inside = set(taken)
    within = lambda name: holder(name, inside) is not None  # noqa: E731
    named = _matcher(patterns)
    stacked, others = ({name: p for name, p in loose.items() if not within(name) and named(name)} for loose in _loose(model))
    odd = _left_out(model, within) if patterns is None else {}
    total = sum(p.numel() for p in unwrap(model).parameters()) or 1
    parts = []
    for what, found, least in (
        ("experts stacked in one parameter", stacked, _WORTH_SAYING),
        ("matrices that are not a linear layer's or a convolution's", others, _MUCH),
    ):
        if (share := _numbers(found.values()) / total) >= least:
            parts.append(f"{what} ({_some(found)}; {share:.0%} of the model's parameters)")
    share = _numbers(p for module in odd.values() for p in module.parameters()) / total
    if share >= _WORTH_SAYING or any(map(unreadable, odd.values())):  # the weights of the latter are no parameters
        first = next(iter(odd.values()))
        much = f"; {share:.0%} of the model's parameters" if share else ""
        parts.append(f"{_some(odd)} ({describe(first)}{much}): {left_out_reason(first)}")
    return f"not adapted, so these weights stay frozen: {'; '.join(parts)}" if parts else ""


def _left_out(model: nn.Module, within: Callable[[str], bool]) -> dict[str, nn.Module]:
    """Linear layers and convolutions that are left out, by name. Embeddings and heads are never taken by default."""
    return {
        name: module
        for name, module in named_layers(model).items()
        if (is_linear_class(module) or isinstance(module, CONVOLUTIONS) or unreadable(module))
        and name.rpartition(".")[2] not in HEAD_NAMES
        and not within(f"{name}.")
        and left_out_reason(module)
    }


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())


def _some(names: Iterable[str]) -> str:
    kinds = sorted({".".join("*" if part.isdigit() else part for part in plain_name(name).split(".")) for name in names})
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")


def _matcher(patterns: str | Iterable[str] | None) -> Callable[[str], bool]:
    """Whether a parameter's name, or that of the module which holds it, is one that the patterns mean."""
    if patterns is None:
        return lambda name: True
    if isinstance(patterns, str):
        return lambda name: name.endswith(f".{patterns}") or re.fullmatch(patterns, name) is not None
    ends = tuple(f".{pattern}" for pattern in patterns)
    return lambda name: f".{name}".endswith(ends)
