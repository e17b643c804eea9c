"""The order of a network's channels: neighbours alike, so that a smooth field can follow the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lowdim.errors import listed

__all__ = ["permute_channels", "smooth_order", "total_variation"]

#: Up to this many channels the order is the best one.
_EXACT = 10
#: At most so many channels are tried as the first one.
_STARTS = 256


def smooth_order(features: Tensor) -> Tensor:  # (n, f) -> (n,)
    """The order of rows in which neighbours differ least: the shortest open path in L1 distance.

    It is exact for up to 10 rows. Above that it is the best of the nearest-neighbour paths from every row (where there are more
    than 256, from 256 evenly spaced ones) and of the given order, improved by 2-opt until no reversal of a stretch shortens it.
    The memory grows as `n²`, the time of the paths as `256 n²`, and each reversal takes `n²`.

    Returns:
        A permutation, int64 on the CPU; `features[permutation]` is the ordered table. It is never longer than the given order.

    Raises:
        ValueError: not a matrix, or entries that are not finite.

    Example:
        >>> import torch
        >>> from lowdim.compress import smooth_order
        >>> smooth_order(torch.tensor([[3.0], [1.0], [2.0], [9.0]])).tolist()
        [1, 2, 0, 3]

    Source: arXiv 2410.11878.
    """
    if features.ndim != 2:
        raise ValueError(f"features must have shape (n, f); got {tuple(features.shape)}")
    rows = features.detach().to("cpu", torch.float64)
    if not torch.isfinite(rows).all():
        raise ValueError("features must be finite")
    n = len(rows)
    if n < 3:
        return torch.arange(n)
    distance = torch.cdist(rows, rows, p=1)
    path = _best_path(distance) if n <= _EXACT else _good_path(distance)
    given = torch.arange(n)
    if not _length(distance, path) < _length(distance, given):
        return given
    return path if path[0] <= path[-1] else path.flip(0)


def permute_channels(model: nn.Module, groups: Iterable[Sequence[tuple[str, int]]]) -> list[Tensor]:
    """Put channels that are alike side by side, in place; the network computes the same function.

    A group lists all axes that share one order of channels: the output axis of a layer, its bias, and the input axis of every
    layer that reads them. A residual stream is one group over all layers that write or read it. Inputs and classes stay out.
    The features of a channel are its entries in all tensors of the group.

    Args:
        groups: lists of `(parameter name, axis)`.

    Returns:
        The permutation of each group.

    Raises:
        ValueError: an empty group, an unknown name, an axis that the parameter lacks or that is in two groups, unequal sizes;
            nothing is changed then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import permute_channels
        >>> net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 3)
        >>> before = net(x)
        >>> (order,) = permute_channels(net, [[("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]])
        >>> torch.allclose(net(x), before, atol=1e-6)
        True

    Source: arXiv 2410.11878.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    taken: set[tuple[int, int]] = set()
    axes: list[list[tuple[nn.Parameter, int]]] = []
    for number, group in enumerate(groups):
        found: dict[tuple[int, int], tuple[nn.Parameter, int]] = {}  # a tied weight once
        for name, axis in group:
            if name not in known:
                raise ValueError(f"groups[{number}] names {name!r}, which is no parameter; parameters are {listed(known)}")
            p = known[name]
            if not -p.ndim <= axis < p.ndim:
                raise ValueError(f"groups[{number}] names axis {axis} of {name}, whose shape is {tuple(p.shape)}")
            found[id(p), axis % p.ndim] = p, axis % p.ndim
        if not found:
            raise ValueError(f"groups[{number}] is empty; list (parameter name, axis) pairs")
        if taken & found.keys():
            raise ValueError(f"groups[{number}] has an axis that is in an earlier group: {listed(str(pair) for pair in group)}")
        if len({p.shape[axis] for p, axis in found.values()}) > 1:
            sizes = {f"{name} axis {axis}": known[name].shape[axis] for name, axis in group}
            raise ValueError(f"groups[{number}] must have axes of one size; got {sizes}")
        taken |= found.keys()
        axes.append(list(found.values()))
    orders = []
    with torch.no_grad():
        for group in axes:
            order = smooth_order(torch.cat([p.movedim(axis, 0).reshape(p.shape[axis], -1) for p, axis in group], 1))
            for p, axis in group:
                p.copy_(p.index_select(axis, order.to(p.device)))
            orders.append(order)
    return orders


def total_variation(model: nn.Module) -> float:
    """How much neighbouring channels differ: the mean over parameters of `Σ |ΔT|` along the output and the input channels.

    Vectors have one axis. It is a number to watch: `permute_channels` lowers it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import total_variation
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> total_variation(net)  # 2 down the columns, 1 + 3 along the rows
        6.0

    Source: arXiv 2410.11878.
    """
    found = [
        sum(float(p.detach().diff(dim=axis).abs().sum()) for axis in range(2 if p.ndim in (2, 4) else 1))
        for p in model.parameters()
    ]
    return sum(found) / max(len(found), 1)


def _length(distance: Tensor, path: Tensor) -> float:
    return float(distance[path[:-1], path[1:]].sum())


def _best_path(distance: Tensor) -> Tensor:
    """Dynamic programming over the sets of rows that are already on the path."""
    n = len(distance)
    length = torch.full((2**n, n), float("inf"), dtype=torch.float64)  # (set, last row)
    before = torch.zeros((2**n, n), dtype=torch.long)
    length[2 ** torch.arange(n), torch.arange(n)] = 0.0
    sets = torch.arange(2**n)
    sizes = sum((sets >> k) & 1 for k in range(n))
    for size in range(2, n + 1):
        for last in range(n):
            here = sets[(sizes == size) & ((sets >> last) & 1 == 1)]  # type: ignore[operator]
            best = (length[here ^ (1 << last)] + distance[:, last]).min(1)
            length[here, last], before[here, last] = best.values, best.indices
    left, last = 2**n - 1, int(length[-1].argmin())
    path = [last]
    while len(path) < n:
        left, last = left ^ (1 << last), int(before[left, last])
        path.append(last)
    return torch.tensor(path)


def _good_path(distance: Tensor) -> Tensor:
    """The shortest of the nearest-neighbour paths and the given order, improved by 2-opt."""
    n = len(distance)
    starts = torch.arange(n) if n <= _STARTS else torch.linspace(0, n - 1, _STARTS).round().long()
    each = torch.arange(len(starts))
    paths = starts.new_empty(len(starts), n)
    length = torch.zeros(len(starts), dtype=torch.float64)
    free = torch.zeros(len(starts), n, dtype=torch.float64)  # infinite where a row is on the path already
    last = starts
    for place in range(n):
        paths[:, place] = last
        free[each, last] = float("inf")
        if place < n - 1:
            step = (distance[last] + free).min(1)
            length += step.values
            last = step.indices
    path, given = paths[length.argmin()], torch.arange(n)
    if _length(distance, given) < _length(distance, path):
        path = given
    ends = nn.functional.pad(distance, (0, 1, 0, 1))  # a row at distance 0 from all: both ends are free
    tour = torch.cat([torch.tensor([n]), path, torch.tensor([n])])
    smallest = 1e-12 * max(float(distance.max()), 1e-300)
    while True:
        table = ends[tour][:, tour]
        link = table.diagonal(1)  # (n + 1,): from one place to the next
        # Reversing the places i … j: the links before i and after j are replaced.
        change = table[:-2, 1:-1] + table[1:-1, 2:] - link[:-1, None] - link[None, 1:]
        change = change.triu(1)
        best = int(change.argmin())
        if not float(change.flatten()[best]) < -smallest:
            return tour[1:-1]
        i, j = best // n + 1, best % n + 1
        tour[i : j + 1] = tour[i : j + 1].flip(0)
