"""The interface of an adapter: a Method attaches a WeightUpdate to a layer and gives an AdaptedLayer.

A new method is a frozen dataclass with `blank` (allocate from shapes) and `initialise` (fill from the weight), and a
WeightUpdate with `forward` and `dense`. Everything else (convolutions, merging, saving, export) works from these.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.convolution import convolve
from lowdim.errors import CheckpointError, check_float
from lowdim.linalg import low_rank_norm
from lowdim.surgery import describe, is_conv1d, is_matrix_layer, weight_matrix, with_matrix

__all__ = ["AdaptedLayer", "Method", "ModelMethod", "Stats", "WeightUpdate", "kind_of", "registered_methods", "wide"]

Stats = Mapping[str, Any]

_REGISTRY: dict[str, type[Method]] = {}


class WeightUpdate(nn.Module):
    """The trained part of an adapted layer: a matrix `(out, in)` that is never built to be applied.

    Subclasses hold their parameters and buffers under the names of their paper and write `forward` and `dense`; they
    override the rest where the structure allows better than the default.
    """

    #: Names of parameters on which weight decay would pull the pre-trained weight itself towards zero.
    no_decay: frozenset[str] = frozenset()

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features

    def forward(
        self,
        x: Tensor,  # (..., in_features)
    ) -> Tensor:
        """What the update adds to the layer's output, `(..., out_features)`."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(x)")

    def dense(self) -> Tensor:
        """The matrix `(out, in)` that `forward` applies, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define dense()")

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """`y + forward(x)`; override to fuse the addition. `inplace=True` allows `y` to be overwritten."""
        return y + self(x).to(y.dtype)

    def rebase(self, weight: Tensor) -> Tensor | None:
        """The frozen base matrix for this update when `weight (out, in)` is the layer's own, or None to keep it.

        Called once after initialising and once after loading, so both give the same bits.
        """
        return None

    def start(self) -> Tensor | None:
        """What `rebase` took away from the weight, `(out, in)`; None where the base is the weight itself."""
        return None

    @torch.no_grad()
    def exact(self) -> Tensor:
        """`dense()` with its products taken in float32 or better, without gradient; for merging, where rounding comes last."""
        narrow = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in self.parameters())
        return wide((copy.deepcopy(self).float() if narrow else self).dense())

    @torch.no_grad()
    def delta(self) -> Tensor:
        """`W_eff − W₀ (out, in)`, in float32 or better, without gradient."""
        dense, start = self.exact(), self.start()
        return dense if start is None else dense - wide(start)

    def low_rank_delta(self) -> tuple[Tensor, Tensor] | None:
        """Factors `A (r, in)`, `B (out, r)` with `delta() = B A` exactly, or None where the delta has full rank."""
        return None

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor | None:
        """What the update adds to a convolution's output, or None where `forward` on patches is the way."""
        return None

    def columns(self, index: Tensor) -> Tensor:
        """Rows `dense()[:, index].T`, `(*index, out)`, for embeddings; only some methods can."""
        raise NotImplementedError(f"{type(self).__name__} cannot adapt an embedding")

    def meta(self) -> dict[str, Any]:
        """What `Method.blank` needs beside the shapes to allocate this very update again (JSON)."""
        return {}

    def saved(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return self.state_dict()

    def restore(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Take the tensors of a checkpoint; `weight` is the layer's own, for what is recomputed from it."""
        own = self.saved()
        wrong = sorted(set(own) ^ set(tensors)) or [k for k, v in own.items() if v.shape != tensors[k].shape]
        if wrong:
            raise CheckpointError(
                f"{type(self).__name__} does not fit the file: {', '.join(wrong)} missing, superfluous or misshapen"
            )
        self.load_state_dict(dict(tensors), strict=False)

    def start_forward(self, x: Tensor) -> Tensor:
        """What `start()` adds to the layer's output, `(..., out_features)`; only asked for where `start()` is not None."""
        start = self.start()
        assert start is not None
        return F.linear(x, start.to(x.dtype))

    def connect(self, shared: nn.Module, name: str) -> None:
        """Take what the method's `shared` module holds for layer `name`; called once, before the first forward."""

    def step(self) -> None:
        """After each optimizer step: schedules, proximal steps."""

    def regularizer(self) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None


class Method:
    """Hyperparameters of an adapter, as a frozen dataclass; makes updates, holds no tensors.

    Subclass with `@dataclass(frozen=True)`. A subclass registers under its class name, which checkpoints refer to.
    """

    #: What `lowdim.calibrate` must collect before attaching (see `calibrate.KINDS`).
    needs: ClassVar[frozenset[str]] = frozenset()
    #: Layer kinds that the method takes, of "linear" (nn.Linear, Conv1D), "conv2d", "embedding".
    takes: ClassVar[frozenset[str]] = frozenset({"linear", "conv2d"})

    # Every method has these two fields; they are declared by each dataclass so that its own come in its paper's order.
    target_modules: Any
    dropout: float = 0.0

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if abstract:  # a base of methods, not one that a checkpoint could name
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
        """What the method decides over all layers at once (shared bases, ranks), added to each layer's stats.

        `initialise=False` asks for shapes only: no decomposition, nothing read from the weights.
        """
        return {name: {} for name in layers}

    def shared(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> nn.Module | None:
        """What all layers of a model have in common and train or count together (architecture logits, a step counter), or None.

        It is put into the model once, so that trainers, checkpoints and wrappers see it; every update is told of it by
        `WeightUpdate.connect`.
        """
        return None

    def adapted_type(self) -> type[Any]:
        """The class of what `lowdim.adapt` returns; a subclass of `Adapted` where the method acts over all layers at once."""
        from lowdim.adapters.adapted import Adapted

        return Adapted

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
        """Wrap one layer. The given layer is frozen and otherwise left as it is.

        Args:
            stats: statistics of this layer, for methods that declare `needs`.
            generator: source of random numbers; None draws from torch's default one.
            dtype: of the update's tensors; None takes the weight's.
            initialise: False leaves the numbers unset (planning, loading).

        Raises:
            TypeError: not a layer that the method takes.
            ValueError: the shape does not allow the hyperparameters, or statistics are missing.
        """
        if not self.accepts(layer):
            raise TypeError(f"{type(self).__name__} takes {', '.join(sorted(self.takes))} layers; got {describe(layer)}")
        weight = weight_matrix(layer).detach()
        if "weight" not in layer._parameters or not weight.is_floating_point():
            raise TypeError(f"the weight must be a floating point parameter, not quantised or computed; got {describe(layer)}")
        out_features, in_features = weight.shape
        given = {} if stats is None else stats
        if initialise:
            for need in sorted(self.needs):
                self._check_stat(need, given, out_features, in_features)
        update = self.blank(out_features, in_features, stats=given, dtype=dtype or weight.dtype, device=weight.device)
        if initialise:
            with torch.no_grad():
                self.initialise(update, weight, given, generator)
        return AdaptedLayer(layer, update, self.dropout)

    def param_groups(self, parameters: Mapping[str, nn.Parameter], lr: float) -> list[dict[str, Any]]:
        """Optimizer groups for the trained parameters (name -> parameter); override for several rates."""
        return [{"params": list(parameters.values()), "lr": lr}]

    def peft(self, adapted: Any) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """PEFT's config and tensors where PEFT has this very method, else None (then it goes as LoRA)."""
        return None

    def config(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(cast(Any, self))}

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
    """A method that acts on the model as a whole and not layer by layer; reached by the same `lowdim.adapt`."""

    takes: ClassVar[frozenset[str]] = frozenset()

    def attach_model(self, model: nn.Module, *, seed: int = 0, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """Freeze `model`, make its parameters functions of few numbers, in place; gives an `Adapted`."""
        raise NotImplementedError(f"{type(self).__name__} must define attach_model(...)")


class AdaptedLayer(nn.Module):
    """A frozen layer with a trained update beside it: `y = base(x) + update(dropout(x))`.

    Works over nn.Linear, transformers' Conv1D, nn.Conv2d (the update acts on patches; with groups, through the small dense
    kernel) and, where the update can look up columns, nn.Embedding.
    """

    def __init__(self, layer: nn.Module, update: WeightUpdate, dropout: float = 0.0):
        super().__init__()
        check_float("dropout", dropout, 0.0, 1.0, high_open=True)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        matrix = update.rebase(weight_matrix(layer).detach())
        self.base = layer if matrix is None else with_matrix(layer, matrix)
        self.update = update
        self.dropout = dropout
        self.kind = kind_of(layer)
        self.rebased = matrix is not None
        self.train(layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update's."""
        y = self.base(x, *args, **kwargs)
        if self.kind == "embedding":
            return y + self.update.columns(x).to(y.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        x = self._cast(x)
        if self.kind == "conv2d":
            return y + convolve(self.update, cast(nn.Conv2d, self.base), x).to(y.dtype)
        return self.update.add_to(y, x, inplace=self._may_overwrite())

    def delta(self) -> Tensor:
        """`W_eff − W₀` as a matrix `(out, in)`, in float32 or better."""
        return self.update.delta()

    def delta_norm(self) -> float:
        """`‖W_eff − W₀‖_F`, from thin factors where the update has them."""
        with torch.no_grad():
            factors = self.update.low_rank_delta()
            norm = torch.linalg.matrix_norm(self.delta()) if factors is None else low_rank_norm(*map(wide, factors))
            return float(norm)

    def effective_weight(self) -> Tensor:
        """`W_eff (out, in)` in float32 or better."""
        with torch.no_grad():
            return wide(weight_matrix(self.base)) + self.update.exact()

    def original_weight(self) -> Tensor:
        """`W₀ (out, in)`, up to the rounding of a rebased weight."""
        with torch.no_grad():
            base, start = weight_matrix(self.base), self.update.start()
            return base if start is None else (wide(base) + wide(start)).to(base.dtype)

    def merged(self) -> nn.Module:
        """A plain layer with `W_eff`, computed in float32 or better and rounded once."""
        return with_matrix(self.base, self.effective_weight())

    @property
    def weight(self) -> Tensor:
        """The frozen base weight in the layer's own layout; code that asks a layer for its dtype or device finds it here."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", getattr(self.base, "bias", None))

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return self.update.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight matrix."""
        return self.update.out_features

    def _cast(self, x: Tensor) -> Tensor:
        parameter = next(self.update.parameters(), None)
        if parameter is None or x.dtype == parameter.dtype or torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(parameter.dtype)

    def _may_overwrite(self) -> bool:
        # Nothing but a hook or another class needs a linear layer's output; under autograd the copy is cheaper than the
        # bookkeeping of a change in place.
        return not torch.is_grad_enabled() and type(self.base) is nn.Linear and not self.base._forward_hooks

    def update_dtype(self) -> torch.dtype:
        """The dtype of the trained tensors."""
        parameter = next(self.update.parameters(), None)
        return self.weight.dtype if parameter is None else parameter.dtype


def kind_of(layer: nn.Module) -> str:
    """`"linear"`, `"conv2d"`, `"embedding"`, or `"other"`."""
    if isinstance(layer, nn.Conv2d):
        return "conv2d"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(layer, nn.Linear) or is_conv1d(layer) or is_matrix_layer(layer) else "other"


def registered_methods() -> dict[str, type[Method]]:
    """Class name -> class of every method that has been imported."""
    return dict(_REGISTRY)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list, set, frozenset)) else value
