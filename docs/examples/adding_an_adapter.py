"""KronA: the update is a Kronecker product of two small trained matrices (Edalati et al., arXiv 2212.10650)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowdim.adapters import Method, WeightUpdate
from lowdim.errors import check_float, check_int
from lowdim.testing.adapter_case import AdapterCase


class KronAUpdate(WeightUpdate):
    """`ΔW = alpha · P ⊗ Q`: `P (o, n)`, `Q (out / o, in / n)`, both trained."""

    def __init__(self, out_features: int, in_features: int, rows: int, columns: int, alpha: float, dtype: Any, device: Any):
        super().__init__(out_features, in_features)
        self.alpha = alpha
        self.P = nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device))
        self.Q = nn.Parameter(torch.empty(out_features // rows, in_features // columns, dtype=dtype, device=device))

    def forward(self, x):  # (..., in_features)
        grid = x.unflatten(-1, (self.P.shape[1], self.Q.shape[1]))
        return (self.alpha * (self.P @ grid) @ self.Q.mT).flatten(-2)  # two small products, no dense matrix

    def dense(self):
        return self.alpha * torch.kron(self.P, self.Q)


@dataclass(frozen=True)
class KronA(Method):
    """A full-rank update from two small factors: `y = W x + alpha · (P ⊗ Q) x`, with `P = 0` at the start.

    Args:
        blocks: rows and columns of `P`, at most; the largest divisors of the layer's sizes are taken.
        alpha: scale of the update.
        dropout: on the update's input, while training.
        target_modules: which layers (see `lowdim.surgery.find_layers`).

    Source: Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv 2212.10650.
    """

    blocks: int = 16
    alpha: float = 1.0
    dropout: float = 0.0
    target_modules: Any = None

    def __post_init__(self):
        check_int("blocks", self.blocks, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    def blank(self, out_features, in_features, *, stats, dtype, device):  # from shapes alone: forecasts allocate nothing
        rows, columns = (
            next(d for d in range(min(size, self.blocks), 0, -1) if size % d == 0) for size in (out_features, in_features)
        )
        return KronAUpdate(out_features, in_features, rows, columns, self.alpha, dtype, device)

    def initialise(self, update, weight, stats, generator):
        nn.init.normal_(update.Q, std=update.Q.shape[1] ** -0.5, generator=generator)


class TestKronA(AdapterCase):
    exact_in_peft = has_factors = False  # the update has full rank

    def method(self, rank=None, **changes):  # it has no rank
        return KronA(**{"blocks": 3, "alpha": 1.5, **changes})

    def dense(self, update):  # the formula, in the test's own numbers
        return 1.5 * torch.kron(update.P, update.Q)

    def start(self, weight, stats):
        return {"P": 0.0}

    test_errors_name_the_layer = None  # every size has a divisor, so no layer is refused
