import copy
import math

import pytest
import torch
from torch import nn

import vectors
from lowdim import ranks
from lowdim.compress import (
    LowRankLinear,
    WeLoreConfig,
    WeLoreLinear,
    last_report,
    load_low_rank,
    welore,
    welore_freeze,
)
from lowdim.layers import densify
from lowdim.linalg import stream
from lowdim.testing.compress_case import CompressCase, small_net
from lowdim.testing.sharded_case import Subject


class TestWeLore(CompressCase):
    options = {"threshold": 0.6, "min_reduction": 0.0}  # noqa: RUF012 (typed in the base class)
    needs_data = False
    compressed = (WeLoreLinear,)

    def compress(self, model, batches, **options):
        return welore(model, WeLoreConfig(**options), batches)

    def expected(self, layer, inputs, compressed):
        u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
        z = (s - s.min()) / (s.max() - s.min())
        rank = int((z >= 0.6).sum())
        return inputs @ (u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]).T + layer.bias

    # The least singular value falls below any threshold above 0, so outputs stay only where it is 0: see
    # `test_what_has_low_rank_is_kept_whole`.
    lossless = None

    # What is loaded without the report are plain low-rank layers; their outputs are compared bit by bit in the base class.

    def test_loaded_layers_are_trained(self):
        small = self.run(small_net())
        loaded = load_low_rank(small_net(seed=5), small.state_dict())
        assert isinstance(loaded.up, LowRankLinear)
        assert len(welore_freeze(loaded)) == 4


def decaying(out_features, in_features, power, seed=0):
    """A matrix with singular values i^-power."""
    draw = stream(seed, "test")
    d = min(out_features, in_features)
    u, v = (torch.linalg.qr(torch.randn(n, d, dtype=torch.float64, generator=draw)).Q for n in (out_features, in_features))
    return u * torch.arange(1, d + 1, dtype=torch.float64) ** -power @ v.T


def net(*powers, dtype=torch.float64, bias=True):
    layers = [nn.Linear(16, 16, bias, dtype=dtype) for _ in powers]
    with torch.no_grad():
        for i, (layer, power) in enumerate(zip(layers, powers)):
            layer.weight.copy_(decaying(16, 16, power, seed=i))
    return nn.Sequential(*layers)


# Vectors


def test_official_ranks_and_factors():
    v = vectors.load("welore", "ranks")
    shapes = v.hyperparameters["shapes"]
    layers = {f"l{i}": nn.Linear(shape[1], shape[0], False, dtype=torch.float64) for i, shape in enumerate(shapes)}
    for i, layer in enumerate(layers.values()):
        layer.weight.data.copy_(v[f"weight{i}"])
    dense = dict(layers)
    model = nn.ModuleDict(layers)
    welore(model, WeLoreConfig(threshold=v.hyperparameters["threshold"], min_reduction=v.hyperparameters["min_reduction"]))
    report = model.welore_report
    assert report["threshold"] == 0.175
    for i, name in enumerate(dense):
        if not v["is_lrc"][i]:
            assert model[name] is dense[name]
            assert report["layers"][name] == ("dense", min(shapes[i]))
            continue
        assert report["layers"][name] == ("lrc", int(v["ranks"][i]))
        v.close(model[name].dense_weight(), f"approx{i}")
        v.close(model[name].U @ model[name].V, f"approx{i}")
        v.close(model[name].U.T @ model[name].U, f"gram_U{i}")
        v.close(model[name].V @ model[name].V.T, f"gram_V{i}")
    assert v["is_lrc"].any()
    assert not v["is_lrc"].all()


def test_official_ranks_by_the_rule_alone():
    v = vectors.load("welore", "ranks")
    spectra = {str(i): torch.linalg.svdvals(v[f"weight{i}"]) for i in range(4)}
    assert list(ranks.welore_at(spectra, 0.175).values()) == v["ranks"].tolist()


# What it computes


def test_factors_are_the_best_approximation_and_the_bias_stays():
    model = net(2.0, 0.1)
    first = copy.deepcopy(model[0])
    welore(model, WeLoreConfig(target=0.5))
    layer, x = model[0], torch.randn(5, 16, dtype=torch.float64)
    r = layer.rank
    assert layer.U.shape == (16, r)
    assert layer.V.shape == (r, 16)
    assert torch.equal(layer.bias, first.bias)
    s = torch.linalg.svdvals(first.weight.detach())
    error = torch.linalg.matrix_norm(layer.dense_weight().detach() - first.weight.detach())
    assert float(error) == pytest.approx(float(s[r:].square().sum().sqrt()), rel=1e-9)
    torch.testing.assert_close(layer(x), (x @ layer.V.T) @ layer.U.T + layer.bias)
    root = s[:r].sqrt()
    torch.testing.assert_close(layer.U.detach().norm(dim=0), root)
    torch.testing.assert_close(layer.V.detach().norm(dim=1), root)


