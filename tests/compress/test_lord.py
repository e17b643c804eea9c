import copy
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vectors
from lowdim.calibrate import collect
from lowdim.compress import (
    LoRDConfig,
    LowRankLinear,
    last_report,
    lord,
    lord_factors,
    lord_rank,
    lord_spectra,
)
from lowdim.plan import measure
from lowdim.testing.compress_case import CompressCase, small_net


class TestLoRD(CompressCase):
    options = {"rank_ratio": 0.5}  # noqa: RUF012 (typed in the base class)
    lossless = {"rank_ratio": 1.0, "skip_unprofitable": False}  # noqa: RUF012

    def compress(self, model, batches, **options):
        return lord(model, LoRDConfig(**options), batches)

    def expected(self, layer, inputs, compressed):
        y = inputs @ layer.weight.T + layer.bias
        mean = y.mean(0)
        covariance = (y - mean).T @ (y - mean) / len(y)
        rank = min(layer.weight.shape) // 2
        V = torch.linalg.eigh(covariance).eigenvectors[:, -rank:]  # of the largest eigenvalues
        return mean + (y - mean) @ V @ V.T


class TestLoRDUncentred(TestLoRD):
    options = {"param_ratio": 0.6, "centered": False}  # noqa: RUF012

    def expected(self, layer, inputs, compressed):
        y = inputs @ layer.weight.T + layer.bias
        out, inn = layer.weight.shape
        rank = math.floor(0.6 * out * inn / (out + inn))
        V = torch.linalg.eigh(y.T @ y / len(y)).eigenvectors[:, -rank:]
        return y @ V @ V.T


def samples(in_features, rows=200, seed=0):
    """Correlated inputs with a mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, dtype=torch.float64, generator=generator)
    return x * torch.logspace(0.5, -0.5, in_features, dtype=torch.float64) + torch.linspace(-2, 2, in_features).double()


def single(in_features=12, out_features=20, bias=True):
    return nn.Sequential(nn.Linear(in_features, out_features, bias, dtype=torch.float64))


def squared_error(layer, x, y):
    return float((layer(x) - y).square().sum().detach())


# Vectors


@pytest.mark.parametrize("case", ["layer_bias", "layer_no_bias"])
def test_reference_layer(case):
    v = vectors.load("lord", case)
    bias, rank = v.tensors.get("bias"), v.hyperparameters["rank"]
    A, B, new_bias = lord_factors(v["weight"], bias, v["mean"], v["covariance"], rank)
    v.close(B @ B.T, "projector")
    v.close(B @ A, "dense_weight")
    v.close(new_bias, "new_bias")

    out_features, in_features = v["weight"].shape
    model = single(in_features, out_features, bias is not None)
    model[0].load_state_dict({"weight": v["weight"], **({} if bias is None else {"bias": bias})})
    spectra = lord_spectra(model, [v["x"]])["0"]
    v.close(spectra**2, "eigenvalues")
    config = LoRDConfig(rank=rank, skip_unprofitable=False)
    with pytest.warns(UserWarning, match="few calibration tokens"):
        lord(model, config, iter(v["x"].split(7)))
    v.close(model(v["x"]), "y")
    v.close(model[0].bias, "new_bias")
    (row,) = last_report(model).layers
    v.close(torch.tensor(row.relative_error, dtype=torch.float64), "relative_error")


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_reference_model():
    v = vectors.load("lord", "model")
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 6)).double()
    model.load_state_dict({"0.weight": v["w1"], "0.bias": v["b1"], "2.weight": v["w2"], "2.bias": v["b2"]})
    config = LoRDConfig(rank_ratio=v.hyperparameters["rank_ratio"], skip_unprofitable=v.hyperparameters["skip_unprofitable"])
    lord(model, config, [v["x"]])
    for i, layer in enumerate((model[0], model[2])):
        v.close(layer.dense_weight(), f"dense{i + 1}")
        v.close(layer.bias, f"bias{i + 1}")
        assert layer.rank == int(v["ranks"][i])
    v.close(model(v["x"]), "y")


# What it computes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_error_is_the_sum_of_the_eigenvalues_left_out(bias, centered):
    model, x = single(bias=bias), samples(12)
    y = model(x).detach()
    base = y - y.mean(0) if centered else y
    eigenvalues = torch.linalg.eigvalsh(base.T @ base).flip(0)
    lord(model, LoRDConfig(rank=4, centered=centered), [x[:50], x[50:]])
    assert squared_error(model[0], x, y) == pytest.approx(float(eigenvalues[4:].sum()), rel=1e-9)
    error = last_report(model).layers[0].relative_error
    assert error == pytest.approx(math.sqrt(float(eigenvalues[4:].sum() / eigenvalues.sum())), rel=1e-9)
    assert (model[0].bias is None) is not (bias or centered)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_never_worse_on_the_samples_than_a_weight_svd(rank):
    model, x = single(), samples(12)
    y, svd = model(x).detach(), LowRankLinear.from_linear(model[0], rank=rank)
    lord(model, LoRDConfig(rank=rank), [x])
    assert squared_error(model[0], x, y) < 0.9 * squared_error(svd, x, y)


def test_the_bias_is_compensated():
    model, x = single(), samples(12)
    y = model(x).detach()
    old = model[0].bias.detach().clone()
    lord(model, LoRDConfig(rank=2), [x])
    torch.testing.assert_close(model(x).mean(0), y.mean(0), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model[0].bias.copy_(old)
    assert float((model(x).mean(0) - y.mean(0)).detach().abs().max()) > 0.1  # what a forgotten compensation costs


def test_a_large_mean_does_not_cancel():
    model, x = single(bias=True), samples(12)
    with torch.no_grad():
        model[0].bias.add_(1e6)
    y = model(x).detach()
    base = y - y.mean(0)
    lord(model, LoRDConfig(rank=4), [x[:100], x[100:]])
    want = float(torch.linalg.eigvalsh(base.T @ base).flip(0)[4:].sum())
    assert squared_error(model[0], x, y) == pytest.approx(want, rel=1e-4)


def test_statistics_come_from_the_untouched_model():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 12)).double(), samples(12, 400)
    alone = copy.deepcopy(model)
    lord(model, LoRDConfig(rank=3), [x])
    lord(alone, LoRDConfig(rank=3, target_modules=["2"]), [x])
    assert torch.equal(model[2].A, alone[2].A)
    assert torch.equal(model[2].bias, alone[2].bias)


def test_as_many_passes_as_half_of_the_model_asks_for(monkeypatch):
    """Sums of 8 · 48² bytes a layer; the model's weights take fewer, so the least decides."""
    x, passes = [samples(12, 300, seed=i).float() for i in range(2)], []

    class Counted:
        def __iter__(self):
            passes.append(1)
            return iter(x)

    whole, spectra = lord(small_net(), LoRDConfig(rank=4), x).state_dict(), lord_spectra(small_net(), x)
    monkeypatch.setattr(sys.modules["lowdim.compress.lord.statistics"], "_LEAST", 8 * 48**2)
    got = lord(small_net(), LoRDConfig(rank=4), Counted()).state_dict()
    assert len(passes) == 2
    assert all(torch.equal(value, whole[name]) for name, value in got.items())
    found = lord_spectra(small_net(), Counted())
    assert len(passes) == 4
    assert all(torch.equal(found[name], values) for name, values in spectra.items())
    lord(small_net(), LoRDConfig(rank=4), iter(x))  # a generator is read once, whatever that takes


