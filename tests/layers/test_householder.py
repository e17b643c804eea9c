"""The Householder projector: equal gains whatever is trained, and the directions that it sees."""

import copy

import pytest
import torch
from torch import nn

import vectors
from lowdim.compress import load_compressed
from lowdim.layers import HouseholderProjector, densify, swap_linear
from lowdim.linalg import householder_product
from lowdim.modules import describe_layers
from lowdim.testing.layer_case import LayerCase


def product(v):
    """`H(v_1) H(v_2) ...`, one reflector after the other."""
    q = torch.eye(len(v), dtype=v.dtype)
    for column in v.T:
        q = q - 2 * torch.outer(q @ column, column) / column.dot(column)
    return q


class TestHouseholder(LayerCase):
    layer_class = HouseholderProjector
    how = {"rank": 3}  # noqa: RUF012 (typed in the base class)
    test_backward_keeps_no_dense_matrix = None  # U and V are larger than the dense matrix
    test_cost_is_what_runs = None  # building P and R is not what torch counts: see below

    def make(self, **how):
        """With a bias: without one `‖y‖²` does not depend on U, whose gradient would be rounding alone."""
        layer = super().make(**how)
        if layer.bias is not None and not layer.bias.is_meta:
            layer.bias.data = torch.linspace(-1, 2, self.out_features).to(layer.bias)
        return layer

    def dense(self, layer):
        middle = torch.zeros(self.out_features, self.in_features, dtype=layer.U.dtype)
        middle[range(3), range(3)] = layer.signs * self.how.get("scale", 1.0)
        return product(layer.U) @ middle @ product(layer.V)


class TestHouseholderTall(TestHouseholder):
    in_features, out_features = 20, 12
    how = {"rank": 3, "scale": 0.7}  # noqa: RUF012


class TestHouseholderOfFullRank(TestHouseholder):
    """A square orthogonal matrix."""

    in_features, out_features = 3, 3
    how = {"rank": 3, "scale": 0.3}  # noqa: RUF012


def from_vectors(v):
    sizes = {name: v.hyperparameters[name] for name in ("in_features", "out_features", "rank")}
    layer = HouseholderProjector(**sizes, dtype=torch.float64)
    layer.load_state_dict({name: v[name] for name in ("U", "V", "bias")} | {"signs": torch.ones(layer.rank)})
    return layer


@pytest.mark.parametrize("case", ["layer", "layer_square"])
def test_authors_layer(case):
    v = vectors.load("householder", case)
    layer, x = from_vectors(v), v["x"].clone().requires_grad_(True)
    v.close(householder_product(layer.U), "Q_U")
    v.close(householder_product(layer.V), "Q_V")
    v.close(householder_product(layer.V, transpose=True).T, "Q_V")
    v.close(layer.dense_weight(), "dense_weight")
    y = layer(x)
    v.close(y, "y")
    y.backward(v["grad_y"])
    v.close(x.grad, "grad_x")
    for name, parameter in layer.named_parameters():
        v.close(parameter.grad, f"grad_{name}")
    v.close(layer.directions(), v["Q_V"][: layer.rank])


def test_reference_from_linear():
    v = vectors.load("householder", "from_linear")
    linear = nn.Linear(9, 7, dtype=torch.float64)
    linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    layer = HouseholderProjector.from_linear(linear, rank=3)
    v.close(layer.dense_weight(), "dense_weight")
    v.close(layer.bias, "bias")
    R = layer.directions()
    v.close(R.T @ R, "row_projector")
    mean = HouseholderProjector.from_linear(linear, rank=3, scale="mean")
    v.close(mean.dense_weight(), "dense_weight_mean")
    assert mean.scale == pytest.approx(float(v["singular_values"].mean()), rel=1e-12)
    v.close(torch.linalg.svdvals(linear.weight)[:3], "singular_values")


@pytest.mark.parametrize("rank", [1, 5])
def test_a_start_from_unit_vectors_and_from_every_determinant(rank):
    """Where LAPACK has no reflector, and where the map of torch's parametrization does not reach."""
    torch.manual_seed(0)
    diagonal = torch.diag(torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0], dtype=torch.float64))
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    for weight in (diagonal, diagonal @ turned, -(diagonal @ turned), turned.T @ diagonal):
        linear = nn.Linear(5, 5, dtype=torch.float64)
        linear.weight.data = weight
        u, _, vh = torch.linalg.svd(weight)
        got = HouseholderProjector.from_linear(linear, rank=rank).dense_weight()
        torch.testing.assert_close(got, u[:, :rank] @ vh[:rank], rtol=1e-12, atol=1e-12)


