"""SLTrain from a trained layer, factorized anew, and back to a dense layer."""

import copy

import pytest
import torch
from torch import nn

from lowdim.layers import SLTrainLinear, densify


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_linear_fits_the_product_and_then_the_support(dtype):
    linear = nn.Linear(14, 11, dtype=dtype)
    layer = SLTrainLinear.from_linear(linear, rank=3, density=0.2, alpha=6, seed=4)
    weight, product = linear.weight.detach().double(), 2 * (layer.B.double() @ layer.A.double()).detach()
    u, s, vh = torch.linalg.svd(weight)
    near = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ vh[:3], atol=near, rtol=0)
    for gram in (layer.A.double() @ layer.A.double().mT, layer.B.double().mT @ layer.B.double()):
        torch.testing.assert_close(gram.detach(), torch.diag(s[:3] / 2), atol=near, rtol=0)
    exact = layer.dense_weight().detach().double().flatten()[layer.indices]
    torch.testing.assert_close(exact, weight.flatten()[layer.indices], atol=near / 5, rtol=0)
    assert torch.equal(layer.indices, SLTrainLinear(14, 11, rank=3, density=0.2, seed=4).indices)
    assert torch.equal(layer.bias, linear.bias)


def test_refactorize_touches_the_product_alone():
    layer = SLTrainLinear(14, 11, rank=3, density=0.2, dtype=torch.float64)
    with torch.no_grad():
        layer.B.normal_()
    before, parameters = copy.deepcopy(layer), list(layer.parameters())
    layer.refactorize()
    torch.testing.assert_close(layer.dense_weight(), before.dense_weight(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.A @ layer.A.mT, layer.B.mT @ layer.B, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.values, before.values)
    assert not torch.equal(layer.A, before.A)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))


def test_refactorize_leaves_a_fresh_layer():
    """B = 0: with √0 in both factors neither would ever move again."""
    layer = SLTrainLinear(14, 11, rank=3)
    before = copy.deepcopy(layer)
    layer.refactorize()
    assert torch.equal(layer.A, before.A)
    assert not bool(layer.B.any())


def test_densify_gives_the_same_function():
    model = nn.Sequential(SLTrainLinear(12, 8, rank=2, density=0.2))
    x = torch.randn(3, 12)
    y = model(x)
    torch.testing.assert_close(densify(model)(x), y)
    assert type(model[0]) is nn.Linear
