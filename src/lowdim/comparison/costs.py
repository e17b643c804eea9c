"""Structured layers at the cost of dense ones: the parameters and FLOPs of a model with them, and the sizes that match.

From random weights a structured layer competes with the dense one. So its sizes are those at which all layers that it replaces
have as many parameters (or need as many FLOPs a token) as the dense ones have, and a quarter of that, and so on. A method with
a rank gets the rank that comes nearest; one with blocks alone (Monarch, BlockShuffle) the number of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lowdim.catalogue import Variant, variant
from lowdim.comparison.ladder import FACTORS, matched, own_rank, sized
from lowdim.modules import StructuredLinear
from lowdim.surgery import find_layers, holder, is_linear, matrix_shape

__all__ = ["Costs", "DenseMatch", "costs_of"]

_BLOCKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Costs:
    """Trained parameters of a model, and operations (a product and a sum are two) of its layers for one token, forward."""

    parameters: int
    flops: int

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.flops:,} FLOPs a token"


def costs_of(model: nn.Module, trained: int, tokens: int) -> Costs:
    """The costs of a model from its shapes; attention's own products, which no layer changes, are not counted.

    Args:
        trained: its trained parameters.
        tokens: of a forward pass; what a layer computes once for all of them is spread over these.
    """
    flops, counted = 0.0, set[str]()
    for name, module in model.named_modules():
        if holder(name, counted) is not None:
            continue
        if isinstance(module, StructuredLinear):
            flops += module.cost(tokens).flops_forward / tokens
            counted.add(name)
        elif not isinstance(module, nn.Embedding):
            flops += sum(2 * p.numel() for p in module._parameters.values() if p is not None and p.ndim > 1)
    return Costs(trained, round(flops))


class DenseMatch:
    """Finds the sizes of structured layers, and remembers what each costs.

    Args:
        measure: the costs of a method.
        equal: `"parameters"` or `"flops"`.
        model: with dense layers.
        sizes: how many sizes each method has.
        limit: the highest rank that the layers allow.
    """

    def __init__(self, measure: Callable[[Variant], Costs], equal: str, model: nn.Module, sizes: int, limit: int):
        self._measure, self.equal, self.limit = measure, equal, limit
        layers = find_layers(model, None, accept=is_linear)
        self.dense = measure(variant("full"))
        replaced = sum(math.prod(matrix_shape(layer)) for layer in layers.values()) * (2 if equal == "flops" else 1)
        self.rest = getattr(self.dense, equal) - replaced
        self.budgets = [replaced * factor for factor in FACTORS if factor <= 1][:sizes]

    def costs(self, each: Variant) -> Costs:
        """Of a method at its size."""
        return self._measure(each)

    def sizes(self, each: Variant) -> list[int] | None:
        """Ranks, or numbers of blocks, one for each budget; None for what is no layer, or has neither.

        Raises:
            ValueError, TypeError: no size fits the model.
        """
        if each.kind != "layer":
            return None
        if own_rank(each) is not None:
            guesses = {max(1, self.limit // (2 * 4**place)): budget for place, budget in enumerate(self.budgets)}
            return matched(each, guesses, self.limit, lambda v: getattr(self._measure(v), self.equal) - self.rest, line=False)
        if "nblocks" not in each.options:
            return None
        known = self._by_blocks(each)
        best = (min(known, key=lambda n: abs(math.log(known[n] / budget))) for budget in self.budgets)
        return list(dict.fromkeys(best))

    def _by_blocks(self, each: Variant) -> Mapping[int, float]:
        known: dict[int, float] = {}
        refused: Exception | None = None
        for blocks in _BLOCKS:
            try:
                known[blocks] = max(1.0, getattr(self._measure(sized(each, blocks)), self.equal) - self.rest)
            except ValueError as error:
                refused = error
        if not known and refused is not None:
            raise refused
        return known
