import copy
import json

import pytest
import torch
from torch import nn

from lowdim.errors import CheckpointError
from lowdim.modules import LowRankLinear, MaskedLinear, describe_layers, layer_class, place_blanks
from lowdim.testing.layer_case import LayerCase


class TestLowRank(LayerCase):
    layer_class = LowRankLinear
    how = {"rank": 3}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank": 12}  # noqa: RUF012

    def dense(self, layer):
        return layer.B @ layer.A


class TestLowRankTall(TestLowRank):
    in_features, out_features = 20, 12


class TestLowRankScaled(TestLowRank):
    how = {"rank": 4, "alpha": 6.0}  # noqa: RUF012
    lossless = {"rank": 12, "alpha": 0.5}  # noqa: RUF012

    def dense(self, layer):
        return 6.0 / 4 * layer.B @ layer.A


class TestLowRankSVD(TestLowRank):
    in_features, out_features = 9, 7
    how = {"rank": 2, "init": "svd"}  # noqa: RUF012
    lossless = {"rank": 7}  # noqa: RUF012

    def from_linear(self, linear, **how):
        return LowRankLinear.from_linear(linear, rank=how.get("rank", 2))


def make(init, in_features=40, out_features=30, rank=6, **kwargs):
    return LowRankLinear(in_features, out_features, rank=rank, init=init, seed=0, **kwargs)


def test_kaiming_bounds():
    layer = make("kaiming")
    for tensor, fan_in in ((layer.A, 40), (layer.B, 6), (layer.bias, 40)):
        assert 0.9 * fan_in**-0.5 < float(tensor.detach().abs().max()) <= fan_in**-0.5