def test_sums_are_held_once():
    model, x = (
        nn.Sequential(*(nn.Linear(8, 256) if i % 2 == 0 else nn.Linear(256, 8) for i in range(6))),
        samples(8, 20).float(),
    )
    layers = {name: layer for name, layer in model.named_children() if layer.out_features == 256}
    kept = []
    peak = measure(lambda: kept.append(collect(model, layers, {"output_covariance"}, [x])), model=model).bytes
    assert 3 * 8 * 256**2 < peak < 4.6 * 8 * 256**2, "three sums, and one matrix in making"


def test_several_passes_give_the_same():
    x = [samples(12, 300, seed=i).float() for i in range(3)]
    want = lord(small_net(), LoRDConfig(rank=4), x).state_dict()
    passes = []

    class Counted:
        def __iter__(self):
            passes.append(1)
            return iter(x)

    got = lord(small_net(), LoRDConfig(rank=4), Counted(), max_bytes=8 * 48**2).state_dict()
    assert len(passes) == 2
    assert all(torch.equal(value, want[name]) for name, value in got.items())
    with pytest.raises(ValueError, match=r"read only once, but max_bytes=18432 asks for 2 passes"):
        lord(small_net(), LoRDConfig(rank=4), iter(x), max_bytes=8 * 48**2)
    with pytest.raises(ValueError, match="max_bytes must be an int >= 1"):
        lord(small_net(), LoRDConfig(rank=4), x, max_bytes=0)


