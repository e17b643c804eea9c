"""Find layers by name, read their weight as a matrix, and swap them in place.

All families use this module, so a pattern means the same everywhere (as in PEFT: a name or a dotted suffix in a
list, a regular expression as a string), and tied weights stay tied.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.errors import NoMatchingModuleError, nearest

__all__ = [
    "CONVOLUTIONS",
    "HEAD_NAMES",
    "as_linear",
    "dense_matrix",
    "describe",
    "find_layers",
    "is_conv1d",
    "is_linear",
    "is_matrix_layer",
    "is_quantized",
    "make_linear",
    "matrix_shape",
    "parent_and_child",
    "replace_layer",
    "swap_layers",
    "tied_parameters",
    "weight_matrix",
    "with_matrix",
    "without_tied",
]

#: Last path components of modules that transformers uses as prediction heads; never touched by default.
HEAD_NAMES = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "cls", "classification_head"})

#: Layers whose kernel is one matrix once all but its first dimension are flattened.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Patterns = str | Iterable[str] | None


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' Conv1D (weight stored `(in, out)`), checked without importing transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is nn.Linear or transformers' Conv1D.

    The output projection inside nn.MultiheadAttention does not count: attention reads its weight and never calls it.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_matrix_layer(layer: nn.Module) -> bool:
    """Whether the layer applies one weight matrix: the layers of `is_linear`, and convolutions."""
    return is_linear(layer) or isinstance(layer, CONVOLUTIONS)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as a matrix `(out_features, in_features)`: a view where the layout allows.

    A convolution's matrix is `(out_channels, in_channels / groups · kernel)`, an embedding's `(dim, num)`.

    Raises:
        TypeError: the layer has no weight matrix.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        if isinstance(layer, nn.Embedding) or is_conv1d(layer):
            return weight.T
        if isinstance(layer, CONVOLUTIONS):
            return weight.flatten(1)
        if weight.ndim == 2:
            return weight
    raise TypeError(f"layer must have a weight matrix (nn.Linear, Conv1D, a convolution, nn.Embedding); got {describe(layer)}")


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weight in few bits: torchao's tensor subclasses, bitsandbytes' layers."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or not isinstance(weight, Tensor):
        return False
    return type(weight).__module__.startswith("torchao.") or type(layer).__module__.startswith("bitsandbytes.")


@torch.no_grad()
def dense_matrix(layer: nn.Module) -> Tensor:
    """The weight as a plain matrix `(out_features, in_features)`: `weight_matrix`, or a quantized weight's values in float32.

    Raises:
        TypeError: the layer has no weight matrix.
    """
    if not is_quantized(layer):
        return weight_matrix(layer)
    weight: Any = layer.weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize().to(torch.float32)
    # The layer's own kernel knows its format: its output for unit vectors is the weight.
    eye = torch.eye(layer.in_features, dtype=layer_dtype(layer), device=weight.device)  # type: ignore[arg-type]
    bias = getattr(layer, "bias", None)
    out = layer(eye) if bias is None else layer(eye) - bias
    return out.T.to(torch.float32).contiguous()


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's output: its weight's, or the one that a quantized layer computes in."""
    weight = getattr(layer, "weight", None)
    for tensor in (weight, getattr(layer, "bias", None)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor.dtype
    return getattr(layer, "compute_dtype", None) or torch.get_default_dtype()


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """`(out_features, in_features)` of the layer's matrix."""
    if is_quantized(layer) or hasattr(layer, "pristine_weight"):  # the second: an adapted layer, whose base may be quantized
        return layer.out_features, layer.in_features  # type: ignore[return-value]
    out_features, in_features = weight_matrix(layer).shape
    return out_features, in_features


def with_matrix(layer: nn.Module, matrix: Tensor) -> nn.Module:
    """A layer like `layer` with another weight matrix `(out, in)`; the given layer is unchanged.

    The new weight has the old one's dtype, device, layout and `requires_grad`. Bias and hooks are shared. A
    quantized layer becomes a plain nn.Linear in the dtype that it computed in.

    Raises:
        TypeError: the weight is not a parameter but computed from others (weight_norm, a parametrization).
    """
    if is_quantized(layer):
        bias = cast("Tensor | None", layer.bias)
        return make_linear(matrix.to(layer_dtype(layer)), bias, requires_grad=False).train(layer.training)
    old = layer._parameters.get("weight")
    if old is None:
        raise TypeError(f"the weight of {describe(layer)} is computed (weight_norm or a parametrization?); remove that first")
    if isinstance(layer, nn.Embedding) or is_conv1d(layer):
        matrix = matrix.T
    value = matrix.reshape(old.shape).to(device=old.device, dtype=old.dtype).contiguous()
    copy = shallow_copy(layer)
    copy.weight = nn.Parameter(value, requires_grad=old.requires_grad)
    return copy


def make_linear(
    weight: Tensor,  # (out_features, in_features)
    bias: Tensor | None = None,  # (out_features,)
    *,
    requires_grad: bool = True,
) -> nn.Linear:
    """A plain layer with these numbers, without a random draw; the weight is used as it is, the bias is copied."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad)
    return linear


def as_linear(layer: nn.Module) -> nn.Linear:
    """The layer itself if it is nn.Linear; for transformers' Conv1D an nn.Linear over the same numbers.

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(layer, nn.Linear):
        return layer
    if not is_conv1d(layer):
        raise TypeError(f"layer must be nn.Linear or Conv1D; got {describe(layer)}")
    linear = make_linear(weight_matrix(layer), cast("Tensor | None", layer.bias))
    return linear.train(layer.training)


def shallow_copy(layer: nn.Module) -> nn.Module:
    """A module of the same class that shares tensors and children but can be changed on its own."""
    copy = layer.__class__.__new__(layer.__class__)
    copy.__dict__.update(layer.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[name] = dict(layer.__dict__[name])
    return copy


def describe(layer: nn.Module) -> str:
    """Class and weight shape, for messages."""
    weight = getattr(layer, "weight", None)
    shape = f" with weight {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return f"{type(layer).__name__}{shape}"


def find_layers(
    model: nn.Module,
    target_modules: Patterns = None,
    *,
    exclude: Iterable[str] = (),
    accept: Callable[[nn.Module], bool] = is_matrix_layer,
) -> dict[str, nn.Module]:
    """The layers that patterns name, in model order.

    Args:
        target_modules: a list of module names or dotted suffixes (`"q_proj"`, `"layer.1.attention.query"`); a string is such a
            name, or a regular expression that must match the whole name; `"all-linear"` or None selects every layer that
            `accept` allows, except the model's prediction head. A module with two names is found by either and
            listed once, by its first.
        exclude: skip a layer whose name contains one of these.
        accept: which layers can be selected; a pattern that matches only others is an error.

    Raises:
        NoMatchingModuleError: a pattern matches nothing (the nearest names are listed), or only layers that cannot be selected.

    Example:
        >>> from torch import nn
        >>> from lowdim.surgery import find_layers
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), ["2"]))
        ['2']
    """
    skip = tuple(exclude)
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop("", None)
    if target_modules is None or target_modules == "all-linear":
        heads = _heads(model)
        found = [n for n, m in modules.items() if accept(m) and m not in heads and n.rsplit(".", 1)[-1] not in HEAD_NAMES]
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
        if not patterns:
            raise NoMatchingModuleError("target_modules must name at least one module; got an empty list")
        hits: set[str] = set()
        for pattern in patterns:
            match = [n for n in modules if _matches(pattern, n, isinstance(target_modules, str))]
            taken = [n for n in match if accept(modules[n])]
            if not taken:
                raise _no_match(pattern, match, modules, accept)
            hits.update(taken)
        found = [n for n in modules if n in hits]
    found = [n for n in found if not any(part in n for part in skip)]
    if not found:
        raise NoMatchingModuleError(
            f"no layer is left: target_modules={target_modules!r} with exclude={list(skip)!r} on {type(model).__name__}"
            f"{_structured_already(modules)}"
        )
    first: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first.setdefault(module, name)
    return {first[m]: m for m in dict.fromkeys(modules[n] for n in found)}


def parent_and_child(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The parent module of `name`, and its attribute name there."""
    path, _, child = name.rpartition(".")
    return model.get_submodule(path), child


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is. A module with several names is replaced under each of them."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old and parent is not new:
                parent._modules[child] = new


def swap_layers(model: nn.Module, layers: Mapping[str, nn.Module], make: Callable[[str, Any], nn.Module]) -> None:
    """Replace each layer by `make(name, layer)`, in place; layers that share their weight still share it afterwards.

    All new layers are made before any is swapped: after an error the model is unchanged.

    Raises:
        ValueError, TypeError: raised by `make`, with the layer's name in front.
    """
    made: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            made[name] = make(name, layer)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"layer {name}: {error}") from error
    first: dict[frozenset[int], str] = {}
    for name, layer in layers.items():
        key = frozenset(id(p) for path, p in layer.named_parameters() if path != "bias")
        twin = first.setdefault(key, name)
        if twin != name and key:
            same_bias = getattr(layer, "bias", None) is getattr(layers[twin], "bias", None)
            _share(made[twin], made[name], bias=same_bias)
    for name, new in made.items():
        replace_layer(model, name, new)


def without_tied(
    model: nn.Module, layers: Mapping[str, nn.Module], *, named: bool, within: bool = False
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """Separate the layers whose weight is also a parameter of another module, such as a head tied to an embedding.

    Args:
        layers: as `find_layers` gives them.
        named: whether the user asked for these layers by name; then skipping one gives a warning.
        within: count ties among `layers` too; without it they may share a weight with each other.

    Returns:
        The free layers, and for each tied one the full names of the other parameters that share its weight.

    Raises:
        NoMatchingModuleError: no layer is free.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, f"{path}.{name}"))
    mine = set() if within else set(layers.values())
    tied: dict[str, list[str]] = {}
    for name, layer in layers.items():
        others = [path for module, path in owners.get(id(layer.weight), []) if module is not layer and module not in mine]
        if others:
            tied[name] = others
    text = "; ".join(f"{name} shares its weight with {', '.join(others)}" for name, others in tied.items())
    if len(tied) == len(layers):
        raise NoMatchingModuleError(f"no layer is left: {text}. Untie it first, or name other layers in target_modules")
    if tied and named:
        warnings.warn(f"left unchanged because its weight is tied: {text}", UserWarning, stacklevel=3)
    return {name: layer for name, layer in layers.items() if name not in tied}, tied


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _share(source: nn.Module, target: nn.Module, *, bias: bool) -> None:
    for path, parameter in source.named_parameters():
        if path != "bias" or bias:
            parent, child = parent_and_child(target, path)
            setattr(parent, child, parameter)


def _heads(model: nn.Module) -> set[nn.Module]:
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return set()
    try:
        head = getter()
    except (NotImplementedError, AttributeError):
        return set()  # a transformers model without an output head
    return {head} if isinstance(head, nn.Module) else set()


def _matches(pattern: str, name: str, expression: bool) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return expression and re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise NoMatchingModuleError(f"target_modules: {pattern!r} is not a valid regular expression ({error})") from None


def _structured_already(modules: Mapping[str, nn.Module]) -> str:
    """A hint for a model whose layers were replaced before."""
    for name, module in modules.items():
        if callable(getattr(module, "to_linear", None)):
            return f"; {name} is a {type(module).__name__} already: lowdim.layers.densify makes compressed layers plain again"
    return ""


def _no_match(
    pattern: str, match: list[str], modules: Mapping[str, nn.Module], accept: Callable[[nn.Module], Any]
) -> NoMatchingModuleError:
    if match:
        return NoMatchingModuleError(
            f"target_modules: {pattern!r} matches only layers that cannot be adapted, "
            f"e.g. {match[0]} ({describe(modules[match[0]])})"
        )
    takeable = [n for n, m in modules.items() if accept(m)]
    leaves = sorted({n.rsplit(".", 1)[-1] for n in takeable})
    close = nearest(pattern, [*leaves, *takeable])
    return NoMatchingModuleError(
        f"target_modules: {pattern!r} matches no module; "
        f"nearest names: {', '.join(close) or 'none (the model has no matrix layer)'}"
    )


def freeze(model: nn.Module) -> None:
    """Switch off gradients for every parameter of the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (or buffer); the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
