"""LR2VQ on whole models: the shared cases, the vectors of a layer, convolutions, the report, and the seed."""

import copy

import pytest
import torch
from torch import nn

import vectors
from lowdim.compress import (
    LR2VQConfig,
    LR2VQConv2d,
    LR2VQLinear,
    estimate_clustering_dim,
    last_report,
    load_compressed,
    lowrank_subvectors,
    lr2vq,
)
from lowdim.layers import densify
from lowdim.modules import describe_layers
from lowdim.surgery import weight_matrix
from lowdim.testing.compress_case import CompressCase, small_net


def leading(parts, dim):
    """The leading eigenvectors of `Σ w wᵀ`, each with a positive entry of largest magnitude."""
    vectors_ = torch.linalg.eigh(parts.T @ parts).eigenvectors.flip(1)[:, :dim]
    top = vectors_.abs().argmax(0)
    return vectors_ * vectors_[top, torch.arange(dim)].sign()


class TestLR2VQ(CompressCase):
    options = {"subvector_size": 4, "clustering_dim": 2, "codebook_size": 16}  # noqa: RUF012 (typed in the base class)
    lossless = {"subvector_size": 4, "clustering_dim": 4, "codebook_size": 1000}  # noqa: RUF012
    compressed = (LR2VQLinear,)
    needs_data = False

    def compress(self, model, batches, **options):
        return lr2vq(model, LR2VQConfig(**options), batches)

    def expected(self, layer, inputs, compressed):
        out, inn = layer.weight.shape
        W = torch.zeros(out, inn, dtype=layer.weight.dtype)
        P, C = leading(layer.weight.reshape(-1, 4), 2), compressed.codebook  # k-means draws its start
        for o in range(out):
            for i in range(inn // 4):
                z = P.T @ layer.weight[o, 4 * i : 4 * i + 4]
                W[o, 4 * i : 4 * i + 4] = P @ C[(C - z).norm(dim=1).argmin()]
        return inputs @ W.T + layer.bias


class TestPlainVQ(TestLR2VQ):
    options = {"subvector_size": 2, "clustering_dim": 2, "codebook_size": 9}  # noqa: RUF012

    def expected(self, layer, inputs, compressed):
        parts = layer.weight.reshape(-1, 2)
        centres = compressed.codebook @ leading(parts, 2).T  # in the weight's own coordinates
        W = centres[torch.cdist(parts, centres).argmin(1)].view(layer.weight.shape)
        return inputs @ W.T + layer.bias


@pytest.mark.parametrize("case", ["layer", "layer_full_rank"])
def test_reference_layer(case):
    v = vectors.load("lr2vq", case)
    m, d = v.hyperparameters["subvector_size"], v.hyperparameters["clustering_dim"]
    z, basis = lowrank_subvectors(v["weight"], m, d)
    v.close(basis @ basis.T, "subspace_projector")
    v.close((z @ basis.T).view(v["weight"].shape), "low_rank_weight")
    rows = estimate_clustering_dim(v["weight"], codebook_size=3, subvector_size=m, dims=[d])
    error = torch.tensor(rows[0]["approximation_error"], dtype=torch.float64)
    v.close(error, "approximation_error", scale=None if d < m else 1.0)  # nothing is lost where d = m

    layer = LR2VQLinear(v["basis"], v["codebook"], v["codes"], tuple(v["weight"].shape), v["bias"])
    assert layer.codebook_size == v.hyperparameters["codebook_size"]
    v.close(layer.dense_weight(), "dense_weight")
    y = layer(v["x"])
    v.close(y, "y")
    y.square().sum().backward()
    v.close(layer.codebook.grad, "grad_codebook")
    v.close(layer.basis.grad, "grad_basis")
    assert layer.compressed_bytes() == int(v["compressed_bytes"])


@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1},
        {"stride": 2, "dilation": 2, "padding": "valid"},
        {"groups": 2, "bias": False},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect"},
    ],
)
def test_convolutions(how):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, dtype=torch.float64, **how)
    model, x = nn.Sequential(copy.deepcopy(conv)), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    lr2vq(model, LR2VQConfig(subvector_size=3, clustering_dim=2, codebook_size=7))
    layer = model[0]
    assert type(layer) is LR2VQConv2d
    kernel = weight_matrix(conv)  # (out, in / groups · kh · kw)
    parts = kernel.reshape(-1, 3)
    P = leading(parts, 2)
    W = (layer.codebook[torch.cdist(parts @ P, layer.codebook).argmin(1)] @ P.T).view(conv.weight.shape)
    want = copy.deepcopy(conv)
    want.weight.data = W.detach()
    torch.testing.assert_close(layer(x), want(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.dense_weight(), W)
    again = load_compressed(nn.Sequential(copy.deepcopy(conv)), model.state_dict(), describe_layers(model))
    assert torch.equal(again(x), model(x))
    again = load_compressed(nn.Sequential(copy.deepcopy(conv)), model.state_dict())  # recognised by its tensors
    assert type(again[0]) is LR2VQConv2d
    plain = densify(model)
    assert type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), want(x), rtol=1e-10, atol=1e-10)


def test_report():
    model = small_net(dtype=torch.float64)
    dense = copy.deepcopy(model)
    lr2vq(model, LR2VQConfig(subvector_size=4, clustering_dim=2, codebook_size=16))
    report = last_report(model)
    assert report.system == "LR2VQ"
    for row in report.layers:
        old, new = dense.get_submodule(row.name), model.get_submodule(row.name)
        assert (row.what, row.rank, row.replaced) == ("k 16, m 4, d̃ 2", None, True)
        lost = float(((old.weight - new.dense_weight()).norm() / old.weight.norm()).detach())
        assert row.relative_error == pytest.approx(lost, rel=1e-9)
        found = report.details["errors"][row.name]
        assert found["approximation_error"] + found["clustering_error"] == pytest.approx(lost**2, rel=1e-9)
    codes = 48 * 12 // 4 * 4 // 8
    for row in report.layers:
        assert row.before == 8 * (48 * 12 + row.out_features)
        assert row.after == codes + 8 * 2 * (16 + 4) + 8 * row.out_features
    assert report.details["ratio"] == report.before / report.after
    assert f"{report.before:,} -> {report.after:,} bytes in them" in report.summary


def test_layers_that_share_a_weight_have_the_same_codes():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    lr2vq(model, LR2VQConfig(codebook_size=8))
    assert model[2].basis is model[0].basis
    assert model[2].codebook is model[0].codebook
    assert torch.equal(model[2].codes, model[0].codes)
    one, two = last_report(model).layers
    assert two.after == one.after - 4 * 4 * (8 + 8)  # the tables are counted once
    assert not torch.equal(model[2].bias, model[0].bias)


def test_the_seed_decides():
    def codes(seed):
        model = lr2vq(small_net(), LR2VQConfig(codebook_size=16, subvector_size=4, clustering_dim=2, seed=seed))
        return model.up.codes

    assert torch.equal(codes(0), codes(0))
    assert not torch.equal(codes(0), codes(1))