def test_layers_that_fall_faster_get_fewer_ranks():
    model = welore(net(2.0, 1.0, 0.5, 0.1), WeLoreConfig(target=0.6, min_reduction=0.0))
    kept = [rank for _, rank in model.welore_report["layers"].values()]
    assert kept == sorted(kept)
    assert len(set(kept)) > 2
    details = last_report(model).details
    assert 0.6 <= details["reduction"] < 0.75
    assert details["reduction"] == details["reduction_in_components"] == pytest.approx(1 - sum(kept) / 64)


def test_dense_layers_count_for_the_target_but_keep_their_ranks():
    model = net(2.0, 0.6)
    dense = model[1]
    welore(model, WeLoreConfig(target=0.6))
    assert model[1] is dense
    (one, two), details = last_report(model).layers, last_report(model).details
    assert (one.rank, two.rank) == (3, None)
    gone = round(details["reduction"] * 32) - 13
    assert 0 < gone <= 8  # below the threshold, and yet not taken
    assert two.note == f"left dense: {gone} of 16 ranks below the threshold"
    assert details["reduction_in_components"] == 13 / 32
    assert model.welore_report["layers"] == {"0": ("lrc", 3), "1": ("dense", 16)}


def test_more_than_min_reduction_is_strict():
    model = net(1.0)
    s = torch.linalg.svdvals(model[0].weight.detach())
    threshold = float((s[7] + s[8]) / 2 - s[-1]) / float(s[0] - s[-1])  # half of the ranks go
    with pytest.warns(UserWarning, match=r"left all 1 layers of Sequential dense.*min_reduction=0\.5"):
        welore(model, WeLoreConfig(threshold=threshold))
    assert type(model[0]) is nn.Linear
    welore(model, WeLoreConfig(threshold=threshold, min_reduction=0.4999))  # the authors' number
    assert model[0].rank == 8


def test_parameters_and_ranks_are_reported_apart():
    model = net(1.0)
    before = sum(p.numel() for p in model.parameters())
    welore(model, WeLoreConfig(threshold=0.06, min_reduction=0.4))
    report = last_report(model)
    assert report.system == "WeLore"
    (row,) = report.layers
    assert report.before == row.before == before
    assert report.after == row.after == sum(p.numel() for p in model.parameters())
    assert row.after == row.rank * 32 + 16
    assert report.details["reduction"] == 1 - row.rank / 16
    s = torch.arange(1, 17).double() ** -1.0
    assert row.relative_error == pytest.approx(float((s[row.rank :].square().sum() / s.square().sum()).sqrt()), rel=1e-9)


def test_at_half_the_rank_a_square_layer_saves_nothing():
    model = welore(net(1.0), WeLoreConfig(threshold=0.0625, min_reduction=0.49))
    assert model[0].rank == 8
    assert last_report(model).before == last_report(model).after


def test_what_has_low_rank_is_kept_whole():
    model = nn.Sequential(nn.Linear(12, 20, dtype=torch.float64), nn.Tanh(), nn.Linear(20, 12, dtype=torch.float64))
    draw = stream(3, "test")
    with torch.no_grad():
        for layer in (model[0], model[2]):
            B = torch.randn(layer.out_features, 3, dtype=torch.float64, generator=draw)
            layer.weight.copy_(B @ torch.randn(3, layer.in_features, dtype=torch.float64, generator=draw))
    x = torch.randn(6, 12, dtype=torch.float64)
    want = model(x).detach()
    welore(model, WeLoreConfig(threshold=1e-9))
    assert [rank for _, rank in model.welore_report["layers"].values()] == [3, 3]
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)
    assert max(row.relative_error for row in last_report(model).layers) < 1e-12


# Traps


def test_equal_singular_values_stay_dense():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[1].weight.copy_(torch.diag(torch.logspace(0, -3, 8)))
    welore(model, WeLoreConfig(target=0.4))
    assert model.welore_report["layers"]["0"] == ("dense", 8)
    assert model.welore_report["layers"]["1"][0] == "lrc"
    assert last_report(model).layers[0].note == "left dense: 0 of 8 ranks below the threshold"


def test_a_zero_weight_stays_dense():
    model = net(1.0, 1.0)
    nn.init.zeros_(model[0].weight)
    welore(model, WeLoreConfig(target=0.3))
    assert model.welore_report["layers"]["0"] == ("dense", 16)
    assert all(math.isfinite(row.relative_error) for row in last_report(model).layers)


