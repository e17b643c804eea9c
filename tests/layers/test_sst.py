"""SST as a layer: the shared cases, the vectors, how it starts, and what is drawn."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.layers import SSTLinear, densify, swap_linear
from lowdim.linalg import stream
from lowdim.testing.layer_case import LayerCase


class TestSSTTall(LayerCase):
    layer_class = SSTLinear
    how = {"rank": 3}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 5}  # noqa: RUF012

    # it keeps the frozen singular vectors, which are the layer's own; see test_keeps_input_and_hidden
    test_backward_keeps_no_dense_matrix = None  # type: ignore[assignment]

    def random(self, seed):
        return {**self.how, "seed": seed}

    def make(self, **options):
        """In the middle of training: the last directions are active, and the buffers are stale there."""
        layer = super().make(**options)
        if not layer.S.is_meta:
            layer.resample(indices=range(len(layer.S) - layer.rank, len(layer.S)))
            with torch.no_grad():
                for p in (layer.U_active, layer.Vh_active):
                    p.add_(torch.randn(p.shape, generator=stream(0, "moved", *p.shape)) / 10)
        return layer

    def dense(self, layer):
        """`U diag(S) Vh`, the active vectors in their columns and rows."""
        U = layer.U.index_copy(1, layer.active, layer.U_active)
        Vh = layer.Vh.index_copy(0, layer.active, layer.Vh_active)
        return U @ torch.diag(layer.S) @ Vh

    def exact(self, layer, x):
        """The enhanced gradient: `G v` for u and `uᵀ G` for v, without the factor S that the product's own would have."""
        u, v = layer.U_active, layer.Vh_active
        U, Vh = layer.U.index_copy(1, layer.active, u.detach()), layer.Vh.index_copy(0, layer.active, v.detach())
        only_gradient = (u - u.detach()) @ v.detach() + u.detach() @ (v - v.detach())  # its value is zero
        return F.linear(x, U @ torch.diag(layer.S) @ Vh + only_gradient, layer.bias)


class TestSSTWide(TestSSTTall):
    in_features, out_features = 20, 12


class TestSSTSquareAllActive(TestSSTTall):
    in_features, out_features = 8, 8
    how = {"rank": 8}  # noqa: RUF012


def from_vectors(v):
    linear = nn.Linear(v.hyperparameters["in_features"], v.hyperparameters["out_features"], dtype=torch.float64)
    linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    layer = SSTLinear.from_linear(linear, rank=v.hyperparameters["rank"])
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize("case", ["tall", "wide"])
def test_vectors_at_the_start(case):
    v = vectors.load("sst", case)
    layer = from_vectors(v)
    v.close(layer.S, "singular_values")
    v.close(layer.sampling_probabilities(), "probabilities")
    layer.resample(indices=v["indices1"])
    v.close(layer.dense_weight(), "weight")
    x = v["x"].clone().requires_grad_(True)
    y = layer(x)
    v.close(y, "y")
    F.mse_loss(y, v["target"]).backward()
    v.close(x.grad, "grad_x")
    v.close(layer.S.grad, "grad_S")
    v.close(layer.U_active.grad @ layer.Vh_active, "grad_U_times_Vh")
    v.close(layer.U_active @ layer.Vh_active.grad, "grad_U_outer")


@pytest.mark.parametrize("case", ["tall", "wide"])
def test_vectors_after_each_step(case):
    v = vectors.load("sst", case)
    layer = from_vectors(v)
    optimizer = torch.optim.SGD([layer.S, layer.U_active, layer.Vh_active], lr=v.hyperparameters["lr"])
    weights = iter(v["weights_after"])
    for indices in (v["indices1"], v["indices2"]):
        layer.resample(indices=indices)
        for _ in range(v.hyperparameters["steps"]):
            optimizer.zero_grad()
            F.mse_loss(layer(v["x"]), v["target"]).backward()
            optimizer.step()
            layer.post_step()
            v.close(layer.dense_weight(), next(weights))
    before = layer.dense_weight().detach()
    layer.reinitialize()
    v.close(layer.S, "reinit_singular_values")
    v.close(layer.dense_weight(), before)
    assert layer.active.tolist() == sorted(v["indices2"].tolist())