def test_padding_does_not_count():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 20)

        def forward(self, x, attention_mask=None):
            return self.up(x)

    x = torch.randn(40, 9, 6)
    mask = (torch.arange(9) < torch.randint(2, 9, (40, 1))).long()
    padded = torch.where(mask[..., None].bool(), x, 100.0)
    torch.manual_seed(0)
    one, two = Model(), Model()
    two.load_state_dict(one.state_dict())
    lord(one, LoRDConfig(rank=3), [{"x": padded, "attention_mask": mask}])
    lord(two, LoRDConfig(rank=3), [(x[mask.bool()],)])
    torch.testing.assert_close(one.up.dense_weight(), two.up.dense_weight(), rtol=1e-5, atol=1e-6)
    assert last_report(one).details["tokens"] == int(mask.sum())


def test_fewer_tokens_than_outputs():
    model, x = single(12, 40), samples(12, rows=5)
    with pytest.warns(UserWarning, match=r"layer 0 with 40 outputs saw 5.*1 of 1 layers"):
        lord(model, LoRDConfig(rank=8, skip_unprofitable=False), [x])
    assert bool(torch.isfinite(model[0].A).all())
    assert last_report(model).layers[0].relative_error < 1e-6  # five points span four directions


def test_constant_outputs():
    model = single()
    lord(model, LoRDConfig(rank=2), [torch.ones(400, 12, dtype=torch.float64)])
    assert last_report(model).layers[0].relative_error == pytest.approx(0, abs=1e-6)
    assert bool(torch.isfinite(model[0].dense_weight()).all())


# Ranks


def test_ranks_by_hand():
    assert lord_rank(1536, 384, rank_ratio=0.5) == 192
    assert lord_rank(1536, 384, param_ratio=1.0) == 307
    assert lord_rank(6144, 6144, rank_ratio=1 - 19 / 48, multiple=128) == 3712
    assert lord_rank(100, 200, rank_ratio=0.29) == 29  # 0.29 * 100 is a hair below 29
    assert lord_rank(10, 10, rank_ratio=0.5, multiple=64) == 5  # not 0
    assert lord_rank(3, 3, param_ratio=0.01) == 1


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.001, 1.0), st.sampled_from([1, 8, 64]), st.booleans())
def test_rank_properties(out_features, in_features, ratio, multiple, by_parameters):
    name = "param_ratio" if by_parameters else "rank_ratio"
    rank = lord_rank(out_features, in_features, **{name: ratio}, multiple=multiple)
    assert 1 <= rank <= min(out_features, in_features)
    assert rank % multiple == 0 or rank < multiple
    if by_parameters and rank > 1:
        assert rank * (out_features + in_features) <= ratio * out_features * in_features * (1 + 1e-6)
    if not by_parameters and rank > 1:
        assert rank <= ratio * min(out_features, in_features) * (1 + 1e-6)


def test_layers_that_would_not_shrink_stay_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 40))
    linear = model[0]
    lord(model, LoRDConfig(rank_ratio=0.5), [torch.randn(500, 8)])  # rank 4 is break-even for 8 x 8
    assert model[0] is linear
    report = last_report(model)
    assert [row.rank for row in report.layers] == [None, 4]
    assert report.left_dense[0].note == "left dense: it would not shrink"
    assert (report.before, report.after) == (72 + 360, 72 + 4 * 48 + 40)
    assert "1 layers replaced, 1 left dense" in str(report)
    assert report.to_dict()["left_dense"] == 1
    lord(model, LoRDConfig(rank=3, target_modules=["0"]), [torch.randn(500, 8)])
    assert model[0].rank == 3


