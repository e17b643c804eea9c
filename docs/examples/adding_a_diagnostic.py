"""The effective rank of every weight matrix of a model (Roy and Vetterli, EUSIPCO 2007)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lowdim.diagnose import weights_of
from lowdim.errors import check_float
from lowdim.linalg import compute_dtype
from lowdim.results import Result
from lowdim.testing.diagnose_case import DiagnoseCase


@dataclass(frozen=True)
class EffectiveRanks(Result):
    """Effective ranks by layer: 1 for a matrix of rank one, `min(out, in)` for one with equal singular values."""

    ranks: dict[str, float]
    share: float  # of a layer's `min(out, in)`, mean over layers

    def rows(self) -> list[dict[str, Any]]:
        return [{"layer": name, "effective_rank": rank} for name, rank in self.ranks.items()]

    def plot(self, *, ax: Any = None) -> Any:
        axes = self._axes(ax)
        axes.barh(list(self.ranks), list(self.ranks.values()))
        axes.set_xlabel("effective rank")
        return axes


def effective_ranks(source: Any, *, floor: float = 0.0) -> EffectiveRanks:
    """`exp(-Σ p_i log p_i)` with `p = s / Σ s`, of every 2-D weight of a module, a mapping or files.

    Args:
        source: whatever `weights_of` reads; one matrix is in memory at a time.
        floor: singular values below this share of the largest count as 0.

    Raises:
        ValueError: a floor outside [0, 1), or a weight that is not finite (named).
    """
    check_float("floor", floor, 0.0, 1.0, high_open=True)
    ranks, shares = {}, []
    for name, weight in weights_of(source).items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"layer {name}: the weight has NaN or infinite entries")
        s = torch.linalg.svdvals(weight.to(compute_dtype(weight.dtype)))
        p = s[s > floor * s[0]] / s[s > floor * s[0]].sum()
        ranks[name] = float(torch.exp(-(p * p.log()).sum()))
        shares.append(ranks[name] / len(s))
    return EffectiveRanks(ranks, sum(shares) / max(len(shares), 1))


class TestEffectiveRanks(DiagnoseCase):
    plots = True
    tolerance = 1e-5  # the weights are float32

    def models(self):
        torch.manual_seed(0)
        return (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8)),)

    def measure(self, *sources):
        return effective_ranks(*sources)

    def expected(self):
        ranks = {}
        for name in ("0.weight", "2.weight"):
            s = np.linalg.svd(self.models()[0].get_parameter(name).detach().double().numpy())[1]
            ranks[name] = np.prod([(p**-p) for p in s / s.sum()])  # the exponential of the entropy
        return {"ranks": ranks, "share": (ranks["0.weight"] / 4 + ranks["2.weight"] / 4) / 2}

    def refusals(self):
        return [
            (ValueError, "floor", lambda: effective_ranks({}, floor=1.0)),
            (ValueError, "layer w: ", lambda: effective_ranks({"w": torch.full((2, 2), torch.nan)})),
        ]
