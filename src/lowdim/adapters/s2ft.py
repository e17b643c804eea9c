"""S²FT: whole channels of a weight are trained, the rest is frozen."""

from __future__ import annotations

import bisect
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.guards import error_context
from lowdim.adapters.core.method import Method, Stats
from lowdim.adapters.core.update import WeightUpdate
from lowdim.errors import check_choice, check_float, check_int, unknown
from lowdim.linalg import add_product, derive_seed, stream, wide
from lowdim.surgery import matrix_shape

__all__ = ["S2FT", "S2FTUpdate", "s2ft_scores"]

_AXES = ("in", "out")
_SELECTIONS = ("random", "weight", "activation", "gradient")


class S2FTUpdate(WeightUpdate):
    """`ΔW[:, indices] = s2 (out, k)` for axis "in", `ΔW[indices, :] = s2 (k, in)` for axis "out"; zero elsewhere.

    Without a channel, `s2` is an empty buffer. For the backward pass axis "in" keeps `x[..., indices]`; axis "out" reads only
    the rows `indices` of the output's gradient.
    """

    def __init__(self, out_features: int, in_features: int, axis: str, count: int, *, dtype: Any, device: Any):
        super().__init__(out_features, in_features)
        self.axis = axis
        shape = (out_features, count) if axis == "in" else (count, in_features)
        s2 = torch.zeros(shape, dtype=dtype, device=device)
        if count:
            self.s2 = nn.Parameter(s2)
        else:  # FSDP2 cannot shard an empty parameter
            self.register_buffer("s2", s2)
        self.register_buffer("indices", torch.arange(count, dtype=torch.int64, device=device))

    s2: Tensor
    indices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`s2 · x[..., indices]`, or `s2 x` at the places `indices`."""
        if self.axis == "in":
            return F.linear(x.index_select(-1, self.indices), self.s2)
        part = F.linear(x, self.s2)
        return part.new_zeros(*part.shape[:-1], self.out_features).index_copy_(-1, self.indices, part)

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused: one multiply-add onto `y`, or an addition to the chosen channels of `y` alone."""
        if not len(self.indices):
            return y
        if self.axis == "in":
            return add_product(y, x.index_select(-1, self.indices), self.s2, inplace=inplace)
        part = F.linear(x, self.s2).to(y.dtype)
        return y.index_add_(-1, self.indices, part) if inplace else y.index_add(-1, self.indices, part)

    def dense(self) -> Tensor:
        """`s2` at its place in zeros, `(out, in)`."""
        return self.s2.new_zeros(self.out_features, self.in_features).index_copy(self._dim(), self.indices, self.s2)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """`A (k, in)` and `B (out, k)` with `ΔW = B A` exactly: `s2` and a matrix with a single 1 for each channel."""
        size = self.in_features if self.axis == "in" else self.out_features
        places = F.one_hot(self.indices, size).to(self.s2.dtype)  # (k, size)
        return (places, self.s2) if self.axis == "in" else (self.s2, places.mT)

    @torch.no_grad()
    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """`lora_factors()` in float32 or better; one row of zeros where no channel is trained."""
        A, B = (wide(factor.detach()) for factor in self.lora_factors())
        return (A, B) if len(A) else (A.new_zeros(1, self.in_features), B.new_zeros(self.out_features, 1))

    def meta(self) -> dict[str, Any]:
        """How many channels are trained."""
        return {"channels": len(self.indices)}

    def _dim(self) -> int:
        return 1 if self.axis == "in" else 0


