import pytest
import torch
from torch import nn

import vectors
from lowdim.layers import Monarch
from lowdim.testing.layer_case import LayerCase


class TestMonarchWide(LayerCase):
    layer_class = Monarch
    how = {"nblocks": 4}  # noqa: RUF012 (typed in the base class)
    lossless = {"nblocks": 1}  # noqa: RUF012

    def dense(self, layer):
        """Block a of x gives channels `a q + c`; channel `j k + b` goes to row class b, whose output e is `e k + b`."""
        k = self.how["nblocks"]
        first = torch.block_diag(*layer.blkdiag1)
        second = torch.einsum("bej,bc->ebjc", layer.blkdiag2, torch.eye(k, dtype=layer.blkdiag2.dtype))
        second = second.reshape(k * layer.blkdiag2.shape[1], -1)
        return (second @ first)[: self.out_features, : self.in_features]


class TestMonarchTall(TestMonarchWide):
    in_features, out_features = 20, 12


class TestMonarchPadded(TestMonarchWide):
    in_features, out_features = 18, 10


class TestMonarchMoreBlocksThanFeatures(TestMonarchWide):
    in_features, out_features = 3, 7
    how = {"nblocks": 5}  # noqa: RUF012


def from_vectors(v, **kwargs):
    layer = Monarch(**v.hyperparameters, dtype=torch.float64, **kwargs)
    layer.load_state_dict({name: v[name] for name in ("blkdiag1", "blkdiag2", "bias")})
    return layer


@pytest.mark.parametrize("case", ["layer_wide", "layer_padded"])
def test_official_layer(case):
    v = vectors.load("monarch", case)
    layer, x = from_vectors(v), v["x"].clone().requires_grad_(True)
    y = layer(x)
    v.close(y, "y")
    v.close(layer.dense_weight(), "dense_weight")
    y.backward(v["grad_y"])
    v.close(x.grad, "grad_x")
    for name, parameter in layer.named_parameters():
        v.close(parameter.grad, f"grad_{name}")


def test_official_from_linear():
    v = vectors.load("monarch", "project_wide")
    linear = nn.Linear(16, 24, dtype=torch.float64)
    linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    layer = Monarch.from_linear(linear, nblocks=4)
    v.close(layer.dense_weight(), "projected")
    v.close(layer(v["x"]), "y")


def test_initialisation_bounds():
    layer = Monarch(60, 400, nblocks=4, generator=torch.Generator().manual_seed(0))
    for tensor, fan_in in ((layer.blkdiag1, 15), (layer.blkdiag2, 15), (layer.bias, 400)):
        bound = fan_in**-0.5
        assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound
        assert abs(float(tensor.detach().mean())) < 0.2 * bound


@pytest.mark.parametrize(
    ("in_features", "out_features", "shape1", "shape2"),
    [(12, 20, (4, 3, 3), (4, 5, 3)), (20, 12, (4, 3, 5), (4, 3, 3)), (16, 16, (4, 4, 4), (4, 4, 4))],
)
def test_shapes(in_features, out_features, shape1, shape2):
    layer = Monarch(in_features, out_features)
    assert layer.nblocks == 4
    assert layer.blkdiag1.shape == shape1
    assert layer.blkdiag2.shape == shape2


def test_cost_by_hand():
    cost = Monarch(8, 16, nblocks=2).cost(3)  # (2, 4, 4), (2, 8, 4)
    assert cost == (32 + 64 + 16, 2 * 3 * 96, 4 * 3 * 96, 4 * (3 * 8 + 32 + 3 * 8 + 3 * 8 + 64 + 3 * 16), 2 * 864)


@pytest.mark.parametrize("nblocks", [0, -1, 2.0, True, "4"])
def test_bad_nblocks(nblocks):
    with pytest.raises(ValueError, match="nblocks must be an int >= 1; got"):
        Monarch(8, 8, nblocks=nblocks)
    with pytest.raises(ValueError, match="nblocks must be an int >= 1; got"):
        Monarch.from_linear(nn.Linear(8, 8), nblocks=nblocks)


def test_prints_its_sizes():
    assert "in_features=8, out_features=6, bias=False, nblocks=2" in repr(Monarch(8, 6, bias=False, nblocks=2))
