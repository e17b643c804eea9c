"""The updates of a folder that `Adapted.save` wrote, made one layer at a time; nothing is put into a model here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from lowdim.adapters.core.files.bounds import BoundedAllocation
from lowdim.adapters.core.files.layout import Header, Layer
from lowdim.adapters.core.fingerprints import layer_difference
from lowdim.adapters.core.guards import error_context, pristine_matrix, refuse_missing
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.method import Method, registered_methods
from lowdim.adapters.core.tensors import by_layer
from lowdim.adapters.core.update import WeightUpdate
from lowdim.adapters.core.whole import WholeMethod
from lowdim.errors import CheckpointError, LowdimError, nearest
from lowdim.surgery import matrix_shape, named_layers

__all__ = ["SavedUpdates", "reading", "saved_method"]

#: What a mistyped value, or one out of all proportion, ends in inside a method.
_NOT_VALID = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RuntimeError, MemoryError)


class SavedUpdates:
    """The updates of an adapter's file.

    Args:
        model: has the layers that the file names, of its shapes; their numbers are not read.

    Attributes:
        layers: those layers of `model`.

    Raises:
        CheckpointError: the model has other layers, or the description does not fit the method.
    """

    def __init__(self, model: nn.Module, folder: Path, method: Method, tensors: Mapping[str, Tensor], header: Header):
        self.folder, self.method, self.header = folder, method, header
        modules = named_layers(model)
        self.layers = {name: _find(modules, name, entry, folder) for name, entry in header.layers.items()}
        self._bounded = BoundedAllocation(tensors, [matrix_shape(layer) for layer in self.layers.values()])
        with reading(folder, header), self._bounded:
            self._prepared = method.prepare(self.layers, seed=header.seed, initialise=False)
        self._own = by_layer(tensors, header.layers)

    def check_base(self, name: str, layer: nn.Module) -> None:
        """Check that `layer` has the weight that the adapter was trained over.

        Raises:
            CheckpointError: it has another one.
        """
        recorded = self.header.layers[name].fingerprint
        difference = layer_difference(recorded, layer) if recorded else None
        if difference:
            raise CheckpointError(
                f"{self.folder} was trained on another base model: the weight of layer {name} {difference} "
                "(check_base=False attaches anyway)"
            )

    def update(self, name: str, layer: nn.Module) -> WeightUpdate:
        """The update of a layer, for the weight that `layer` has."""
        weight = pristine_matrix(layer).detach()
        own, stats = self._own[name], {**self._prepared[name], **self.header.layers[name].meta}
        dtype = next((t.dtype for t in own.values() if t.is_floating_point()), weight.dtype)
        with reading(self.folder, self.header), error_context(self.header.method, name, layer), self._bounded:
            update = self.method.blank(*weight.shape, stats=stats, dtype=dtype, device=weight.device)
            update.restore({key: value.to(weight.device) for key, value in own.items()}, weight)
        return update

    def adapted(self, name: str, layer: nn.Module) -> AdaptedLayer:
        """The layer with its update, by itself: not for methods whose updates share a module."""
        return self.method.layer_type(layer, self.update(name, layer), self.method.dropout)

    def shared(self) -> nn.Module | None:
        """The module that all layers share, without its numbers; None if the method has none."""
        with reading(self.folder, self.header), self._bounded:
            return self.method.shared(self.layers, seed=self.header.seed, initialise=False)


def saved_method(header: Header, tensors: Mapping[str, Tensor], folder: Path) -> Method:
    """The method of a saved adapter, with its hyperparameters.

    Raises:
        CheckpointError: it is unknown, or its hyperparameters are not valid.
    """
    cls = registered_methods().get(header.method)
    if cls is None:
        close = ", ".join(nearest(header.method, registered_methods()))
        raise CheckpointError(
            f"{folder}: no method {header.method!r} is registered (nearest: {close}); import its module first"
        )
    try:
        if issubclass(cls, WholeMethod):
            return cls.restored(header.config, tensors, folder)
        return cls.from_config(header.config)
    except CheckpointError:
        raise
    except _NOT_VALID as error:
        raise CheckpointError(f"{folder}: the configuration of {header.method} is not valid: {_reason(error)}") from error


@contextmanager
def reading(folder: Path, header: Header) -> Iterator[None]:
    """A value of the description that a method cannot use is a damaged or foreign file."""
    try:
        yield
    except LowdimError:
        raise
    except _NOT_VALID as error:
        raise CheckpointError(f"{folder}: the description of {header.method} is not valid: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text[:300]}"


def _find(modules: Mapping[str, nn.Module], name: str, entry: Layer, folder: Path) -> nn.Module:
    layer = modules.get(name)
    if layer is None:
        raise CheckpointError(
            f"{folder} adapts layer {name}, which the model lacks (nearest: {', '.join(nearest(name, modules))})"
        )
    refuse_missing({name: layer}, values=False)
    try:
        shape = matrix_shape(layer)
    except TypeError as error:
        raise CheckpointError(f"{folder} adapts layer {name}, which is no layer with a weight matrix here: {error}") from None
    if list(shape) != entry.shape:
        raise CheckpointError(f"{folder} adapts layer {name} of shape {tuple(entry.shape)}; the model's is {shape}")
    return layer
