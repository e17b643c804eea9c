"""What LoRD is told: which layers, and how their ranks follow from shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from lowdim.errors import Options, check_float, check_int
from lowdim.ranks import parameter_rank
from lowdim.surgery import Patterns

__all__ = ["LoRDConfig", "lord_rank", "round_down"]


@dataclass(frozen=True)
class LoRDConfig(Options):
    """How `lord` decomposes a model.

    Attributes:
        rank: one for all layers, >= 1, or `{module name: rank}`, which selects the layers where `target_modules` is None.
        rank_ratio: rank = ⌊ratio · min(in, out)⌋, in (0, 1].
        param_ratio: rank = ⌊ratio · in · out / (in + out)⌋, the layer's share of parameters that is kept, in (0, 1].
        rank_multiple: ranks are rounded down to a multiple of this, >= 1; 64 or 128 suit tensor cores.
        target_modules: names, dotted suffixes or a regular expression; None selects every nn.Linear and Conv1D whose
            name contains no entry of `exclude` (and is not the model's prediction head).
        exclude: used where `target_modules` is None.
        skip_unprofitable: leave a layer dense where two factors would hold no fewer weights.
        centered: decompose around the outputs' mean, with a new bias for every layer; False adds no bias to layers without one.
        cap_rank: a `rank` above a layer's smaller side becomes that side there, where it is an error otherwise; the report's
            `details["capped_ranks"]` lists these layers. `lowdim compress` sets it.

    Exactly one of `rank`, `rank_ratio` and `param_ratio` must be given.
    """

    #: Mutually exclusive options.
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("rank", "rank_ratio", "param_ratio"),)

    rank: int | Mapping[str, int] | None = None
    rank_ratio: float | None = None
    param_ratio: float | None = None
    rank_multiple: int = 1
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ("lm_head", "embed", "classifier")
    skip_unprofitable: bool = True
    centered: bool = True
    cap_rank: bool = False

    def __post_init__(self) -> None:
        given = [name for name in self.one_of[0] if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of rank, rank_ratio and param_ratio must be given; got {', '.join(given) or 'none'}")
        if isinstance(self.rank, Mapping):
            if not self.rank:
                raise ValueError("rank must name at least one module; got an empty mapping")
            for name, rank in self.rank.items():
                check_int(f"rank[{name!r}]", rank, 1)
            object.__setattr__(self, "rank", dict(self.rank))
        elif self.rank is not None:
            check_int("rank", self.rank, 1)
        check_ratios(self.rank_ratio, self.param_ratio)
        check_int("rank_multiple", self.rank_multiple, 1)
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))


def lord_rank(
    out_features: int,
    in_features: int,
    rank_ratio: float | None = None,
    param_ratio: float | None = None,
    multiple: int = 1,
) -> int:
    """The rank of a layer from the share of its full rank, or of its parameters, that is kept.

    Formula: `⌊rank_ratio · min(in, out)⌋` or `⌊param_ratio · in · out / (in + out)⌋`, rounded down to a multiple of `multiple`
    unless that is 0, and clipped to [1, min(in, out)].

    Raises:
        ValueError: not exactly one ratio, a ratio outside (0, 1].

    Example:
        >>> from lowdim.compress import lord_rank
        >>> lord_rank(1536, 384, rank_ratio=0.75), lord_rank(1536, 384, param_ratio=0.5, multiple=64)
        (288, 128)
    """
    check_int("out_features", out_features, 1)
    check_int("in_features", in_features, 1)
    check_int("multiple", multiple, 1)
    if (rank_ratio is None) == (param_ratio is None):
        raise ValueError(f"exactly one of rank_ratio and param_ratio must be given; got {rank_ratio!r} and {param_ratio!r}")
    check_ratios(rank_ratio, param_ratio)
    full = min(in_features, out_features)
    if rank_ratio is not None:
        rank = round_down(math.floor(rank_ratio * full + 1e-9), multiple)  # 0.29 * 100 is just below 29
    else:
        rank = parameter_rank(out_features, in_features, share=cast(float, param_ratio), multiple=multiple)
    return max(1, min(rank, full))


def check_ratios(rank_ratio: float | None, param_ratio: float | None) -> None:
    for name, value in (("rank_ratio", rank_ratio), ("param_ratio", param_ratio)):
        if value is not None:
            check_float(name, value, 0.0, 1.0, low_open=True)


def round_down(rank: int, multiple: int) -> int:
    """To a multiple, unless that is 0."""
    return rank // multiple * multiple or rank
