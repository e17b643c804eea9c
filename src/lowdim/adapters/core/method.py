"""The interface of an adapter: a Method attaches a WeightUpdate to a layer and returns an AdaptedLayer.

A new method is a frozen dataclass with `blank` (allocate from shapes) and `initialise` (fill from the weight), and a
WeightUpdate with `forward` and `dense`. Everything else (convolutions, merging, saving, export) is built on these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowdim.adapters.core.layer import AdaptedLayer, gain_of, kind_of, padding_of
from lowdim.adapters.core.update import WeightUpdate
from lowdim.errors import CheckpointError, Options
from lowdim.surgery import COMPUTED, dense_matrix, describe, is_quantized, matrix_shape, stores_codes

__all__ = ["Method", "ModelMethod", "Stats", "method_class", "open_field", "registered_methods"]

Stats = Mapping[str, Any]

_REGISTRY: dict[str, type[Method]] = {}


class Method(Options):
    """Hyperparameters of an adapter, as a frozen dataclass; makes updates, holds no tensors.

    Subclass with `@dataclass(frozen=True)`. A subclass registers under its class name, which checkpoints refer to.
    """

    #: What `lowdim.calibrate` must collect before attaching (see `calibrate.KINDS`).
    needs: ClassVar[frozenset[str]] = frozenset()
    #: Layer kinds that the method adapts, out of "linear" (nn.Linear, Conv1D), "conv2d", "embedding".
    takes: ClassVar[frozenset[str]] = frozenset({"linear", "conv2d"})

    #: Whether a layer's rank is at most min(out, in): its factors are singular vectors, or slices of shared bases. Factors that
    #: are drawn at random (LoRA) take any rank, as in PEFT.
    bounded_rank: ClassVar[bool] = False

    #: Whether each layer can have a rank of its own, which `blank` finds in `stats["rank"]`, with more trained numbers the
    #: higher it is.
    ranks_by_layer: ClassVar[bool] = False

    #: The class that `lowdim.adapt` returns, if the method acts on all layers together: a subclass of `Adapted`.
    adapted_type: ClassVar[type[Any] | None] = None
    #: The class of the adapted layers.
    layer_type: ClassVar[type[AdaptedLayer]] = AdaptedLayer

    #: Whether `target_modules` must be given, because its entries mean something (one column of a grid each).
    names_targets: ClassVar[bool] = False
    #: Whether chance decides how much of each layer is trained; a forecast then looks at more of them.
    draws_layers: ClassVar[bool] = False

    # Every method has these two fields; each dataclass declares them itself, so that its fields are in its paper's order.
    target_modules: Any
    dropout: float = 0.0

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if abstract:  # a base class that no checkpoint can name
            return
        other = _REGISTRY.get(cls.__name__)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"a method named {cls.__name__!r} is already registered by {other.__module__}")
        _REGISTRY[cls.__name__] = cls

    def blank(
        self, out_features: int, in_features: int, *, stats: Stats, dtype: torch.dtype, device: torch.device
    ) -> WeightUpdate:
        """Allocate the update from shapes alone (also on meta and fake tensors); check that the shapes allow it."""
        raise NotImplementedError(f"{type(self).__name__} must define blank(...)")

    def initialise(self, update: Any, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Fill a blank update from the layer's weight `(out, in)` and its statistics."""
        raise NotImplementedError(f"{type(self).__name__} must define initialise(...)")

    def prepare(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> dict[str, dict[str, Any]]:
        """Decide what concerns all layers together (shared bases, ranks); added to each layer's stats.

        `initialise=False` asks for shapes only: no decomposition, nothing read from the weights.
        """
        return {name: {} for name in layers}

    def shared(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> nn.Module | None:
        """A module that all layers of a model share and train or count together (architecture logits, a step counter), or None.

        It is put into the model once, so that trainers, checkpoints and wrappers see it; every update receives it through
        `WeightUpdate.connect`.
        """
        return None

    def capped_rank(self, layer: nn.Module, stats: Stats) -> Any:
        """The largest rank that `layer` allows, where the wanted one is above it; else None. `blank` finds it in `stats`."""
        wanted = stats.get("rank", getattr(self, "rank", None))
        limit = min(matrix_shape(layer))
        return limit if self.bounded_rank and wanted is not None and wanted > limit else None

    def accepts(self, layer: nn.Module) -> bool:
        """Whether this kind of layer can be adapted by the method."""
        return kind_of(layer) in self.takes

    def attach(
        self,
        layer: nn.Module,
        *,
        stats: Stats | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        initialise: bool = True,
    ) -> AdaptedLayer:
        """Wrap one layer. The given layer is frozen and otherwise unchanged.

        A layer that is already adapted gets another adapter, initialised from the pre-trained weight. A quantized weight is
        dequantized for the initialisation, and stays quantized.

        Args:
            stats: statistics of this layer, for methods that declare `needs`.
            generator: source of random numbers; None draws from torch's default one.
            dtype: of the update's tensors; None uses the weight's.
            initialise: False leaves the numbers uninitialised (planning, loading).

        Raises:
            TypeError: the method does not adapt this kind of layer.
            ValueError: the shape does not allow the hyperparameters, or statistics are missing.
        """
        if not self.accepts(layer):
            raise TypeError(f"{type(self).__name__} adapts {', '.join(sorted(self.takes))} layers; got {describe(layer)}")
        over = isinstance(layer, AdaptedLayer)
        gain_of(layer)  # an error for a layer that does more than its class says
        if not over and not is_quantized(layer):
            stored = layer._parameters.get("weight")
            if stored is None or stores_codes(stored):
                why = COMPUTED if stored is None else f"its dtype is {stored.dtype}"
                raise TypeError(f"the weight must be a floating point parameter, not computed ({why}); got {describe(layer)}")
        weight = (layer.pristine_weight() if over else dense_matrix(layer)).detach()
        out_features, in_features = weight.shape
        given = {} if stats is None else stats
        if initialise:
            for need in sorted(self.needs):
                self._check_stat(need, given, out_features, in_features)
        update = self.blank(out_features, in_features, stats=given, dtype=dtype or weight.dtype, device=weight.device)
        if initialise:
            with torch.no_grad():
                self.initialise(update, weight, given, generator)
                padding = padding_of(layer)
                if padding is not None:
                    update.clear_column(padding)
        return self.layer_type(layer, update, self.dropout)

    def param_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Optimizer groups for the trained parameters (name -> parameter); override for several rates."""
        return [{"params": list(parameters.values()), "lr": lr}]

    def peft(self, adapted: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """PEFT's config and tensors if PEFT has the same method, else None (it is then exported as LoRA)."""
        return None

    @classmethod
    def sample_batches(cls, steps: int) -> int:
        """The number of sample batches it uses before a training of `steps` steps, if it uses any."""
        return 4

    @classmethod
    def at_rank(cls, options: Mapping[str, Any], rank: int) -> dict[str, Any] | None:
        """The options for another rank; None if the method has no rank. Override if it has another name."""
        has = any(field.name == "rank" for field in dataclasses.fields(cast(Any, cls)))
        return {**options, "rank": rank} if has else None

    def config(self) -> dict[str, Any]:
        """The fields as JSON-able values, without open ones (`open_field`) that are still None."""
        values = {f: getattr(self, f.name) for f in dataclasses.fields(cast(Any, self))}
        return {f.name: _plain(value) for f, value in values.items() if value is not None or not f.metadata.get("open")}

    def saved(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint that belong to the method itself."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """The inverse of `config`."""
        names = {f.name for f in dataclasses.fields(cast(Any, cls))}
        extra = sorted(set(config) - names)
        if extra:
            raise CheckpointError(f"{cls.__name__} has no field {', '.join(extra)}; its fields are {', '.join(sorted(names))}")
        # JSON has no tuples; target_modules stays the list that people write.
        return cls(**{k: tuple(v) if isinstance(v, list) and k != "target_modules" else v for k, v in config.items()})

    def _check_stat(self, need: str, stats: Stats, out_features: int, in_features: int) -> None:
        value = stats.get(need)
        who = type(self).__name__
        if value is None:
            raise ValueError(
                f"{who} needs stats[{need!r}]; collect it by lowdim.adapt(model, method, batches=..., loss_fn=...)"
            )
        shapes = {"gradient": (out_features, in_features), "covariance": (in_features, in_features), "norms": (in_features,)}
        want = shapes.get(need)
        if want is not None and tuple(value.shape) != want:
            raise ValueError(f"stats[{need!r}] must have shape {want}; got {tuple(value.shape)}")
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"stats[{need!r}] has NaN or infinite entries")


class ModelMethod(Method, abstract=True):
    """A method that acts on the whole model instead of layer by layer; also attached by `lowdim.adapt`."""

    takes: ClassVar[frozenset[str]] = frozenset()

    def attach_model(self, model: nn.Module, *, seed: int = 0, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """Freeze `model` and make its parameters functions of few numbers, in place; returns an `Adapted`."""
        raise NotImplementedError(f"{type(self).__name__} must define attach_model(...)")


def open_field() -> Any:
    """A dataclass field that the training loop fills in. Files omit it while it is None, so that older versions read them."""
    return dataclasses.field(default=None, metadata={"open": True})


def method_class(name: str) -> type[Any]:
    """The method registered under this name, which checkpoints refer to.

    Raises:
        KeyError: no such method has been imported.
    """
    return _REGISTRY[name]


def registered_methods() -> dict[str, type[Method]]:
    """Class name -> class of every method that has been imported."""
    return dict(_REGISTRY)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list, set, frozenset)) else value
