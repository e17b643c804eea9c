"""Channels that stay when a model is pruned, and the recovery of low-rank factors to full width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate import LossFn, collect
from lowdim.errors import NoMatchingModuleError, check_choice, check_float, check_int, nearest
from lowdim.linalg import stream
from lowdim.surgery import describe

__all__ = [
    "ChannelGroup",
    "channel_scores",
    "gqa_channels",
    "linear_layer",
    "recover_lora",
    "select_channels",
]

CRITERIA = ("magnitude", "taylor", "random")


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that stay, for layers that write them (output rows) and layers that read them (input columns).

    Args:
        producers: full names of the layers whose rows, bias included, are kept.
        consumers: full names of the layers whose columns are kept.
        kept: indices of the channels that stay, ascending; a tensor `(count,)` or any sequence of ints.

    Raises:
        ValueError: `kept` is empty, unsorted, has duplicates or negative entries; or no layer is named.

    Example:
        >>> from lowdim.adapters import ChannelGroup
        >>> ChannelGroup(["mlp.up_proj"], ["mlp.down_proj"], [0, 2, 3]).kept
        tensor([0, 2, 3])
    """

    producers: Sequence[str]
    consumers: Sequence[str]
    kept: Tensor

    def __post_init__(self) -> None:
        for field in ("producers", "consumers"):
            names = getattr(self, field)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{field} must be a list of module names; got {names!r}")
            object.__setattr__(self, field, tuple(names))
        if not self.producers and not self.consumers:
            raise ValueError("a channel group must name at least one producer or consumer")
        object.__setattr__(self, "kept", check_kept("kept", self.kept))

    def to_json(self) -> dict[str, Any]:
        """Lists of names and ints."""
        return {"producers": list(self.producers), "consumers": list(self.consumers), "kept": self.kept.tolist()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChannelGroup) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.producers, self.consumers, tuple(self.kept.tolist())))


def check_kept(argument: str, kept: Any, size: int | None = None) -> Tensor:
    """`kept` as an int64 tensor on the CPU.

    Raises:
        ValueError: empty, not one-dimensional, not ascending and unique, or outside [0, size).
    """
    index = torch.as_tensor(kept)
    if index.ndim != 1 or not index.numel() or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{argument} must be a non-empty list of channel indices; got {kept!r}")
    index = index.detach().to(device="cpu", dtype=torch.int64)
    if bool((index.diff() <= 0).any()):
        raise ValueError(f"{argument} must be ascending without duplicates; got {index.tolist()}")
    if int(index[0]) < 0 or (size is not None and int(index[-1]) >= size):
        bound = "" if size is None else f" and below the {size} channels there are"
        raise ValueError(f"{argument} must be at least 0{bound}; got {int(index[0])} to {int(index[-1])}")
    return index


