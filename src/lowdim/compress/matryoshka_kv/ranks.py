"""Ranks of the KV heads: drawn for training, found for a budget, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg import stream

__all__ = ["greedy_kv_ranks", "kv_cache_bytes", "sample_kv_ranks"]


def sample_kv_ranks(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    step: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Random ranks of keys and of values, each head its own: `step · randint(1, head_dim / step)`.

    Args:
        step: a divisor of `head_dim`; None means an eighth of it (at least 1).
        generator, seed: where the numbers come from; the generator has priority, and without either they are torch's own.

    Returns:
        Key ranks and value ranks `(num_layers, num_kv_heads)`, int64.

    Raises:
        ValueError: a size below 1, a step that does not divide `head_dim`.

    Example:
        >>> from lowdim.compress import sample_kv_ranks
        >>> keys, values = sample_kv_ranks(2, 3, 16, step=4, seed=0)
        >>> keys.shape, bool(((keys % 4 == 0) & (keys >= 4) & (keys <= 16)).all())
        (torch.Size([2, 3]), True)

    Source: arXiv 2410.14731.
    """
    for name, size in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        check_int(name, size, 1)
    step = _divisor("step", max(1, head_dim // 8) if step is None else step, head_dim)
    if generator is None and seed is not None:
        generator = stream(seed, "matryoshka ranks")
    device = "cpu" if generator is None else generator.device
    shape = (2, num_layers, num_kv_heads)
    drawn = step * torch.randint(1, head_dim // step + 1, shape, generator=generator, device=device)
    return drawn[0], drawn[1]


def greedy_kv_ranks(
    hidden: Callable[[Tensor, Tensor], Tensor],
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    budget: float,
    interval: int | None = None,
    round_fraction: float = 0.75,
) -> tuple[Tensor, Tensor]:
    """Ranks under a budget: in each round those fall whose loss is felt least.

    Formula: all ranks start at `head_dim`. A round computes `ref`, the final hidden state under the current ranks, and for each
    rank above `interval` the state h with that rank alone lowered by `interval`; its error is `‖ref - h‖ / ‖ref‖`. In ascending
    order (ties: keys first, then by layer and head) the first `⌊round_fraction · 2 · layers · heads⌋` ranks (at least one) are
    lowered. It stops as soon as the mean of rank / head_dim is within the budget.

    Args:
        hidden: `hidden(key_ranks, value_ranks) -> state`; `search_kv_ranks` makes it from a model.
        budget: share of the dense cache, in [interval / head_dim, 1].
        interval: a divisor of `head_dim`; None means a quarter of it (at least 1). No rank falls below it.
        round_fraction: in (0, 1]; a smaller one gives better ranks for more evaluations.

    Returns:
        Key ranks and value ranks `(num_layers, num_kv_heads)`, int64.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> from lowdim.compress import greedy_kv_ranks
        >>> weights = torch.tensor([[1.0, 10.0]])
        >>> hidden = lambda k, v: torch.cat([k * weights, 0.1 * v], 1)  # values matter little, the second head's keys much
        >>> [ranks.tolist() for ranks in greedy_kv_ranks(hidden, 1, 2, 8, budget=0.625, round_fraction=0.25)]
        [[[8, 8]], [[2, 2]]]

    Source: arXiv 2410.14731.
    """
    for name, size in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        check_int(name, size, 1)
    interval = _divisor("interval", max(1, head_dim // 4) if interval is None else interval, head_dim)
    check_float("budget", budget, 0.0, 1.0)
    check_float("round_fraction", round_fraction, 0.0, 1.0, low_open=True)
    if budget < interval / head_dim:
        raise ValueError(
            f"budget must be at least interval / head_dim = {interval / head_dim:g}, below which no rank can fall; got "
            f"{budget:g}"
        )
    ranks = torch.full((2, num_layers, num_kv_heads), head_dim)
    flat = ranks.view(-1)  # keys first, then by layer and head
    most = max(1, int(round_fraction * flat.numel()))
    allowed = budget * flat.numel() * head_dim + 1e-9
    while int(flat.sum()) > allowed:
        reference = hidden(ranks[0].clone(), ranks[1].clone())
        errors = {}
        for i in (flat > interval).nonzero().flatten().tolist():
            flat[i] -= interval
            errors[i] = float((reference - hidden(ranks[0].clone(), ranks[1].clone())).norm() / reference.norm())
            flat[i] += interval
        for i in sorted(errors, key=errors.__getitem__)[:most]:
            flat[i] -= interval
            if int(flat.sum()) <= allowed:
                break
    return ranks[0].clone(), ranks[1].clone()


def kv_cache_bytes(key_ranks: Any, value_ranks: Any, tokens: int, batch: int = 1, element_size: int = 2) -> int:
    """Bytes of a cache with these ranks: `(Σ r_k + Σ r_v) · tokens · batch · element_size`.

    The dense cache holds `2 · layers · heads · head_dim` numbers for a token; `MatryoshkaCache.nbytes()` gives what is held,
    which is at most 1 % more.

    Args:
        key_ranks, value_ranks: `(layers, heads)`, integers.
        element_size: bytes of a number: 2 in bfloat16, 4 in float32.

    Raises:
        ValueError: a negative or fractional count.

    Example:
        >>> from lowdim.compress import kv_cache_bytes
        >>> kv_cache_bytes([[4, 8]], [[2, 2]], tokens=1000)
        32000

    Source: arXiv 2410.14731.
    """
    for name, number in (("tokens", tokens), ("batch", batch), ("element_size", element_size)):
        check_int(name, number, 0)
    numbers = sum(int(torch.as_tensor(ranks, dtype=torch.int64).sum()) for ranks in (key_ranks, value_ranks))
    return numbers * tokens * batch * element_size


def _divisor(argument: str, value: Any, head_dim: int) -> int:
    check_int(argument, value, 1, head_dim)
    if head_dim % value:
        raise ValueError(f"{argument} must divide head_dim={head_dim}; got {value}")
    return value
