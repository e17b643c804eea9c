import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
import vectors
from lowdim.compress import (
    LowRankLinear,
    PELAConfig,
    last_report,
    pela,
    pela_factors,
    pela_rank,
)
from lowdim.errors import NoMatchingModuleError
from lowdim.ranks import parameter_rank
from lowdim.testing.compress_case import CompressCase, small_net


class TestPELA(CompressCase):
    options = {"compression_ratio": 2.0}  # noqa: RUF012 (typed in the base class)
    needs_data = False

    def compress(self, model, batches, **options):
        return pela(model, PELAConfig(**options), batches)

    def expected(self, layer, inputs, compressed):
        out, inn = layer.weight.shape
        rank = math.floor(out * inn / (2.0 * (out + inn)))
        U, S, Vt = torch.linalg.svd(layer.weight)
        return inputs @ (U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]).T + layer.bias


class TestPELAFractionalRatio(TestPELA):
    options = {"compression_ratio": 1.5}  # noqa: RUF012

    def expected(self, layer, inputs, compressed):
        out, inn = layer.weight.shape
        rank = math.floor(out * inn / (1.5 * (out + inn)))
        U, S, Vt = torch.linalg.svd(layer.weight)
        return inputs @ (U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]).T + layer.bias


def single(in_features=12, out_features=20, bias=True):
    return nn.Sequential(nn.Linear(in_features, out_features, bias, dtype=torch.float64))


# Vectors


@pytest.mark.parametrize("case", ["factors_ratio3", "factors_ratio1_5"])
def test_reference_factors(case):
    v = vectors.load("pela", case)
    ratio = v.hyperparameters["compression_ratio"]
    out_features, in_features = v["weight"].shape
    rank = pela_rank(in_features, out_features, ratio)
    assert rank == int(v["rank"])
    A, B = pela_factors(v["weight"], rank)
    v.close(B @ A, "dense_weight")
    v.close(A @ A.T, torch.diag(v["singular_values"]))
    v.close(torch.linalg.eigvalsh(v["AAt"]).flip(0), "singular_values")
    v.close(torch.linalg.eigvalsh(B.T @ B).flip(0), torch.linalg.eigvalsh(v["BtB"]).flip(0))

    model = single(in_features, out_features)
    model[0].load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    pela(model, PELAConfig(compression_ratio=ratio))
    assert model[0].rank == rank
    v.close(model(v["x"]), "y")
    v.close(model[0].A @ model[0].A.T, torch.diag(v["singular_values"]))
    v.close(model[0].B.T @ model[0].B, torch.diag(v["singular_values"]))


# Ranks


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0, 7.3])
@pytest.mark.parametrize("shape", [(384, 1536), (768, 768), (40, 24), (100, 29), (11, 3)])
def test_a_layer_shrinks_by_the_ratio(shape, ratio):
    inn, out = shape
    rank = pela_rank(inn, out, ratio)
    assert rank * (inn + out) * ratio <= inn * out * (1 + 1e-9) < (rank + 1) * (inn + out) * ratio
    assert rank == parameter_rank(out, inn, share=1 / ratio)
    assert rank < min(inn, out)


def test_a_quotient_that_rounding_puts_below_a_whole_number():
    assert 1 / 3 * 24 * 40 / 64 < 5 or 24 * 40 / 64 * (1 / 3) <= 5
    assert pela_rank(24, 40, 3) == 5
    assert all(pela_rank(2 * k, 2 * k, k) == 1 for k in range(1, 200))  # (2k)² / (k 4k) = 1


# What it computes


