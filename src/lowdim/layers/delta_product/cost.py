"""What a DeltaProduct layer computes and moves, from shapes alone."""

from __future__ import annotations

from lowdim.linalg import Cost, chain_cost

__all__ = ["chunked_core", "layer_cost", "recurrent_core"]


def layer_cost(
    projections: list[tuple[int, int]],  # (inputs, outputs) of each matrix
    channels: int,  # that are convolved
    taps: int,
    core: tuple[int, int],  # FLOPs and numbers moved by the recurrence
    *,
    tokens: int,
    parameters: int,
    itemsize: int,
) -> Cost:
    """The projections, the convolutions (`2 R taps` FLOPs a channel for `R` tokens) and the recurrence."""
    linear = chain_cost([(i * o, i, o) for i, o in projections], tokens, parameters=parameters, itemsize=itemsize)
    flops = linear.flops_forward + 2 * tokens * taps * channels + core[0]
    traffic = linear.bytes_forward + itemsize * (channels * (2 * tokens + taps) if taps else 0) + itemsize * core[1]
    return Cost(parameters, flops, 2 * flops, traffic, 2 * traffic)


def recurrent_core(rows: int, K: int, V: int, n: int, *, gated: bool) -> tuple[int, int]:
    """FLOPs and numbers moved token by token, for `rows` tokens times heads: each step reads and writes the state."""
    flops = rows * ((4 * n + 2) * K * V + (K * V if gated else 0))
    return flops, rows * (2 * K * V * (n + 1) + n * (K + V + 1) + K + V)


def chunked_core(sequences: int, length: int, chunk: int, K: int, V: int, n: int) -> tuple[int, int]:
    """FLOPs and numbers moved in chunks, for `sequences` rows times heads; a last short chunk counts with its own size."""
    whole, rest = divmod(length, chunk)
    flops = moved = 0
    for number, c in ((whole, chunk), (1 if rest else 0, rest)):
        m = c * n
        flops += number * (2 * m * m * K + m * m * V + 2 * c * m * (K + V) + 4 * m * K * V + 2 * c * K * V)
        moved += number * (m * (K + V + 1) + c * (K + V) + 2 * K * V)
    return sequences * flops, sequences * moved
