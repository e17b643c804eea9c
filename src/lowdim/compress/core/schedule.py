"""Compression during training: a step after each optimizer step, and plain layers at the end."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowdim.companion import Companion
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.errors import CheckpointError, LowdimError
from lowdim.linalg import has_numbers, wide
from lowdim.surgery import swap_layers, weight_matrix

__all__ = ["Scheduled", "SparseTraining", "finalize", "scheduled_layers", "step"]


class Scheduled(nn.Module):
    """Mixin for a layer whose mask or pattern depends on the number of finished optimizer steps.

    A subclass calls `start_counting()` in its constructor, reads `finished`, and has `to_plain()`, as `MaskedLinear` does: a
    layer of the original class with the final mask applied. `count` is a buffer, so that checkpoints hold it;
    `finished` is the same as a Python int, without a GPU synchronisation in every forward.

    Attributes:
        system: the system's name, for the report of `finalize`.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import Scheduled
        >>> from lowdim.modules import MaskedLinear
        >>> class Fading(MaskedLinear, Scheduled):
        ...     def __init__(self, layer):
        ...         super().__init__(layer)
        ...         self.start_counting()
        ...     def mask(self):
        ...         return self.weight.new_full(self.weight.shape, 0.5**self.finished)
        ...     def description(self):
        ...         return {}
        >>> layer = Fading(nn.Linear(2, 1))
        >>> layer.step()
        >>> layer.mask().tolist(), int(layer.count)
        ([[0.5, 0.5]], 1)
    """

    system: ClassVar[str] = "sparse training"
    count: Tensor

    def start_counting(self) -> None:
        """Register the counter, at 0, as a buffer of the layer."""
        like = next(self.parameters())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=like.device))
        # The buffer, its version and its number; the number is known here, so that a forecast need not read it.
        self._read: tuple[Tensor, int, int] = (self.count, self.count._version, 0)

    @property
    def finished(self) -> int:
        """The number of finished optimizer steps."""
        count = self.count
        if count.is_meta:
            return 0  # a forecast, or a layer whose tensors are not loaded yet
        if self._read[0] is not count or self._read[1] != count._version:
            self._read = (count, count._version, int(count))
        return self._read[2]

    def step(self) -> None:
        """Count one more finished optimizer step."""
        done = self.finished + 1
        self.count.add_(1)
        if not self.count.is_meta:
            self._read = (self.count, self.count._version, done)

    def whole_weight(self) -> Tensor:
        """The trained weight before anything is left out, with its outputs first."""
        return cast(Tensor, getattr(self, "matrix", self.weight))


def scheduled_layers(model: nn.Module) -> dict[str, Scheduled]:
    """The layers that follow a schedule, by name.

    Raises:
        LowdimError: the model has no such layer.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Scheduled)}
    if not found:
        raise LowdimError(
            f"{type(model).__name__} has no layer that follows a schedule; was it finalized already, or never prepared?"
        )
    return found


def step(model: nn.Module) -> None:
    """Advance every scheduled layer by one: call it once after each optimizer step.

    Raises:
        LowdimError: the model has no scheduled layer.
    """
    for layer in scheduled_layers(model).values():
        layer.step()


def finalize(model: nn.Module) -> nn.Module:
    """Replace scheduled layers by plain ones with the final mask applied, in place: exact zeros that any tool loads.

    Returns:
        The model, or the new layer if the model itself is a scheduled one. Build a new optimizer afterwards: the old one holds
        tensors that are no longer used. `last_report(model)` has for each layer the zeros of its weight before and after, and
        what was dropped: `‖W - mask ⊙ W‖ / ‖W‖`.

    Raises:
        LowdimError: the model has no scheduled layer.
    """
    layers = scheduled_layers(model)
    if isinstance(model, Scheduled):
        return cast(Any, model).to_plain()
    rows = []

    def plain(name: str, layer: Any) -> nn.Module:
        made = layer.to_plain()
        if has_numbers(made.weight):
            rows.append(_row(name, layer, made))
        return made

    with torch.no_grad():
        swap_layers(model, layers, plain)
    if rows:
        systems = dict.fromkeys(layer.system for layer in layers.values())
        attach_report(model, CompressionReport(" and ".join(systems), tuple(rows), counted="zeros"))
    return model


def _row(name: str, layer: Any, plain: nn.Module) -> CompressedLayer:
    """What the last mask took from one layer."""
    final = weight_matrix(plain)
    whole = layer.whole_weight().flatten(1)
    before, after = (weight.numel() - int(torch.count_nonzero(weight)) for weight in (layer.weight, final))
    size = torch.linalg.vector_norm(wide(whole))
    dropped = float(torch.linalg.vector_norm(wide(whole) - wide(final)) / size) if bool(size) else 0.0
    what = f"{100 * after / max(final.numel(), 1):.3g} % zeros"
    out_features, in_features = final.shape
    return CompressedLayer(name, out_features, in_features, None, dropped, before, after, what=what, replaced=True)


class SparseTraining(Companion):
    """`step` and `finalize` as a `Companion`.

    Args:
        model: prepared by a scheduled system of `lowdim.compress`.
        optimizer: if given, checked to hold the parameters that the scheduled layers train.

    Raises:
        LowdimError: the model has no scheduled layer.
        ValueError: the optimizer lacks a parameter of one; it was built before the layers were prepared.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import Scheduled, SparseTraining
        >>> from lowdim.modules import MaskedLinear
        >>> class Halved(MaskedLinear, Scheduled):
        ...     def __init__(self, layer):
        ...         super().__init__(layer)
        ...         self.start_counting()
        ...     def mask(self):
        ...         return self.weight.new_full(self.weight.shape, 0.5**self.finished)
        ...     def description(self):
        ...         return {}
        >>> model = nn.Sequential(Halved(nn.Linear(2, 1)))
        >>> companion = SparseTraining(model)
        >>> companion.step()
        >>> companion.state_dict()
        {'counts': {'0': 1}}
        >>> companion.finish()
        >>> type(model[0]).__name__
        'Linear'
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        self._model = model
        layers = scheduled_layers(model)
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, layer in layers.items():
                lacking = [path for path, p in layer.named_parameters() if p.requires_grad and id(p) not in held]
                if lacking:
                    names = ", ".join(lacking)
                    raise ValueError(f"the optimizer does not hold {names} of layer {name}; build it after preparing the model")

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """`lowdim.compress.step(model)`."""
        step(self._model)

    def finish(self) -> None:
        """`lowdim.compress.finalize(model)`."""
        finalize(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The number of finished steps of each layer."""
        return {"counts": {name: layer.finished for name, layer in scheduled_layers(self._model).items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts.

        Raises:
            CheckpointError: they belong to other layers.
        """
        layers = scheduled_layers(self._model)
        if state["counts"].keys() != layers.keys():
            odd = sorted(state["counts"].keys() ^ layers.keys())
            raise CheckpointError(f"the checkpoint's schedule is for other layers than the model's: {', '.join(odd[:5])}")
        for name, layer in layers.items():
            layer.count.fill_(int(state["counts"][name]))