def test_gains_stay_equal_while_it_trains():
    """The point of it: an unconstrained layer of that rank leaves equal singular values at once."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 8)
    layer = HouseholderProjector.from_linear(linear, rank=4, scale="mean")
    assert layer.scale == pytest.approx(float(torch.linalg.svdvals(linear.weight.detach())[:4].mean()))
    scale, x, target = layer.scale, torch.randn(64, 12), torch.randn(64, 8)
    before = layer.dense_weight().detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    s = torch.linalg.svdvals(layer.dense_weight().detach())
    torch.testing.assert_close(s[:4], torch.full((4,), scale), rtol=1e-5, atol=0)
    assert float(s[4:].abs().max()) < 1e-6
    assert not torch.allclose(layer.dense_weight(), before, atol=0.01)


def test_a_step_along_a_direction_has_the_gain():
    layer = HouseholderProjector(9, 12, rank=4, scale=2.5, seed=0, dtype=torch.float64)
    D, x = layer.directions(), torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(D @ D.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    moves = layer(x + 0.3 * D) - layer(x)  # (4, 12): one step along each
    torch.testing.assert_close(moves @ moves.T, (2.5 * 0.3) ** 2 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(layer.directions(2), D[:2])
    other = x - D.T @ (D @ x)
    torch.testing.assert_close(layer(other), layer.bias.detach(), rtol=0, atol=1e-12)
    D.zero_()
    assert bool(layer.directions().any())
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must be an int in \[1, 4\]; got {k}"):
            layer.directions(k)


def test_what_is_kept_without_gradients_follows_every_change():
    """In place, a loaded state, another dtype, and fused steps, which do not raise a parameter's version."""
    torch.manual_seed(0)
    layer, x = HouseholderProjector(6, 5, rank=2).eval(), torch.randn(3, 6)

    def answer(net):
        with torch.no_grad():
            assert torch.equal(net(x.to(net.U.dtype)), net(x.to(net.U.dtype)))
            return net(x.to(net.U.dtype)).float()

    fresh = copy.deepcopy(layer)
    assert torch.equal(answer(copy.deepcopy(layer)), answer(layer))
    with torch.no_grad():
        layer.V.mul_(torch.rand(6, 1))
    changed = answer(layer)
    assert not torch.allclose(changed, answer(fresh))
    torch.testing.assert_close(changed, layer(x).detach())
    layer.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(answer(layer), answer(fresh))
    torch.testing.assert_close(answer(layer.double()).float(), answer(fresh))
    layer.float()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    for _ in range(2):
        before = answer(layer)
        layer(x).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(answer(layer), before)
        torch.testing.assert_close(answer(layer), layer(x).detach())


def test_into_a_model_and_back():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)).eval(), torch.randn(4, 12)
    swap_linear(model, HouseholderProjector, ["0", "2"], rank=4, scale="mean")
    assert {type(model[0]), type(model[2])} == {HouseholderProjector}
    y = model(x)
    about = describe_layers(model)
    assert about["0"] == {"class": "HouseholderProjector", "rank": 4, "scale": model[0].scale, "bias": True}
    fresh = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)).eval()
    again = load_compressed(fresh, model.state_dict(), about)
    assert torch.equal(again(x), y)
    densify(model)
    assert {type(model[0]), type(model[2])} == {nn.Linear}
    torch.testing.assert_close(model(x), y)


def test_the_scale_is_not_rounded():
    """It is an argument, not a tensor."""
    layer = HouseholderProjector(6, 5, rank=2, scale=0.123456789, seed=0)
    assert layer.bfloat16().float().scale == 0.123456789
    assert set(layer.state_dict()) == {"U", "V", "bias", "signs"}


def test_seeds():
    one, two, other = (HouseholderProjector(6, 5, rank=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.U, two.U)
    assert not torch.equal(one.U, other.U)
    wide = HouseholderProjector(100, 100, seed=0)
    assert (wide.rank, wide.scale) == (10, 1.0)
    assert abs(float(wide.V.detach().std()) - 0.05) < 2e-3
    assert not bool(wide.bias.any())


def test_cost():
    cost = HouseholderProjector(12, 20, rank=3).cost(7, itemsize=2)
    assert cost.parameters == 144 + 400 + 20
    assert cost.flops_forward == 2 * 7 * 3 * (12 + 20) + 4 * 3 * (144 + 400)
    products = 2 * (7 * 12 + 36 + 7 * 3 + 7 * 3 + 60 + 7 * 20)
    assert cost.bytes_forward == products + 2 * (544 + 2 * 3 * 32)
    assert (cost.flops_backward, cost.bytes_backward) == (2 * cost.flops_forward, 2 * cost.bytes_forward)


def test_wrong_arguments():
    for rank in (0, 5, 2.0):
        with pytest.raises(ValueError, match=r"rank must be an int in \[1, 4\]; got"):
            HouseholderProjector(6, 4, rank=rank)
        with pytest.raises(ValueError, match=r"rank must be an int in \[1, 4\]; got"):
            HouseholderProjector.from_linear(nn.Linear(6, 4), rank=rank)
    with pytest.raises(ValueError, match=r"layer 0: rank must be an int in \[1, 4\]; got 10"):
        swap_linear(nn.Sequential(nn.Linear(6, 4)), HouseholderProjector)
    for scale in ("mean", float("nan"), None):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            HouseholderProjector(6, 4, rank=2, scale=scale)
    with pytest.raises(ValueError, match="scale must be a finite number or \"mean\"; got 'median'"):
        HouseholderProjector.from_linear(nn.Linear(6, 4), rank=2, scale="median")
    layer = HouseholderProjector(6, 4, rank=2)
    with torch.no_grad():
        layer.V[:, 3] = 0
    with pytest.raises(ValueError, match="column 3 of v is zero"):
        layer(torch.zeros(1, 6))
