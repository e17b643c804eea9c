"""What training does to each layer's weight: tail exponent, intruder dimensions, and how far its directions have turned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters import AdaptedLayer
from lowdim.adapters.core.composed import is_composed
from lowdim.companion import Companion
from lowdim.diagnose.core.weights import is_peft_layer, plain_model, weights_of
from lowdim.diagnose.farms.spectrum import NothingToMeasureError, farms
from lowdim.diagnose.intruders.measure import check_options
from lowdim.errors import NoMatchingModuleError, check_int, refuse_strange
from lowdim.linalg import gather, leading_vectors, stream_on
from lowdim.surgery import dense_matrix, find_layers, is_linear_class, named_layers, submodule

__all__ = ["NUMBERS", "LayerWatch", "NothingToWatchError"]

#: The numbers of a layer.
NUMBERS = ("alpha", "intruders", "overlap")
_FARMS = ("rows", "ratio", "windows", "step", "method", "xmin_pos", "bins", "min_eigs")


class NothingToWatchError(ValueError):
    """A model has no layer that can be watched; `left_out` says why, by layer."""

    def __init__(self, left_out: dict[str, str]):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        super().__init__(
            f"no layer to watch: {why or 'no linear layer besides the prediction head is trained, and none has an adapter'}"
        )
        self.left_out = left_out


class LayerWatch(Companion):
    """Measures layers every so many steps: tail exponent, intruder dimensions and overlap with the start.

    Formula: of a layer's effective weight `W` (base and update) with left singular vectors `u_j`, `u0_i` at the start: `alpha`
    as in `lowdim.diagnose.farms`; `intruders` = the number of `j < k` with `max_{i < kept} |u_jᵀ u0_i| < threshold`;
    `overlap = ‖U0_kᵀ U_k‖²_F / k`, the mean squared cosine: 1 unturned, about `k / out` for random directions.
    Of a weight of lower rank only the directions that it has are compared.

    Args:
        model: the model that is trained, as it is at the start.
        interval: steps between two measurements, >= 1.
        layers: names or dotted suffixes, or a regular expression, as in PEFT; None: every linear layer that is trained or whose
            adapter is, but not the prediction head. Layers of a low-dimensional form count by their `dense_weight()`.
        max_layers: of more layers, so many are measured, evenly spaced in the model's order; >= 1.
        k: leading left singular vectors that are compared, >= 1. Layers whose smaller side is at most `k` are left out.
        threshold: similarity below which a vector is an intruder, in (0, 1].
        kept: left singular vectors of the start that are kept, at least `k`. A direction of the start beyond these that has
            become a leading one counts as an intruder, so the count is at most too large; with `kept` at the layers' smaller
            side it is that of `lowdim.diagnose.intruder_dimensions`.
        seed: of the sketch of layers whose smaller side is above 512; the same one at each measurement.
        **farms_options: `rows`, `windows` and others of `lowdim.diagnose.farms`.

    Attributes:
        history: a row for the start (step 0) and for each measurement: `step`; `alpha`, `intruders` and `overlap`, the means
            over the layers; and `layers`, the same three for each. An alpha that cannot be fitted, as of a weight of low
            rank, is None.
        left_out: layer -> why it is not measured.

    Raises:
        NoMatchingModuleError: a layer that does not exist. NothingToWatchError: no layer is left.
        ValueError: an option out of range, a weight that is not finite (the layer is named).
        FloatingPointError: at a later step, a weight that is not finite any more (the layer and the step are named).
        TypeError: an unknown option.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.train import LayerWatch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        >>> watch = LayerWatch(model, interval=2, k=4)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(5 * torch.eye(32)[:, :1] @ torch.eye(32)[:1])  # one new, strong direction
        >>> for _ in range(2):
        ...     _ = watch.step()  # after each optimizer.step()
        >>> [(row["step"], row["layers"]["0"]["intruders"], row["layers"]["2"]["intruders"]) for row in watch.history]
        [(0, 0, 0), (2, 1, 0)]

    One effective weight is in memory at a time. Of the start, `kept` vectors of each layer are kept on the CPU and written to
    checkpoints: `4 · kept · out` bytes a layer. A measurement decomposes each layer and FARMS' windows of it: look at the
    cost before the interval is small. Directions of a flat spectrum (a random start) are arbitrary, and turn at once.

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280 (alpha); Shuttleworth et al., arXiv 2410.21228 (intruders).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        interval: int = 50,
        layers: str | Iterable[str] | None = None,
        max_layers: int = 64,
        k: int = 10,
        threshold: float = 0.5,
        kept: int = 64,
        seed: int = 0,
        **farms_options: Any,
    ):
        check_int("interval", interval, 1)
        check_int("max_layers", max_layers, 1)
        check_options(k, threshold)
        check_int("kept", kept, k)
        refuse_strange("LayerWatch", farms_options, _FARMS)
        self.model = plain_model(model)
        self.interval, self.seed, self.farms_options = interval, seed, farms_options
        self.k, self.threshold, self.kept = k, threshold, kept
        self.count = 0
        self.history: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self._bases: dict[str, Tensor] = {}  # of the start, (out, kept)
        self._begin(_spread(_found(self.model, layers), max_layers, self.left_out))

    @property
    def layers(self) -> list[str]:
        """The layers that are measured."""
        return list(self._bases)

    def _begin(self, names: Iterable[str]) -> None:
        """Measure the start: a first row, and what is kept."""
        measured = {}
        for name in names:
            weight = self._weight(name)
            if weight is None:
                continue
            if min(weight.shape) <= self.k:
                reason: str | None = f"its smaller side is {min(weight.shape)}, and k={self.k} directions need more"
            else:
                alpha, reason = self._alpha(name, weight)
            if reason is not None:
                self.left_out[name] = reason
                continue
            self._bases[name] = self._directions(name, weight).cpu()
            measured[name] = {"alpha": alpha, "intruders": 0, "overlap": 1.0}
        if not measured:
            raise NothingToWatchError(self.left_out)
        self.history.append(_row(0, measured))

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any] | None:
        """Count a step; every `interval` of them measures, and returns the new row of `history`."""
        self.count += 1
        return self.measure() if self.count % self.interval == 0 else None

    def finish(self) -> None:
        """Measure once more after the last step, unless that was just done."""
        if self.history[-1]["step"] != self.count:
            self.measure()

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Measure now, and return the new row of `history`. Layers that a method has removed are missing in it."""
        found = {}
        for name, base in self._bases.items():
            weight = self._weight(name)
            if weight is None or weight.shape[0] != len(base):
                continue
            try:
                alpha, _ = self._alpha(name, weight)
            except ValueError as error:
                raise FloatingPointError(f"{error} after step {self.count}") from None
            k = min(self.k, base.shape[1])
            cosines = self._directions(name, weight)[:, :k].mT @ base.to(weight)  # (k, kept)
            intruders = int((cosines.abs().amax(1) < self.threshold).sum())
            overlap = float(cosines[:, :k].square().sum()) / k
            found[name] = {"alpha": alpha, "intruders": intruders, "overlap": min(1.0, overlap)}
        self.history.append(_row(self.count, found))
        return self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """The count, the history and the directions of the start."""
        return {"count": self.count, "history": list(self.history), "bases": dict(self._bases)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned: further rows compare with the start of that training.

        Raises:
            ValueError: the state is of other layers, or of another number of directions.
        """
        own = {name: tuple(base.shape) for name, base in self._bases.items()}
        given = {name: tuple(base.shape) for name, base in state["bases"].items()}
        if differs := [name for name in {**own, **given} if own.get(name) != given.get(name)]:
            was, now = (each.get(differs[0], "not watched") for each in (given, own))
            raise ValueError(f"the state is of another watch: directions of layer {differs[0]!r} were {was} and are {now}")
        self.count, self.history = int(state["count"]), list(state["history"])
        self._bases = {name: base.detach().cpu().clone() for name, base in state["bases"].items()}

    @torch.no_grad()
    def _weight(self, name: str) -> Tensor | None:
        """The layer's effective weight `(out, in)` in float32 or better; None if the layer is gone."""
        try:
            layer: Any = submodule(self.model, name)
        except AttributeError:
            return None
        if isinstance(layer, AdaptedLayer):
            weight = layer.effective_weight()
        elif is_peft_layer(layer):
            weight = weights_of(layer)["weight"]
        else:
            weight = layer.dense_weight() if _is_structured(layer) else dense_matrix(layer)
        weight = gather(weight.detach())
        return weight if weight.dtype == torch.float64 else weight.float()

    def _alpha(self, name: str, weight: Tensor) -> tuple[float | None, str | None]:
        """The exponent; or None, and why the layer cannot be measured. ValueError: a weight that is not finite."""
        try:
            found = farms({name: weight}, exclude=(), **self.farms_options).layers[0]
        except NothingToMeasureError as error:
            return None, error.reasons[name]
        if found.xmin <= _noise(weight) ** 2 * found.spectral_norm:  # a weight of low rank: the tail begins in rounding errors
            return None, None
        return found.alpha, None

    def _directions(self, name: str, weight: Tensor) -> Tensor:
        """The first `kept` left singular vectors, without those of singular values that are rounding errors.

        The draws of a sketch are the same each time, so an unchanged weight gives the same.
        """
        generator = stream_on(weight.device, self.seed, "layer watch", name)
        basis, _ = leading_vectors(weight, min(self.kept, *weight.shape), generator=generator)
        strengths = torch.linalg.vector_norm(basis.mT @ weight, dim=1)
        return basis[:, : int((strengths > _noise(weight) * strengths.max()).sum())]


