"""The cost of one use of a layer, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Cost", "chain_cost"]


class Cost(NamedTuple):
    """Arithmetic and memory traffic of a layer for a given number of tokens.

    Units: `parameters` in numbers, `flops_*` in floating point operations, `bytes_*` in bytes read and written.
    """

    parameters: int
    flops_forward: int
    flops_backward: int
    bytes_forward: int
    bytes_backward: int


def chain_cost(products: Iterable[tuple[int, int, int]], tokens: int, *, parameters: int, itemsize: int = 4) -> Cost:
    """Cost of a chain of matrix products `(weights P, inputs I, outputs O)` on `tokens` rows.

    Formula: `flops_forward = 2 T Σ P`, `bytes_forward = itemsize Σ (T I + P + T O)`; backward is twice forward.

    Example:
        >>> from lowdim.linalg import chain_cost
        >>> chain_cost([(12, 3, 4)], 10, parameters=12).flops_forward
        240

    Source: the cost rule shared by the structured layers (Dao et al., ICML 2022, and its successors).
    """
    chain = list(products)
    flops = 2 * tokens * sum(p for p, _, _ in chain)
    traffic = itemsize * sum(tokens * i + p + tokens * o for p, i, o in chain)
    return Cost(parameters, flops, 2 * flops, traffic, 2 * traffic)