def test_every_vector_is_checked():
    assert vectors.cases("sst") == ["lorentz", "tall", "wide"]  # the first in test_lorentz.py


def test_shapes_and_first_active():
    layer = SSTLinear(6, 9, rank=2)
    shapes = {name: tuple(t.shape) for name, t in layer.state_dict().items()}
    want = {"S": (6,), "U_active": (9, 2), "Vh_active": (2, 6), "bias": (9,), "U": (9, 6), "Vh": (6, 6), "active": (2,)}
    assert shapes == want
    assert layer.active.tolist() == [0, 1]
    assert "rank=2" in repr(layer)
    trainable = sum(p.numel() for p in layer.parameters()) - 9
    assert trainable == 2 * (6 + 9) + 6


def test_fresh_weight_is_that_of_a_plain_layer():
    layer = SSTLinear(400, 60, rank=4, seed=3)
    weight = layer.dense_weight().detach()
    assert 0.99 / 20 < float(weight.abs().max()) <= 1 / 20 + 1e-6
    assert abs(float(weight.std()) * 20 * 3**0.5 - 1) < 0.02
    assert 0.9 / 20 < float(layer.bias.detach().abs().max()) <= 1 / 20
    assert torch.linalg.matrix_rank(weight) == 60


def test_seeds():
    one, two, other = (SSTLinear(6, 5, rank=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.dense_weight(), two.dense_weight())
    assert not torch.equal(one.dense_weight(), other.dense_weight())
    first = []
    for layer in (one, two):
        draws = []
        for _ in range(6):
            layer.resample()
            draws.append(layer.active.tolist())
        first.append(draws)
    assert first[0] == first[1]
    assert len({tuple(draw) for draw in first[0]}) > 1
    unseeded = [SSTLinear(6, 5, rank=2, seed=None) for _ in range(2)]
    assert not torch.equal(unseeded[0].dense_weight(), unseeded[1].dense_weight())
    torch.manual_seed(0)
    unseeded[0].resample()
    assert len(unseeded[0].active.unique()) == 2


def test_layers_of_a_model_start_differently():
    model = swap_linear(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), SSTLinear, ["0", "2"], fresh=True, rank=2, seed=0
    )
    assert not torch.equal(model[0].dense_weight(), model[2].dense_weight())
    x = torch.randn(3, 6)
    y = model(x).detach()
    assert torch.allclose(densify(model)(x), y, atol=1e-5)


def test_probabilities_by_hand():
    layer = SSTLinear(3, 4, rank=1, dtype=torch.float64)
    with torch.no_grad():
        layer.S.copy_(torch.tensor([3.0, 1.0, 0.0]))
    assert torch.allclose(layer.sampling_probabilities(), torch.tensor([13 / 24, 7 / 24, 4 / 24], dtype=torch.float64))
    with torch.no_grad():
        layer.S.copy_(torch.tensor([3.0, 1.0, -1.0]))  # before post_step
    assert torch.allclose(layer.sampling_probabilities(), torch.tensor([13 / 24, 7 / 24, 4 / 24], dtype=torch.float64))


def test_all_clipped_means_uniform():
    layer = SSTLinear(3, 4, rank=2)
    with torch.no_grad():
        layer.S.zero_()
    assert torch.allclose(layer.sampling_probabilities(), torch.full((3,), 1 / 3))
    layer.resample()
    layer.reinitialize()
    assert float(layer.dense_weight().detach().abs().max()) == 0


def test_draws_follow_the_probabilities():
    layer = SSTLinear(4, 4, rank=1)
    with torch.no_grad():
        layer.S.copy_(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(2000):
        layer.resample(generator)
        counts[layer.active] += 1
    assert float((counts / 2000 - layer.sampling_probabilities()).abs().max()) < 0.04


def test_draws_are_distinct_and_ascending():
    layer = SSTLinear(7, 9, rank=5)
    for seed in range(20):
        layer.resample(torch.Generator().manual_seed(seed))
        assert bool((layer.active.diff() > 0).all())
    layer.resample(indices=torch.tensor([6, 0, 3, 2, 1]))
    assert layer.active.tolist() == [0, 1, 2, 3, 6]
    assert torch.equal(layer.U_active, layer.U[:, layer.active])