def _found(model: nn.Module, layers: str | Iterable[str] | None) -> list[str]:
    """The layers to watch, outermost ones only: an adapter's own linear layers are a part of the layer that they adapt."""
    accept = _is_trained if layers is None else _has_weight
    try:
        found = list(find_layers(model, layers, accept=accept, other_adapters=True, uncalled=True))
    except NoMatchingModuleError:
        if layers is not None:
            raise
        raise NothingToWatchError({}) from None
    inside = tuple(f"{name}." for name, module in named_layers(model).items() if _has_parts(module))
    return [name for name in found if not name.startswith(inside)]


def _has_weight(module: nn.Module) -> bool:
    if isinstance(module, AdaptedLayer):
        return module.kind == "linear"
    if is_peft_layer(module):
        return is_linear_class(module.get_base_layer())  # type: ignore[operator]
    return _is_structured(module) or is_linear_class(module)


def _is_trained(module: nn.Module) -> bool:
    if not _has_weight(module):
        return False
    if isinstance(module, AdaptedLayer) or is_composed(module):  # what is trained may stand elsewhere, shared by all layers
        return True
    named = module.named_parameters()
    return any(p.requires_grad or getattr(p, "trainable", False) for name, p in named if name.rpartition(".")[2] != "bias")


def _has_parts(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLayer) or is_peft_layer(module) or _is_structured(module)


def _is_structured(module: nn.Module) -> bool:
    """Whether it is a layer of lowdim in the place of a linear one."""
    return callable(getattr(module, "dense_weight", None)) and hasattr(module, "in_features")


def _spread(names: list[str], most: int, left_out: dict[str, str]) -> list[str]:
    """At most so many, evenly spaced."""
    if len(names) <= most:
        return names
    places = {round(i * (len(names) - 1) / max(1, most - 1)) for i in range(most)}
    reason = f"{most} of {len(names)} layers are measured (max_layers)"
    left_out.update((name, reason) for i, name in enumerate(names) if i not in places)
    return [name for i, name in enumerate(names) if i in places]


def _noise(weight: Tensor) -> float:
    """Singular values below this share of the largest are rounding errors, as in `torch.linalg.matrix_rank`."""
    return torch.finfo(weight.dtype).eps * max(weight.shape)


def _row(step: int, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    known = {key: [each[key] for each in layers.values() if each[key] is not None] for key in NUMBERS}
    means = {key: sum(values) / len(values) if values else None for key, values in known.items()}
    return {"step": step, **means, "layers": layers}