def test_orthogonal_factors():
    layer = make("orthogonal", dtype=torch.float64)
    torch.testing.assert_close(layer.A @ layer.A.mT, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.B.mT @ layer.B, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_zero_starts_as_the_bias_alone():
    layer = make("zero")
    assert bool(layer.A.any())
    assert torch.equal(layer(torch.randn(2, 40)), layer.bias.expand(2, 30))


def test_svd_is_a_truncated_dense_draw():
    layer = make("svd", out_features=40, rank=40)  # nothing is truncated: the draw itself
    assert float(layer.dense_weight().detach().std()) == pytest.approx(40**-0.5, rel=0.05)
    small = make("svd", rank=6)
    spectra = [torch.linalg.svdvals(factor) for factor in (small.A.detach(), small.B.detach())]
    torch.testing.assert_close(*spectra, rtol=1e-4, atol=1e-5)  # balanced
    top = torch.linalg.svdvals(small.dense_weight().detach())[:6]
    torch.testing.assert_close(top, spectra[0] ** 2, rtol=1e-4, atol=1e-5)
    assert not bool(small.bias.any())
    assert float(make("svd", out_features=40, rank=40, std=0.02).dense_weight().detach().std()) == pytest.approx(0.02, rel=0.05)


def test_random_standard_deviations():
    layer = make("random", in_features=400, out_features=300, rank=100)
    assert float(layer.A.detach().std()) == pytest.approx(400**-0.5, rel=0.05)
    assert float(layer.B.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert float(make("random", 400, 300, 100, std=0.02).B.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not bool(layer.bias.any())


@pytest.mark.parametrize("init", ["kaiming", "orthogonal", "svd", "random"])
def test_seed_and_generator_agree_in_every_dtype(init):
    first = make(init)
    again = LowRankLinear(40, 30, rank=6, init=init, generator=torch.Generator().manual_seed(0))
    half = make(init, dtype=torch.bfloat16)
    for a, b, c in zip(first.parameters(), again.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.bfloat16(), c)


def test_scale_is_alpha_over_rank():
    A, B = torch.randn(2, 5), torch.randn(4, 2)
    layer = LowRankLinear.from_factors(A, B, alpha=3.0)
    torch.testing.assert_close(layer.dense_weight(), 1.5 * B @ A)
    assert layer.scale == 1.5
    assert LowRankLinear.from_factors(A, B).scale == 1.0
    assert "alpha=3" in repr(layer)


def test_from_factors_copies_and_is_contiguous():
    A, B, bias = torch.randn(5, 2).T, torch.randn(2, 4).T, torch.randn(4)
    layer = LowRankLinear.from_factors(A, B, bias)
    assert layer.A.is_contiguous()
    assert layer.B.is_contiguous()
    before = layer(torch.ones(5)).detach().clone()
    for tensor in (A, B, bias):
        tensor.zero_()
    assert torch.equal(layer(torch.ones(5)), before)
    assert (layer.in_features, layer.out_features, layer.rank) == (5, 4, 2)


def test_from_linear_keeps_the_largest_singular_values():
    linear = nn.Linear(9, 7, dtype=torch.float64)
    layer = LowRankLinear.from_linear(linear, rank=3)
    spectrum = torch.linalg.svdvals(linear.weight.detach())
    torch.testing.assert_close(torch.linalg.svdvals(layer.dense_weight().detach())[:3], spectrum[:3])
    for gram in (layer.A @ layer.A.mT, layer.B.mT @ layer.B):
        torch.testing.assert_close(gram.detach(), torch.diag(spectrum[:3]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rank": 0}, r"rank must be an int in \[1, 4\]; got 0"),
        ({"rank": 5}, r"rank must be an int in \[1, 4\]; got 5"),
        ({"rank": 2.0}, "rank must be an int"),
        ({"rank": 2, "alpha": 0.0}, "alpha must be a finite number"),
        ({"rank": 2, "alpha": float("nan")}, "alpha must be a finite number"),
        ({"rank": 2, "init": "svdd"}, "init must be one of .*nearest: svd"),
        ({"rank": 2, "init": "svd", "std": 0.0}, "std must be a finite number"),
        ({"rank": 2, "init": "svd", "std": "kaiming"}, "std must be a finite number"),
    ],
)
def test_bad_hyperparameters(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LowRankLinear(6, 4, **kwargs)


def test_bad_factors():
    A, B = torch.zeros(2, 5), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"A must be .* got \(2, 5\) and \(4, 3\)"):
        LowRankLinear.from_factors(A, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\); got \(5,\)"):
        LowRankLinear.from_factors(A, B, torch.zeros(5))
    with pytest.raises(ValueError, match=r"rank must be an int in \[1, 4\]; got 9"):
        LowRankLinear.from_linear(nn.Linear(5, 4), rank=9)


# What takes a layer's place


def conv1d(out_features, in_features):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


class PositivePart(MaskedLinear):
    def mask(self):
        return (self.matrix > 0).to(self.weight.dtype)

    def description(self):
        return {}


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.Linear(5, 3, bias=False), lambda: conv1d(3, 5)])
def test_masked_layers_share_the_parameters_and_give_a_layer_of_the_class_that_stood_there(make):
    old = make()
    W = (old.weight.T if old.weight.shape == (5, 3) else old.weight).detach().clone()
    layer, x = PositivePart(old), torch.randn(4, 5)
    assert layer.weight is old.weight
    assert layer.bias is old.bias
    bias = 0 if old.bias is None else old.bias
    want = x @ W.clamp_min(0).T + bias
    torch.testing.assert_close(layer(x), want)
    plain = layer.to_plain()
    assert type(plain) is type(old)
    assert plain.weight.shape == old.weight.shape
    torch.testing.assert_close(plain(x), want)
    torch.testing.assert_close(layer.to_linear()(x), want)
    with torch.no_grad():
        plain.weight.zero_()
    torch.testing.assert_close(layer(x), want)  # nothing is shared with the plain layer
    layer(x).sum().backward()
    grad = x.sum(0) * (W > 0)
    torch.testing.assert_close(old.weight.grad, grad if isinstance(old, nn.Linear) else grad.T)
    assert layer.cost(7).flops_forward == 2 * 7 * 15


def test_a_masked_layer_needs_a_weight_of_its_own():
    with pytest.raises(TypeError, match=r"layer must be nn.Linear or Conv1D; got ReLU"):
        PositivePart(nn.ReLU())
    with pytest.raises(TypeError, match="is computed"):
        PositivePart(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    frozen = nn.Linear(3, 2)
    frozen.weight.requires_grad_(False)
    plain = PositivePart(frozen.eval()).to_plain()
    assert (plain.weight.requires_grad, plain.bias.requires_grad, plain.training) == (False, True, False)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: conv1d(3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_layers_remember_what_stood_there(make, bias):
    old = make().eval()
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    layer = LowRankLinear.from_factors(A, B, torch.randn(3) if bias else None).take_place_of(old)
    plain, x = layer.to_plain(), torch.randn(4, 5)
    assert type(plain) is type(old)
    assert not layer.training
    assert not plain.training
    torch.testing.assert_close(plain(x), x @ (B @ A).T + (layer.bias if bias else 0))
    stored = plain.weight if isinstance(old, nn.Linear) else plain.weight.T
    torch.testing.assert_close(stored.detach(), B @ A)
    assert type(copy.deepcopy(layer).to_plain()) is type(old)


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_low_rank_layer_is_made_again_from_its_description(alpha, bias):
    layer = LowRankLinear(5, 3, bias, rank=2, alpha=alpha, dtype=torch.bfloat16)
    model = nn.Sequential(nn.ReLU(), layer)
    described = json.loads(json.dumps(describe_layers(model)))
    assert described == {"1": {"class": "LowRankLinear", **layer.description()}}
    again = nn.Sequential(nn.ReLU(), nn.Linear(5, 3, not bias, dtype=torch.bfloat16))
    place_blanks(again, described)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in again.parameters())
    again.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (
            {"1": {"class": "LowRankLiner", "rank": 2}},
            "'LowRankLiner', which this version .*nearest: LowRankLinear",
        ),
        ({"2": {"class": "LowRankLinear", "rank": 2, "bias": True}}, "a layer '2', which Sequential does not have; nearest: "),
        ({"1": {"class": "LowRankLinear", "rank": 4, "bias": True}}, r"layer 1: rank must be an int in \[1, 3\]; got 4"),
        ({"1": {"class": "LowRankLinear", "bias": True}}, "layer 1: .*'rank'"),
        ({"1": {"class": "LowRankLinear", "rank": 2, "bias": True, "depth": 2}}, "layer 1: .*depth"),
        ({"0": {"class": "LowRankLinear", "rank": 2, "bias": True}}, "layer 0: layer must have a weight matrix"),
    ],
)
def test_descriptions_that_do_not_fit_change_nothing(layers, match):
    model = nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    linear = model[1]
    with pytest.raises(CheckpointError, match=match):
        place_blanks(model, layers)
    assert model[1] is linear


def test_classes_of_users_are_found_by_name():
    model = nn.Sequential(nn.Linear(5, 3))
    place_blanks(model, {"0": {"class": "PositivePart"}})
    assert type(model[0]) is PositivePart
    assert layer_class("PositivePart") is PositivePart