def test_one_row_layers_are_skipped():
    model = nn.Sequential(*net(1.0), nn.Linear(16, 1, dtype=torch.float64))
    alone = net(1.0)
    welore(model, WeLoreConfig(target=0.8))
    welore(alone, WeLoreConfig(target=0.8))
    assert model.welore_report["threshold"] == alone.welore_report["threshold"]  # it does not count
    assert model.welore_report["layers"]["1"] == ("dense", 1)
    assert last_report(model).layers[1].note == "left dense: it has one row or column"
    with pytest.raises(ValueError, match="no layer is left: each of 0 has one row or column"):
        welore(nn.Sequential(nn.Linear(5, 1)), WeLoreConfig())


def test_normalised_by_the_least_value_too():
    # s = 1, 0.6, 0.5: by s / max no rank falls below 0.4; by (s - min) / (max - min) = 1, 0.2, 0 two do.
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64))
    model[0].weight.data = torch.diag(torch.tensor([1.0, 0.6, 0.5], dtype=torch.float64))
    welore(model, WeLoreConfig(threshold=0.4))
    assert model[0].rank == 1


@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_kept_where_there_is_one(bias):
    model = net(1.5, bias=bias)
    welore(model, WeLoreConfig(target=0.7))
    assert (model[0].bias is not None) is bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factored_in_better_precision_and_cast_once(dtype):
    model = net(1.5, 0.2).to(dtype)
    wide = copy.deepcopy(model).double()
    config = WeLoreConfig(target=0.55)
    welore(model, config)
    welore(wide, config)
    assert model.welore_report == wide.welore_report
    assert model[0].U.dtype == model[0].V.dtype == model[0].bias.dtype == dtype
    assert torch.equal(model[0].U, wide[0].U.to(dtype))
    assert torch.equal(model[0].V, wide[0].V.to(dtype))


def test_large_weights_in_float32_agree(monkeypatch):
    want = welore(net(1.5, 0.2, dtype=torch.float32), WeLoreConfig(target=0.55))
    monkeypatch.setattr("lowdim.compress.core.spectra._SMALL", 0)
    got = welore(net(1.5, 0.2, dtype=torch.float32), WeLoreConfig(target=0.55))
    assert got.welore_report == want.welore_report
    torch.testing.assert_close(got[0].dense_weight(), want[0].dense_weight(), rtol=1e-5, atol=1e-6)


def test_layers_that_share_a_weight_share_their_factors():
    model = net(1.5, 0.2, 1.0)
    model[2].weight = model[0].weight
    alone = net(1.5, 0.2)
    welore(model, WeLoreConfig(target=0.55))
    welore(alone, WeLoreConfig(target=0.55))
    assert model.welore_report["threshold"] == alone.welore_report["threshold"]  # counted once
    assert model[2].U is model[0].U
    assert model[2].V is model[0].V
    assert model[2].bias is not model[0].bias
    assert last_report(model).after == sum(p.numel() for p in model.parameters())
    assert len(welore_freeze(model)) == 2
    again = net(0.3, 0.3, 0.3)
    again[2].weight = again[0].weight
    load_low_rank(again, model.state_dict())
    assert again[2].A is again[0].A


def test_nothing_is_cached():
    config = WeLoreConfig(target=0.5)
    welore(net(2.0, 0.1), config)
    assert welore(net(0.1, 2.0), config).welore_report["layers"]["0"][0] == "dense"


def test_names_may_be_a_regular_expression():
    model = net(1.5, 1.5)
    welore(model, WeLoreConfig(target=0.7, target_modules="[0]"))
    assert list(model.welore_report["layers"]) == ["0"]


def test_batches_are_not_read():
    def never():
        raise AssertionError
        yield

    one, two = (welore(net(1.5), WeLoreConfig(target=0.7), b) for b in (None, never()))
    assert torch.equal(one[0].U, two[0].U)


# Fine-tuning


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.body = net(1.5, 0.1, 1.5, dtype=torch.float32)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 11)

    def forward(self, ids):
        return self.lm_head(self.norm(self.body(self.embed(ids))))


def test_only_factors_are_trained():
    model = welore(Block(), WeLoreConfig(target=0.55))
    assert [kind for kind, _ in model.welore_report["layers"].values()] == ["lrc", "dense", "lrc"]
    found = welore_freeze(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in found] == ["body.0.B", "body.0.A", "body.2.B", "body.2.A"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {names[id(p)] for p in found}
    with_norms = welore_freeze(model, train_norms=True)
    assert {names[id(p)] for p in with_norms} == {names[id(p)] for p in found} | {"norm.weight", "norm.bias"}
    assert len(welore_freeze(model)) == 4  # norms are frozen again


def test_tuning_moves_the_factors_and_nothing_else():
    torch.manual_seed(0)
    model = welore(Block(), WeLoreConfig(target=0.55))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(welore_freeze(model), lr=1e-2, weight_decay=0.0)
    ids = torch.randint(11, (64,), generator=stream(0, "ids"))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 11)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"body.0.A", "body.0.B", "body.2.A", "body.2.B"}
    assert len(optimizer.state) == 4