def test_nothing_shrinks_is_a_warning():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.warns(UserWarning, match="left all 1 layers of Sequential dense"):
        lord(model, LoRDConfig(rank_ratio=0.75), [torch.randn(500, 8)])
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_rank_table():
    x = [samples(12).float()]
    model = lord(small_net(), LoRDConfig(rank={"up": 5}), x)
    assert model.up.rank == 5
    assert type(model.down) is nn.Linear
    model = lord(small_net(), LoRDConfig(rank={"up": 5, "down": 3}, rank_multiple=2, target_modules=["down"]), x)
    assert model.down.rank == 2
    assert type(model.up) is nn.Linear
    model = lord(small_net(), LoRDConfig(rank={"classifier": 1}), x)  # named, so the exclusion does not apply
    assert model.classifier.rank == 1


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rank": {"upp": 2}}, "rank names no module 'upp'; nearest: up"),
        ({"rank": {"up": 2}, "target_modules": ["up", "down"]}, "rank has no entry for down"),
        ({"rank": 13}, r"layer up: rank must be in \[1, 12\]; got 13"),
        ({"rank": {"down": 13}}, r"layer down: rank must be in \[1, 12\]; got 13"),
        ({"rank_ratio": 0.5, "exclude": ("up", "down", "classifier")}, "no layer is left"),
    ],
)
def test_ranks_that_do_not_fit_the_model(config, match):
    with pytest.raises(ValueError, match=match):
        lord(small_net(), LoRDConfig(**config), [samples(12).float()])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "exactly one of rank, rank_ratio and param_ratio must be given; got none"),
        ({"rank": 2, "rank_ratio": 0.5}, "got rank, rank_ratio"),
        ({"rank": 0}, "rank must be an int >= 1; got 0"),
        ({"rank": {}}, "rank must name at least one module"),
        ({"rank": {"up": 0}}, r"rank\['up'\] must be an int >= 1; got 0"),
        ({"rank_ratio": 0.0}, r"rank_ratio must be a finite number in \(0, 1\]; got 0.0"),
        ({"param_ratio": 1.5}, r"param_ratio must be a finite number in \(0, 1\]; got 1.5"),
        ({"rank": 2, "rank_multiple": 0}, "rank_multiple must be an int >= 1; got 0"),
    ],
)
def test_bad_config(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LoRDConfig(**kwargs)


# Wrong input


def test_one_batch_instead_of_many():
    with pytest.raises(TypeError, match="batches must be an iterable of batches; got a single Tensor"):
        lord(small_net(), LoRDConfig(rank=2), torch.randn(100, 12))


def test_an_expert_without_tokens_is_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 20) for _ in range(3))

        def forward(self, x):
            return self.experts[0](x) + self.experts[2](x) + self.experts[1](x[:0]).sum()

    with pytest.raises(ValueError, match=r"layer experts\.1 saw no token"):
        lord(Experts(), LoRDConfig(rank=2), [torch.randn(300, 6)])


def test_bad_factors():
    w, mean, cov = torch.zeros(4, 6), torch.zeros(4), torch.eye(4)
    with pytest.raises(ValueError, match=r"rank must be an int in \[1, 4\]; got 5"):
        lord_factors(w, None, mean, cov, 5)
    with pytest.raises(ValueError, match=r"covariance must have shape \(4, 4\) .* got \(3, 3\)"):
        lord_factors(w, None, mean, torch.eye(3), 2)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        lord_factors(w, torch.zeros(5), mean, cov, 2)
    with pytest.raises(ValueError, match="mean has NaN or infinite"):
        lord_factors(w, None, mean + torch.nan, cov, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_take_the_weights_dtype(dtype):
    w, cov = torch.randn(4, 6).to(dtype), torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    A, B, bias = lord_factors(w, None, torch.zeros(4, dtype=torch.float64), cov, 2)
    assert A.dtype == B.dtype == bias.dtype == dtype
    torch.testing.assert_close(B @ A, torch.diag(torch.tensor([1.0, 1, 0, 0])).to(dtype) @ w)


def test_a_model_without_a_report():
    with pytest.raises(ValueError, match="Linear has no compression report"):
        last_report(nn.Linear(2, 2))


def test_rank_table_by_a_second_name_or_a_suffix_of_others():
    shared = nn.Linear(12, 40)
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": shared}), "b": nn.ModuleDict({"up": shared, "more": nn.Linear(40, 12)})})
    model["up"] = nn.Linear(12, 40)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["b"]["more"](self.parts["a"]["up"](x) + self.parts["up"](x))

    whole = lord(Call(), LoRDConfig(rank={"parts.b.up": 4}), [torch.randn(500, 12)])
    assert model["a"]["up"] is model["b"]["up"]
    assert model["a"]["up"].rank == 4
    assert type(whole.parts["up"]) is nn.Linear
    lord(whole, LoRDConfig(rank={"parts.up": 3}), [torch.randn(500, 12)])
    assert whole.parts["up"].rank == 3
    assert model["a"]["up"].rank == 4


def test_inside_torchs_own_attention():
    model = nn.TransformerEncoderLayer(12, 2, 48, batch_first=True)  # its out_proj is read, never called
    lord(model, LoRDConfig(rank=4), [torch.randn(50, 10, 12)])
    assert [row.name for row in last_report(model).layers] == ["linear1", "linear2"]


def test_layers_that_share_a_weight_are_left_alone():
    model = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 12), nn.Linear(12, 40))
    model[2].weight = model[0].weight  # each has its own outputs, so one pair of factors cannot serve both
    lord(model, LoRDConfig(rank=3), [torch.randn(500, 12)])
    assert model[2].weight is model[0].weight
    assert isinstance(model[1], LowRankLinear)
    assert last_report(model).left_dense[0].note == "left dense: tied to 2.weight"
