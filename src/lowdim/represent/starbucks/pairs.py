"""The fixed list of (layers, dimensions): its check, and the default for a model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from lowdim.errors import shown

__all__ = ["PAIRS", "check_pairs", "default_pairs"]

#: The paper's list, for an encoder of 12 layers and 768 dimensions.
PAIRS = ((2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768))


def default_pairs(layers: int, width: int) -> tuple[tuple[int, int], ...]:
    """Layers `N/m, 2N/m, …, N` with `m = min(6, N)`; dimensions that halve from the whole width.

    Example:
        >>> from lowdim.represent.starbucks.pairs import default_pairs
        >>> default_pairs(6, 384)
        ((1, 12), (2, 24), (3, 48), (4, 96), (5, 192), (6, 384))
    """
    count = 1
    while count < min(6, layers) and width >> count >= 1:
        count += 1
    return tuple((layers * (i + 1) // count, width >> (count - 1 - i)) for i in range(count))


def check_pairs(pairs: Any, layers: int, width: int) -> tuple[tuple[int, int], ...]:
    """The pairs as tuples of integers; both numbers grow, and the last pair is the whole model.

    Raises:
        ValueError: a layer outside 1..`layers`, a dimension outside 1..`width`, pairs that do not grow, another last pair.
        TypeError: no pairs of integers.
    """
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be a sequence of (layers, dimensions); got {shown(pairs)}")
    found: list[tuple[int, int]] = []
    for pair in pairs:
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Iterable):
            raise TypeError(f"pairs must hold (layers, dimensions); got {shown(pair)}")
        numbers = tuple(pair)
        if len(numbers) != 2 or any(isinstance(n, bool) or not hasattr(n, "__index__") for n in numbers):
            raise TypeError(f"pairs must hold two integers each, (layers, dimensions); got {shown(pair)}")
        found.append((numbers[0].__index__(), numbers[1].__index__()))
    if not found:
        raise ValueError("pairs must hold at least one (layers, dimensions); got none")
    for layer, dim in found:
        if not 1 <= layer <= layers:
            raise ValueError(f"pairs must have layers in [1, {layers}], the number of the encoder; got {layer} in {found}")
        if not 1 <= dim <= width:
            raise ValueError(f"pairs must have dimensions in [1, {width}], the encoder's width; got {dim} in {found}")
    if any(a[0] >= b[0] or a[1] >= b[1] for a, b in pairwise(found)):
        raise ValueError(f"pairs must grow in layers and in dimensions; got {found}")
    if found[-1] != (layers, width):
        raise ValueError(f"the last of pairs must be the whole model, ({layers}, {width}); got {found[-1]}")
    return tuple(found)