def test_a_model_without_components_cannot_be_tuned():
    with pytest.raises(ValueError, match="Linear has no low-rank component to train; compress it with welore first"):
        welore_freeze(nn.Linear(4, 4))
    model = nn.Sequential(*net(1.0, dtype=torch.float32), LowRankLinear(16, 16, rank=2))
    with pytest.warns(UserWarning, match="left all 1 layers"):
        welore(model, WeLoreConfig(threshold=0.0))
    with pytest.raises(ValueError, match="no low-rank component"):  # the other layer is none of WeLore's
        welore_freeze(model)


def test_other_low_rank_layers_of_the_model_stay_frozen():
    model = nn.Sequential(*net(1.5, dtype=torch.float32), LowRankLinear(16, 16, rank=2))
    welore(model, WeLoreConfig(target=0.7))
    assert len(welore_freeze(model)) == 2
    assert not model[1].A.requires_grad


def test_densified_it_is_a_plain_model_again():
    model = welore(net(1.5, 0.1), WeLoreConfig(target=0.5))
    x = torch.randn(3, 16, dtype=torch.float64)
    want = model(x).detach()
    densify(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want)


def test_the_report_goes_with_copies():
    model = welore(net(1.5, 0.1), WeLoreConfig(target=0.5))
    assert copy.deepcopy(model).welore_report == model.welore_report
    assert copy.deepcopy(model)[0].U.shape == model[0].U.shape


def test_a_second_call_takes_what_is_left():
    model = welore(net(2.0, 0.6), WeLoreConfig(target=0.6))
    welore(model, WeLoreConfig(threshold=0.6))
    assert list(model.welore_report["layers"]) == ["1"]
    assert len(welore_freeze(model)) == 4  # the components of both calls


def sharded_net():
    layers = [nn.Linear(7, 12, dtype=torch.float64), nn.Tanh(), nn.Linear(12, 12, dtype=torch.float64)]
    model = nn.Sequential(*layers, nn.Linear(12, 1, dtype=torch.float64))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=stream(0, name)) / 3)
        model[0].weight.copy_(decaying(12, 7, 2.0))
    welore(model, WeLoreConfig(target=0.4))
    assert [kind for kind, _ in model.welore_report["layers"].values()] == ["lrc", "dense", "dense"]
    welore_freeze(model)
    return model


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)


SHARDED = {"welore": Subject(net=sharded_net, optimizer=adamw)}


# Wrong input


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"target": 0.5, "threshold": 0.2}, r"exactly one of target and threshold.*target=0\.5, threshold=0\.2"),
        ({"target": None}, "exactly one of target and threshold.*target=None, threshold=None"),
        ({"target": 0.0}, r"target must be a finite number in \(0, 1\); got 0\.0"),
        ({"target": 1.0}, r"target must be a finite number in \(0, 1\); got 1\.0"),
        ({"target": float("nan")}, "target must be a finite number"),
        ({"threshold": -0.1}, r"threshold must be a finite number in \[0, 1\]; got -0\.1"),
        ({"threshold": 1.1}, r"threshold must be a finite number in \[0, 1\]; got 1\.1"),
        ({"min_reduction": 1.0}, r"min_reduction must be a finite number in \[0, 1\); got 1\.0"),
        ({"min_reduction": -0.1}, r"min_reduction must be a finite number in \[0, 1\)"),
    ],
)
def test_bad_config(kwargs, match):
    with pytest.raises(ValueError, match=match):
        WeLoreConfig(**kwargs)


def test_a_threshold_alone_is_enough():
    config = WeLoreConfig(threshold=0.2)
    assert (config.target, config.threshold) == (None, 0.2)
    assert WeLoreConfig() == WeLoreConfig(target=0.5)
    assert repr(WeLoreConfig()).startswith("WeLoreConfig(target=0.5, threshold=None")
    with pytest.raises(AttributeError):
        config.threshold = 0.3


def test_a_target_out_of_reach():
    model = net(1.0)
    with pytest.raises(ValueError, match=r"target must be at most 0\.9375, which threshold 1 removes; got 0\.97"):
        welore(model, WeLoreConfig(target=0.97))
    assert type(model[0]) is nn.Linear


def test_no_linear_layer():
    with pytest.raises(ValueError, match="no layer is left"):
        welore(nn.Sequential(nn.LayerNorm(3)), WeLoreConfig())
