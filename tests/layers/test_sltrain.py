"""SLTrain: the shared case in each of its forms, the authors' numbers, its cost, and two processes."""

import pytest
import torch
from sltrain_layers import ROWS, official
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vectors
from lowdim.layers import SLTrainLinear
from lowdim.layers.sltrain import _thin
from lowdim.linalg import stream
from lowdim.optim import Restart
from lowdim.testing.layer_case import LayerCase
from lowdim.testing.sharded_case import Subject


class TestSLTrain(LayerCase):
    layer_class = SLTrainLinear
    how = {"rank": 3, "density": 0.1, "alpha": 6.0}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 12, "density": 0.01}  # noqa: RUF012

    # the product is fitted first and the sparse part second, not both together
    test_from_linear_keeps_what_it_can = None  # type: ignore[assignment]
    test_from_linear_is_stationary = None  # type: ignore[assignment]

    def dense(self, layer):
        """`alpha / rank · B A`, and the values at their flat row-major positions."""
        sparse = torch.zeros(self.out_features * self.in_features, dtype=layer.values.dtype)
        sparse = sparse.index_put((layer.indices.long(),), layer.values).view(self.out_features, self.in_features)
        return self.how["alpha"] / self.how["rank"] * (layer.B @ layer.A) + sparse

    def make(self, **how):
        layer = super().make(**how)
        if not layer.B.is_meta:  # a fresh one is zero, and then A has no gradient
            with torch.no_grad():
                layer.B.copy_(torch.randn(layer.B.shape, generator=stream(how.get("seed", 0), "B")) / 2)
        return layer

    def test_cost_is_what_runs(self):
        """For few rows, where it grows with them, and for many, where `B A` comes once."""
        layer = self.make(dtype=torch.float32)
        assert [_thin(rows, self.in_features, self.out_features) for rows in (3, ROWS)] == [True, False]
        for rows in (0, 3, 7, 8, ROWS):
            x = LayerCase.rows(self, rows, dtype=torch.float32).requires_grad_(True)
            cost = layer.cost(rows)
            assert all(type(number) is int for number in cost)
            assert cost.parameters == sum(p.numel() for p in layer.parameters())
            with FlopCounterMode(display=False) as counter:
                y = layer(x)
            assert counter.get_total_flops() == cost.flops_forward
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            assert counter.get_total_flops() == cost.flops_backward
        support = layer.indices.nbytes
        full, half = layer.cost(ROWS), layer.cost(ROWS, itemsize=2)
        assert full.bytes_forward - support == 2 * (half.bytes_forward - support)
        assert full.bytes_backward - 2 * support == 2 * (half.bytes_backward - 2 * support)


class TestSLTrainTall(TestSLTrain):
    in_features, out_features = 20, 12


class TestSLTrainManyRows(TestSLTrain):
    """The same with inputs of so many rows that the other way of computing is taken."""

    def rows(self, *lead, dtype=torch.float64):
        lead = tuple(ROWS if n == 3 else n for n in lead)
        return super().rows(*lead, dtype=dtype)

    def test_backward_keeps_no_dense_matrix(self):
        layer, kept = self.make(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            layer(self.rows(3).requires_grad_(True))
        assert sorted(kept) == sorted([(ROWS, 12), (3, 12), (20, 3), (24,), (24,)])


class TestSLTrainHalfIndices(TestSLTrain):
    how = {"rank": 2, "density": 0.3, "alpha": 2.0, "index_dtype": torch.int32}  # noqa: RUF012


@pytest.mark.parametrize("repeat", [1, 20])
@pytest.mark.parametrize("case", vectors.cases("sltrain"))
def test_official_pass(case, repeat):
    """With so many copies of the rows that W is built, and as it is."""
    v, layer = official(case)
    assert layer.values.numel() == int(layer.density * layer.in_features * layer.out_features)
    assert layer.scaling == v.hyperparameters["alpha"] / v.hyperparameters["rank"]
    v.close(layer.dense_weight(), "dense_weight")
    x = v["x"].repeat(repeat, 1, 1).requires_grad_(True)
    assert _thin(10 * repeat, layer.in_features, layer.out_features) is (case == "basic" and repeat == 1 and 10 * 17 < 70)
    y = layer(x)
    v.close(y[:2], "y")
    F.mse_loss(y, v["target"].repeat(repeat, 1, 1)).backward()
    v.close(x.grad[:2] * repeat, "grad_x")
    for name, parameter in layer.named_parameters():
        v.close(parameter.grad, f"grad_{name}")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", vectors.cases("sltrain"))
def test_official_training(case, split):
    """Also row by row: gradients of ten passes of one row are those of one pass of ten."""
    v, layer = official(case)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=v.hyperparameters["lr"], weight_decay=0.0)
    for _ in range(v.hyperparameters["steps"]):
        parts = zip(v["x"].flatten(0, 1), v["target"].flatten(0, 1), strict=True) if split else [(v["x"], v["target"])]
        for x, target in parts:
            (F.mse_loss(layer(x), target) / (10 if split else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("A", "B", "values"):
        v.close(getattr(layer, name), f"{name}_after")


def test_cost_by_hand():
    layer = SLTrainLinear(8, 16, rank=2, density=0.25)  # P = 48, nnz = 32, 128 entries
    few, many = layer.cost(3), layer.cost(100)
    assert few.parameters == many.parameters == 48 + 32 + 16
    assert few.flops_forward == 2 * 3 * (48 + 128)
    assert many.flops_forward == 2 * 128 * 2 + 2 * 100 * 128
    assert many.flops_backward == 3 * (2 * 128 * 2) + 2 * (2 * 100 * 128)
    assert many.bytes_forward == 4 * (100 * 24 + 48 + 3 * 32 + 2 * 128) + 8 * 32


def test_prints_its_sizes():
    assert "in_features=8, out_features=6, bias=False, rank=2, density=0.2, alpha=32" in repr(
        SLTrainLinear(8, 6, bias=False, rank=2, density=0.2)
    )


def sharded_net():
    """Supports by seed and given, sides that two does not divide."""
    first = SLTrainLinear(7, 18, rank=3, density=0.2, alpha=3, seed=1, dtype=torch.float64)
    second = SLTrainLinear(18, 9, rank=3, alpha=3, indices=torch.arange(0, 160, 5), seed=2, dtype=torch.float64)
    return nn.Sequential(first, nn.Tanh(), second)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.05)


SHARDED = {
    "sltrain": Subject(net=sharded_net, optimizer=adamw),
    "sltrain with restarts": Subject(
        net=sharded_net, optimizer=adamw, companion=lambda net, optimizer: Restart(optimizer, net, interval=4)
    ),
}