@dataclass(frozen=True)
class S2FT(Method):
    """A few whole channels of a weight are trained: a dense slice of it, and nothing else.

    Formula: `ΔW[:, indices] = s2` for axis `"in"` (channels that enter: down_proj, o_proj), `ΔW[indices, :] = s2` for axis
    `"out"` (channels that leave: up_proj, v_proj); `s2` starts at 0. A channel block is `block` neighbours. `"random"`: `⌊N ·
        ratio⌋`
    of the N blocks of all adapted layers together, drawn uniformly, so some layers may get none. Else `⌊blocks · ratio⌋` of
    each layer by a score: the norm of the block of the weight (`"weight"`), of its inputs or outputs over sample batches
    (`"activation"`), or of the gradient on them (`"gradient"`); of equal ones the lower index.

    Args:
        ratio: share of the blocks that is trained, in (0, 1].
        axis: `"in"` or `"out"`.
        block: channels that are chosen together; the head size for o_proj and v_proj.
        selection: `"random"`, `"weight"`, `"activation"` or `"gradient"`; the last two need `batches` (and a `loss_fn`).
        largest: select the largest scores; False selects the smallest.
        indices: instead of a selection, the channels of each layer: full module name -> sequence of ints; a sequence alone is
            for every layer. A mapping without `target_modules` adapts the layers that it names.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        seed: of the random selection, in addition to that of `lowdim.adapt`.
        dropout: on the update's input, while training.

    Raises:
        ValueError: a hyperparameter out of range, duplicate or negative indices (here); `block` that does not divide the
            channels, an index beyond them, missing statistics (at attach).

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.S2FT(indices={"0": [5, 2]}))
        >>> adapted.layers["0"].update.indices.tolist(), tuple(adapted.layers["0"].update.s2.shape)
        ([2, 5], (4, 2))

    It needs learning rates between those of LoRA and of full fine-tuning. If few numbers should be trained, LoRA has fewer:
    one channel of axis `"in"` has `out` numbers and gives only rank 1.

    Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS 2024,
    arXiv 2412.06289.
    """

    draws_layers: ClassVar[bool] = True

    ratio: float = 0.03
    axis: str = "in"
    block: int = 1
    selection: str = "random"
    largest: bool = False
    indices: Any = None
    target_modules: Any = None
    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_float("ratio", self.ratio, 0.0, 1.0, low_open=True)
        check_choice("axis", self.axis, _AXES)
        check_int("block", self.block, 1)
        check_choice("selection", self.selection, _SELECTIONS)
        check_int("seed", self.seed, 0)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        if isinstance(self.indices, Mapping):
            named = {str(name): _ascending(f"indices[{name!r}]", given) for name, given in self.indices.items()}
            object.__setattr__(self, "indices", named)
            if self.target_modules is None:
                object.__setattr__(self, "target_modules", list(named))
        elif self.indices is not None:
            object.__setattr__(self, "indices", _ascending("indices", self.indices))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # which statistics depends on this instance
        """The statistics that the selection reads."""
        if self.indices is not None or self.selection in ("random", "weight"):
            return frozenset()
        if self.selection == "gradient":
            return frozenset({"gradient"})
        return frozenset({"norms" if self.axis == "in" else "output_covariance"})

    takes = frozenset({"linear"})

    def prepare(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> dict[str, dict[str, Any]]:
        """The given channels of each layer, or the random blocks, drawn over all layers together."""
        if isinstance(self.indices, dict):
            for name in layers:
                if name not in self.indices:
                    raise unknown("layer", name, self.indices)
            for name in self.indices:
                if name not in layers:
                    raise unknown("layer of indices", name, layers)
            return {name: {"indices": self.indices[name]} for name in layers}
        if self.indices is not None or self.selection != "random":
            return {name: {} for name in layers}
        stops, total = [], 0
        for name, layer in layers.items():
            with error_context("S2FT", name, layer):
                total += self._blocks(*matrix_shape(layer))
            stops.append(total)
        count = int(total * self.ratio)
        if count == 0:
            warnings.warn(f"ratio={self.ratio} selects none of the {total} channel blocks: nothing is trained", stacklevel=3)
        # Not torch's generator: forecasts, whose tensors have no numbers, also draw.
        chosen = sorted(random.Random(derive_seed(seed, "S2FT", self.axis, self.seed)).sample(range(total), count))
        found, start = {}, 0
        for name, stop in zip(layers, stops):
            mine = chosen[bisect.bisect_left(chosen, start) : bisect.bisect_left(chosen, stop)]
            found[name] = {"blocks": [index - start for index in mine]}
            start = stop
        return found

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> S2FTUpdate:
        """Allocate `s2` and `indices`."""
        blocks, given = self._blocks(out_features, in_features), self._given(stats)
        if given and given[-1] >= blocks * self.block:
            raise ValueError(f"indices must be below the {blocks * self.block} channels of axis {self.axis!r}; got {given[-1]}")
        if "channels" in stats:
            count = stats["channels"]
        elif given is not None:
            count = len(given)
        else:
            count = self.block * (len(stats["blocks"]) if "blocks" in stats else int(blocks * self.ratio))
        return S2FTUpdate(out_features, in_features, self.axis, count, dtype=dtype, device=device)

    def initialise(self, update: S2FTUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Choose the channels; `s2` is zero, so the output does not change."""
        given = self._given(stats)
        if given is not None:
            update.indices.copy_(torch.tensor(given, dtype=torch.int64))
            return
        if "blocks" in stats:
            blocks = torch.tensor(stats["blocks"], dtype=torch.int64)
        elif self.selection == "random":
            source = generator or stream(self.seed, "S2FT")
            blocks = torch.randperm(self._blocks(*weight.shape), generator=source, device=source.device)
        else:
            scores = self._scores(weight, stats)
            if not bool(torch.isfinite(scores).all()):
                raise ValueError(f"the scores of the channels have NaN or infinite entries (selection={self.selection!r})")
            blocks = torch.sort(scores, descending=self.largest, stable=True).indices
        blocks = blocks[: len(update.indices) // self.block].sort().values
        channels = blocks[:, None] * self.block + torch.arange(self.block, device=blocks.device)
        update.indices.copy_(channels.flatten())

    def _given(self, stats: Stats) -> Sequence[int] | None:
        given = stats.get("indices", self.indices)
        if isinstance(given, dict):
            raise ValueError(
                "indices is a mapping from layers: use lowdim.adapt(model, method), or give this layer's channels as a sequence"
            )
        return given

    def _blocks(self, out_features: int, in_features: int) -> int:
        channels = in_features if self.axis == "in" else out_features
        if channels % self.block:
            raise ValueError(f"block must divide the {channels} channels of axis {self.axis!r}; got {self.block}")
        return channels // self.block

    def _scores(self, weight: Tensor, stats: Stats) -> Tensor:
        if self.selection != "activation":
            return s2ft_scores(weight if self.selection == "weight" else stats["gradient"], self.axis, self.block)
        if self.axis == "in":
            sizes = stats["norms"]
        else:  # all channels see the same tokens: the mean square gives the same order as the norm
            sizes = (stats["output_covariance"].diagonal() + stats["output_mean"].square()).clamp_min(0).sqrt()
        return wide(sizes).view(-1, self.block).norm(dim=1)


def s2ft_scores(
    weight: Tensor,  # (out, in)
    axis: str,
    block: int,
) -> Tensor:
    """The Frobenius norm of each block of columns (axis `"in"`) or rows (`"out"`), `(blocks,)`, in float32 or better.

    Raises:
        ValueError: `block` does not divide the channels, or another axis.

    Example:
        >>> import torch
        >>> from lowdim.adapters import s2ft_scores
        >>> s2ft_scores(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), "in", 1)
        tensor([5., 1.])

    Source: Yang et al., arXiv 2412.06289 (the paper's ablation; the formula is ours).
    """
    check_choice("axis", axis, _AXES)
    channels = wide(weight.detach()) if axis == "out" else wide(weight.detach()).mT
    check_int("block", block, 1)
    if len(channels) % block:
        raise ValueError(f"block must divide the {len(channels)} channels of axis {axis!r}; got {block}")
    return channels.norm(dim=1).view(-1, block).norm(dim=1)


def _ascending(argument: str, given: Any) -> tuple[int, ...]:
    listed = given.tolist() if hasattr(given, "tolist") else list(given)
    for index in listed:
        check_int(argument, index, 0)
    if len(set(listed)) != len(listed):
        raise ValueError(f"{argument} must not have duplicates; got {listed!r:.80}")
    return tuple(sorted(listed))