def recover_lora(
    A: Tensor,  # (r, in_kept)
    B: Tensor,  # (out_kept, r)
    in_features: int,
    out_features: int,
    kept_in: Tensor | None = None,
    kept_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Low-rank factors of a pruned layer at the full layer's size, with zeros at the channels that had been pruned.

    Formula: `A_R (r, in)` is zero but for `A_R[:, kept_in] = A`, `B_R (out, r)` is zero but for `B_R[kept_out] = B`. So
    `B_R A_R` acts on the kept channels as `B A` did, and is zero elsewhere.

    Args:
        kept_in, kept_out: ascending indices of the channels that the pruned layer has; None where none were pruned.

    Raises:
        ValueError: shapes that do not fit each other, the sizes or the indices.

    Example:
        >>> import torch
        >>> from lowdim.adapters import recover_lora
        >>> A_R, B_R = recover_lora(torch.ones(1, 2), torch.ones(3, 1), 4, 3, kept_in=torch.tensor([0, 3]))
        >>> A_R
        tensor([[1., 0., 0., 1.]])

    Source: Zhang et al., arXiv 2502.13533.
    """
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
        raise ValueError(f"A must be (rank, in) and B (out, rank); got {tuple(A.shape)} and {tuple(B.shape)}")
    wide_A = _spread(A, 1, "kept_in", kept_in, in_features)
    return wide_A, _spread(B, 0, "kept_out", kept_out, out_features)


def _spread(factor: Tensor, dim: int, argument: str, kept: Tensor | None, size: int) -> Tensor:
    have, name = factor.shape[dim], "A" if dim else "B"
    if kept is None:
        if have != size:
            raise ValueError(f"{name} has {have} channels and the layer {size}; without {argument} these must be equal")
        return factor
    index = check_kept(argument, kept, size)
    if len(index) != have:
        raise ValueError(f"{argument} must have one index for each of the {have} channels of {name}; got {len(index)}")
    shape = list(factor.shape)
    shape[dim] = size
    return factor.new_zeros(shape).index_copy(dim, index.to(factor.device), factor)


def gqa_channels(kept_kv_heads: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The channels that belong to whole key and value heads of a grouped-query attention.

    Args:
        kept_kv_heads: ascending indices of the key/value heads that stay.

    Returns:
        `kv`: rows of the key and value projections; `qo`: rows of the query and columns of the output projection.

    Raises:
        ValueError: num_heads is not a multiple of num_kv_heads, or a head is out of range, unsorted or duplicate.

    Example:
        >>> from lowdim.adapters import gqa_channels
        >>> gqa_channels([1], num_heads=4, num_kv_heads=2, head_dim=2)
        (tensor([2, 3]), tensor([4, 5, 6, 7]))

    Source: Zhang et al., arXiv 2502.13533.
    """
    for argument, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        check_int(argument, value, 1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {num_kv_heads}")
    heads = check_kept("kept_kv_heads", kept_kv_heads, num_kv_heads)
    return _blocks(heads, head_dim), _blocks(heads, head_dim * (num_heads // num_kv_heads))


def _blocks(index: Tensor, block: int) -> Tensor:
    return (index[:, None] * block + torch.arange(block)).flatten()


def select_channels(
    model: nn.Module,
    producers: Sequence[str],
    consumers: Sequence[str],
    ratio: float,
    criterion: str = "magnitude",
    block: int = 1,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Tensor:
    """The channels that stay when the least important `ratio` of a group is pruned.

    Formula: channel `c` scores `Σ w²` over the producers' rows `W[c, :]` and the consumers' columns `W[:, c]` (`"magnitude"`),
    the same sum of `|w · ∂L/∂w|` (`"taylor"`), or a uniform random number. A block scores the sum of its channels; the
    `round(ratio · blocks)` blocks with the smallest scores go, of equal ones the lower index first.

    Args:
        producers, consumers: full names of nn.Linear layers; the outputs of the former are the inputs of the latter.
        ratio: share of the blocks to prune, in [0, 1).
        block: consecutive channels that stay or go together: 1 for an MLP, `head_dim · num_heads / num_kv_heads` for query and
            output projections.
        batches, loss_fn: for `"taylor"`; consumed once.
        seed: for `"random"`.

    Returns:
        Indices, ascending, int64.

    Raises:
        ValueError: ratio outside [0, 1) or so large that nothing stays; `"taylor"` without data; widths that do not fit.
        NoMatchingModuleError: a name that the model lacks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.adapters import select_channels
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> len(select_channels(mlp, ["0"], ["2"], ratio=0.75))
        2

    Source: Zhang et al., arXiv 2502.13533; criteria as in LLM-Pruner.
    """
    check_float("ratio", ratio, 0.0, 1.0, high_open=True)
    check_int("block", block, 1)
    scores = channel_scores(model, producers, consumers, criterion, batches, loss_fn, seed)
    if len(scores) % block:
        raise ValueError(f"block must divide the {len(scores)} channels; got {block}")
    scores = scores.view(-1, block).sum(1)
    gone = round(ratio * len(scores))
    if gone == len(scores):
        raise ValueError(f"ratio={ratio} prunes all {len(scores)} blocks; at least one must stay")
    return _blocks(torch.sort(torch.sort(scores, stable=True).indices[gone:]).values, block)


def channel_scores(
    model: nn.Module,
    producers: Sequence[str],
    consumers: Sequence[str],
    criterion: str = "magnitude",
    batches: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> Tensor:
    """The score of each channel of a group, `(channels,)` float64 on the CPU; see `select_channels`."""
    check_choice("criterion", criterion, CRITERIA)
    rows = {name: linear_layer(model, name) for name in producers}
    columns = {name: linear_layer(model, name) for name in consumers}
    sizes = {name: layer.out_features for name, layer in rows.items()}
    sizes.update({name: layer.in_features for name, layer in columns.items() if name not in sizes})
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the producers' outputs and the consumers' inputs must be equal in number; got {sizes or 'no layer'}")
    count = next(iter(sizes.values()))
    if criterion == "random":
        return torch.rand(count, generator=stream(seed, "channels", *producers, *consumers), dtype=torch.float64)
    layers = {**rows, **columns}
    gradients: Mapping[str, Tensor] = {}
    if criterion == "taylor":
        if batches is None or loss_fn is None:
            raise ValueError("criterion='taylor' needs batches and loss_fn(model, batch) -> scalar, for the gradient")
        gradients = _gradients(model, layers, batches, loss_fn)
    scores = torch.zeros(count, dtype=torch.float64)
    for name, layer in layers.items():
        weight = layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
        terms = (weight * gradients[name].to(weight)).abs() if criterion == "taylor" else weight.square()
        if name in rows:
            scores += terms.sum(1).double().cpu()
        if name in columns:
            scores += terms.sum(0).double().cpu()
    return scores


def _gradients(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], loss_fn: LossFn) -> dict[str, Tensor]:
    """`Σ_batches ∂L/∂W` of each layer."""
    found = collect(model, layers, {"gradient"}, map(_Whole, batches), lambda model, whole: loss_fn(model, whole.batch))
    return {name: stats["gradient"] for name, stats in found.items()}


@dataclass(frozen=True)
class _Whole:
    """A wrapped batch: `collect` divides a batch's gradient by its size, and counts this as one row."""

    batch: Any


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear of this full name.

    Raises:
        NoMatchingModuleError: there is no module of this name.
        TypeError: another kind of layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise NoMatchingModuleError(f"the model has no module {name!r} (nearest: {', '.join(nearest(name, modules))})")
    layer = modules[name]
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"channels can be pruned in nn.Linear layers only; {name} is {describe(layer)}")
    return layer
