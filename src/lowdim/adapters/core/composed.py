"""A model whose parameters are computed when they are read: `θ_i = θ_i⁰ + offset_i`, from few trained numbers.

A module that holds such a parameter gets its own class, in which the parameter's name is a property that adds the offset.
Nothing else about the module changes: `state_dict()` has the pre-trained parameters under their old names, tied parameters
stay one tensor, and a forward pass that gradient checkpointing repeats computes the parameters again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.linalg import is_sharded, wide

__all__ = ["Composition", "Places", "compose", "is_composed", "places_of", "refuse_spread", "release"]

#: The modules that hold a parameter, each with its attribute name; several if it is tied.
Places = list[tuple[nn.Module, str]]


class Composition(nn.Module):
    """The trained numbers that determine a model's parameters, stored in the model once.

    Subclasses name their parameters as in their paper and define `offset`.

    Attributes:
        names: of the composed parameters, in the order of `model.named_parameters()`.
        shapes: their shapes.
    """

    #: Whether the model's own `forward` goes through `around`.
    wraps: bool = False

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.names = list(parameters)
        self.shapes = [tuple(p.shape) for p in parameters.values()]

    def offset(self, index: int) -> Tensor:
        """The offset of parameter `names[index]`, in its shape, float32 or better, differentiable in the trained numbers."""
        raise NotImplementedError(f"{type(self).__name__} must define offset(index)")

    def touches(self, index: int) -> bool:
        """Whether `offset(index)` can differ from zero."""
        return True

    def compose(self, index: int, base: Tensor) -> Tensor:
        """The parameter that the model computes with; the sum is computed in float32 or better and rounded once."""
        return (wide(base) + self.offset(index).to(base.device)).to(base.dtype)

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the model's `forward`, where `wraps` is set."""
        return forward(*args, **kwargs)

    def about(self) -> dict[str, Any]:
        """The JSON entry of a checkpoint, next to the tensors."""
        return {}

    def check(self, about: Mapping[str, Any]) -> None:
        """Compare with a checkpoint's entry; raises `CheckpointError` if recomputed tensors that no file holds differ."""

    def spread(self) -> bool:
        """Whether the trained numbers are sharded, as FSDP2 leaves them between forward passes."""
        return any(is_sharded(p) for p in self.parameters())

    def unsaved(self) -> list[str]:
        """Names of buffers that every process makes for itself."""
        return [name for name, _ in self.named_buffers() if name in self._non_persistent_buffers_set]

    def forward(self, *inputs: Any) -> Any:
        """The input itself: a model that is an nn.Sequential calls every module that it holds."""
        return inputs[0] if len(inputs) == 1 else inputs


def places_of(model: nn.Module, names: Iterable[str]) -> dict[str, Places]:
    """The places of each named parameter."""
    parameters = dict(model.named_parameters())
    owners: dict[int, Places] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return {name: owners[id(parameters[name])] for name in names}


def compose(model: nn.Module, shared: Composition, places: Mapping[str, Places]) -> None:
    """Make `model` compute with composed parameters.

    Raises:
        TypeError: a module's class cannot be extended (TorchScript); nothing is changed.
    """
    done: list[nn.Module] = []
    try:
        for index, name in enumerate(shared.names):
            if shared.touches(index):
                for module, attribute in places[name]:
                    done.append(module)
                    _link(module, attribute, (shared, index))
        if shared.wraps:
            done.append(model)
            _link(model, "", (shared, -1))
    except TypeError as error:
        for module in done:
            _unlink(module)
        raise TypeError(f"the parameters of {type(done[-1]).__name__} cannot be composed: {error}") from error


def release(model: nn.Module) -> None:
    """Undo `compose`: modules get their own classes back and compute with the parameters that they hold."""
    for module in model.modules():
        if "_composed" in module.__dict__:
            _unlink(module)


def is_composed(model: nn.Module) -> bool:
    """Whether some parameter of the model is composed."""
    return any(module.__dict__.get("_composed") for module in model.modules())


def refuse_spread(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if a parameter is sharded over processes."""
    if any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(
            "the parameters are sharded over processes: save() the adapter, load it into an unsharded model with load_adapter, "
            "and merge it there"
        )


def _link(module: nn.Module, attribute: str, link: tuple[Composition, int]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("TorchScript modules read their parameters directly")
    links = module.__dict__.get("_composed", {})
    base = type(module)._composed_base if links else type(module)  # type: ignore[attr-defined]
    links = {**links, attribute: link}
    module.__class__ = _class_for(base, tuple(sorted(links)))
    module.__dict__["_composed"] = links  # not registered: the shared module is in the model once


def _unlink(module: nn.Module) -> None:
    base = type(module).__dict__.get("_composed_base")
    if base is not None:
        module.__class__ = base
        module.__dict__.pop("_composed", None)
    else:  # another library has subclassed our class: without links it reads the plain parameters
        module.__dict__["_composed"] = {}


@functools.cache
def _class_for(base: type, names: tuple[str, ...]) -> type:
    body: dict[str, Any] = {name: _reader(name) for name in names if name}
    if "" in names:
        body["forward"] = _around(base)
    body |= {"__doc__": base.__doc__, "__module__": base.__module__, "__reduce_ex__": _reduce}
    body |= {"_composed_base": base, "_composed_names": names}
    made = types.new_class(base.__name__, (base,), exec_body=lambda space: space.update(body))
    made.__qualname__ = base.__qualname__
    return made


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor | None:
        base = self._parameters[name]
        link = self._composed.get(name)
        if link is None or base is None or (is_sharded(base) and link[0].spread()):  # the last: FSDP2 asks for its own
            return base
        try:
            return link[0].compose(link[1], base)
        except AttributeError as error:  # nn.Module would treat it as a missing attribute and return the plain parameter
            raise RuntimeError(f"parameter {name} of {type(self).__name__} could not be composed: {error}") from error

    return property(read)


def _around(base: type) -> Any:
    plain = base.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        link = self._composed.get("")
        run = functools.partial(plain, self)
        return run(*args, **kwargs) if link is None else link[0].around(run, *args, **kwargs)

    return forward


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle with the module's original class, since ours cannot be imported by name."""
    found = self._composed_base.__reduce_ex__(self, protocol)
    own = type(self)
    if "_composed_base" not in own.__dict__ or not isinstance(found, tuple) or found[1] != (own,):
        return found
    state = found[2]
    if isinstance(self, nn.RNNBase):  # it remembers the tensors of its last call
        state = {**state, "_flat_weights": [self._parameters.get(name) for name in self._flat_weights_names]}
    return (_blank, (own._composed_base, own._composed_names), state, *found[3:])


def _blank(base: type, names: tuple[str, ...]) -> Any:
    made: Any = _class_for(base, names)
    return made.__new__(made)
