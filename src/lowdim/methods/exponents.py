"""Tail exponents of a model's layers, from which ranks by layer follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from lowdim.adapters.core.guards import pristine_matrix, refuse_missing
from lowdim.diagnose.farms.ranks import layer_alphas
from lowdim.surgery import CONVOLUTIONS, find_layers, is_matrix_layer, matrix_shape

__all__ = ["Exponents", "layer_exponents"]


class Exponents(NamedTuple):
    """The exponents of a model's layers.

    Attributes:
        alphas: layer -> exponent.
        skipped: layer -> why it has none.
    """

    alphas: dict[str, float]
    skipped: dict[str, str]

    def refuse_few(self, what: str = "ranks") -> None:
        """Raise ValueError if fewer than two layers were measured; the others are named."""
        if len(self.alphas) > 1:
            return
        why = "; ".join(f"layer {name}: {reason}" for name, reason in list(self.skipped.items())[:3])
        measured = f"only layer {next(iter(self.alphas))} can be measured" if self.alphas else "no layer can be measured"
        raise ValueError(f"{what} by layer need at least two layers: {measured}{f'; {why}' if why else ''}")


def layer_exponents(model: nn.Module, head: Sequence[str] = (), **options: object) -> Exponents:
    """The exponent of every linear layer and convolution outside the head, by FARMS.

    Args:
        head: modules that are trained whole.
        **options: of `lowdim.diagnose.farms`.

    Raises:
        ValueError: a weight that is not finite, or that has no values (a model from its configuration alone).
    """
    inside = tuple(f"{name}." for name in head) or ("\0",)
    layers = find_layers(model, None, accept=is_matrix_layer)
    layers = {name: layer for name, layer in layers.items() if not f"{name}.".startswith(inside)}
    refuse_missing(layers)
    sides = {name: min(matrix_shape(layer)) for name, layer in layers.items()}
    return Exponents(*layer_alphas({name: _reader(layer) for name, layer in layers.items()}, sides, **options))


def _reader(layer: nn.Module) -> Callable[[], Tensor]:
    """What reads the weight when its turn comes: a kernel as it is, everything else as `(out, in)`."""
    if isinstance(layer, CONVOLUTIONS) and layer.weight.ndim == 4:
        return lambda: layer.weight  # type: ignore[return-value]
    return partial(pristine_matrix, layer)