def test_the_report_has_rank_parameters_and_error():
    model = single(16, 24)
    s = torch.linalg.svdvals(model[0].weight.detach())
    pela(model, PELAConfig(compression_ratio=3))
    (row,) = last_report(model).layers
    rank = math.floor(16 * 24 / (3 * 40))
    assert (last_report(model).system, row.rank, row.what, row.replaced) == ("PELA", rank, f"rank {rank}", True)
    assert (row.before, row.after) == (16 * 24 + 24, rank * 40 + 24)
    assert row.relative_error == pytest.approx(float((s[rank:].square().sum() / s.square().sum()).sqrt()), rel=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_is_copied(bias):
    model = single(bias=bias)
    want = None if not bias else model[0].bias.detach().clone()
    pela(model, PELAConfig())
    assert (model[0].bias is not None) is bias
    assert want is None or torch.equal(model[0].bias, want)


def test_what_is_left_dense_says_why():
    model = nn.ModuleDict(
        {
            "up": nn.Linear(32, 64),
            "narrow": nn.Linear(64, 9),
            "thin": nn.Linear(1, 12),
            "final_norm": nn.Linear(32, 32),
            "downsample": nn.Linear(32, 32),
        }
    )
    pela(model, PELAConfig())
    assert {row.name: row.note for row in last_report(model).layers} == {
        "up": "",
        "narrow": "left dense: it has 9 outputs, fewer than min_out_features=10",
        "thin": "left dense: it has rank 0 at this ratio with 12 x 1 weights",
    }
    assert type(model["final_norm"]) is type(model["downsample"]) is nn.Linear
    pela(model, PELAConfig(min_out_features=9, target_modules=["narrow", "final_norm"]))  # a name outranks `exclude`
    assert model["narrow"].rank == math.floor(64 * 9 / (2 * 73))
    assert type(model["final_norm"]) is LowRankLinear


def test_layers_that_share_a_weight_share_their_factors():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    pela(model, PELAConfig())
    assert model[2].A is model[0].A
    assert model[2].B is model[0].B
    assert model[2].bias is not model[0].bias
    assert last_report(model).after == sum(p.numel() for p in model.parameters())


def test_random_factors_for_loading_a_checkpoint():
    trained = pela(small_net(), PELAConfig())
    blank = pela(small_net(1), PELAConfig(approximate=False))
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in trained.named_parameters()}
    assert float(blank.up.dense_weight().detach().std()) > 0
    assert not torch.equal(blank.up.B, pela(small_net(1), PELAConfig()).up.B)
    assert torch.equal(blank.up.B, pela(small_net(2), PELAConfig(approximate=False)).up.B)  # the same draw each time
    blank.load_state_dict(trained.state_dict())
    x = torch.randn(4, 12)
    assert torch.equal(blank.eval()(x), trained.eval()(x))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 20))
    with pytest.raises(ValueError, match=r"layer 0: its weight is on the meta device.*approximate=False"):
        pela(empty, PELAConfig())
    assert pela(empty, PELAConfig(approximate=False))[0].A.is_meta


def test_batches_are_not_read():
    def never():
        raise AssertionError
        yield

    one, two = (pela(small_net(), PELAConfig(), batches) for batches in (None, never()))
    assert torch.equal(one.up.A, two.up.A)


def test_narrow_projections_are_named():
    model = tiny.llama(2, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8).eval()
    pela(model, PELAConfig(compression_ratio=2))
    assert model.model.layers[0].self_attn.k_proj.rank == math.floor(64 * 16 / (2 * 80))  # 6, and a head has 8
    report = last_report(model)
    assert report.details["below_head_dim"] == {
        f"model.layers.{i}.self_attn.{name}": 6 for i in range(2) for name in ("k_proj", "v_proj")
    }
    (note,) = report.notes
    assert note.startswith("4 key or value projections of grouped-query attention have a rank below the size of a head")
    assert "model.layers.0.self_attn.k_proj (6)" in note
    assert str(report).endswith(note)
    wide = pela(tiny.llama(num_attention_heads=8, num_key_value_heads=8, head_dim=8), PELAConfig(compression_ratio=2))
    assert not last_report(wide).notes  # every query head has its own
    assert not last_report(pela(tiny.llama(hidden_size=64, head_dim=4), PELAConfig(compression_ratio=1.2))).notes


# Wrong input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compression_ratio": 0.99}, r"compression_ratio must be a finite number in \[1, inf\]; got 0\.99"),
        ({"compression_ratio": math.nan}, "compression_ratio must be a finite number"),
        ({"min_out_features": 0}, "min_out_features must be an int >= 1; got 0"),
        ({"feature_weight": -1.0}, "feature_weight must be a finite number"),
        ({"logit_weight": -1.0}, "logit_weight must be a finite number"),
        ({"perturbation_weight": math.inf}, "perturbation_weight must be a finite number"),
        ({"perturbation_eps": -1e-9}, "perturbation_eps must be a finite number"),
        ({"feature_modules": ()}, "feature_modules must name at least one module; got an empty list"),
    ],
)
def test_bad_config(options, match):
    with pytest.raises(ValueError, match=match):
        PELAConfig(**options)


def test_nothing_to_factorize():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 3))
    with pytest.raises(NoMatchingModuleError, match=r"nothing to factorize at compression_ratio=50: 0 has rank 0 .*3 outputs"):
        pela(model, PELAConfig(compression_ratio=50))
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="no layer is left"):
        pela(nn.Sequential(nn.LayerNorm(3)), PELAConfig())


def test_a_second_call_finds_the_layers_that_are_left():
    model = pela(small_net(), PELAConfig(target_modules=["up"]))
    pela(model, PELAConfig())
    assert [row.name for row in last_report(model).layers] == ["down"]
    with pytest.raises(ValueError, match=r"up is a LowRankLinear already"):
        pela(model, PELAConfig())


def test_half_precision_is_decomposed_in_float32():
    model = nn.Sequential(nn.Linear(16, 24)).to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    pela(model, PELAConfig())
    pela(wide, PELAConfig())
    assert torch.equal(model[0].A, wide[0].A.bfloat16())
    assert torch.equal(model[0].B, wide[0].B.bfloat16())
    F.linear(torch.ones(1, 16, dtype=torch.bfloat16), model[0].A)
