"""LR2VQ's codes: their size, in how many bits they are stored, and when the decoded weight is kept."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.compress import LR2VQLinear, load_compressed, vq_bytes
from lowdim.linalg import stream


@pytest.mark.parametrize(("k", "bits"), [(1, 0), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8), (257, 9), (40000, 16)])
def test_bytes_count_whole_bits_a_code(k, bits):
    assert vq_bytes(96 * 40, k, 8, 3) == math.ceil(96 * 40 / 8 * bits / 8) + 4 * (k * 3 + 8 * 3)
    assert vq_bytes(96 * 40, k, 8, 3, element_size=2) == math.ceil(96 * 40 / 8 * bits / 8) + 2 * (k * 3 + 8 * 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 16, 17, 129, 256, 257, 300, 40000])
def test_codes_are_stored_in_that_many_bits_and_come_back(k):
    codes = torch.randint(k, (6, 5), generator=stream(0, "codes"))
    codes[0, 0] = k - 1
    layer = LR2VQLinear(torch.randn(4, 2), torch.randn(k, 2), codes, (6, 20), torch.randn(6))
    state = layer.state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == layer.compressed_bytes() + 4 * 6
    assert torch.equal(layer.codes.long(), codes)
    model = load_compressed(nn.Sequential(nn.Linear(20, 6)), {f"0.{n}": t for n, t in state.items()})
    assert torch.equal(model[0].codes, layer.codes)
    assert model[0].codes.dtype == layer.codes.dtype
    other = LR2VQLinear(torch.zeros(4, 2), torch.zeros(k, 2), torch.zeros_like(codes), (6, 20), torch.zeros(6))
    other.load_state_dict(state)  # into a layer that has its codes
    assert torch.equal(other.codes, layer.codes)
    assert torch.equal(other.dense_weight(), layer.dense_weight())
    assert state["codes"].numel() != 30 or k in (129, 256)  # the given state is not changed


@pytest.mark.parametrize("bias", [True, False])
def test_a_description_of_three_sizes_takes_the_bias_of_its_place(bias):
    sizes = {"codebook_size": 5, "subvector_size": 4, "clustering_dim": 2}
    tables = torch.randn(4, 2), torch.randn(5, 2), torch.randint(5, (6, 5))
    layer = LR2VQLinear(*tables, (6, 20), torch.randn(6) if bias else None)
    assert layer.description() == {**sizes, "bias": bias}
    state = {f"0.{name}": t for name, t in layer.state_dict().items()}
    model = load_compressed(nn.Sequential(nn.Linear(20, 6, bias=bias)), state, {"0": {"class": "LR2VQLinear", **sizes}})
    x = torch.randn(3, 20)
    assert torch.equal(model(x), layer(x))
    assert (model[0].bias is not None) == bias


def test_codes_stay_integers():
    layer = LR2VQLinear(torch.randn(4, 2), torch.randn(5, 2), torch.randint(5, (6, 5)), (6, 20))
    before = layer.codes.clone()
    for changed in (layer.half(), layer.to(torch.bfloat16), layer.double()):
        assert changed.codes.dtype == torch.uint8
        assert torch.equal(changed.codes, before)
    assert {name for name, _ in layer.named_parameters()} == {"basis", "codebook"}


def test_cost_reads_codes_and_computes_the_dense_product():
    layer = LR2VQLinear(torch.randn(8, 4), torch.randn(16, 4), torch.randint(16, (64, 4)), (64, 32), torch.randn(64))
    cost = layer.cost(10)
    assert cost.flops_forward == 2 * 10 * 64 * 32
    assert cost.bytes_forward == 4 * (10 * 32 + 10 * 64) + (64 * 4 * 4 // 8 + 4 * (16 * 4 + 8 * 4))
    assert cost.parameters == 8 * 4 + 16 * 4 + 64


def quantized(seed=0):
    torch.manual_seed(seed)
    return LR2VQLinear.from_linear(nn.Linear(16, 12), codebook_size=8, subvector_size=4, clustering_dim=2).eval()


def test_decoding_is_cached_where_nothing_is_trained(monkeypatch):
    layer, x, calls = quantized(), torch.randn(3, 16), []
    monkeypatch.setattr(LR2VQLinear, "matrix", lambda self, m=LR2VQLinear.matrix: calls.append(1) or m(self))
    want = layer(x)
    layer(x)
    assert len(calls) == 2  # gradients may be wanted
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), want)
        assert len(calls) == 3
        copy.deepcopy(layer)(x)
        assert len(calls) == 4  # a copy does not carry it along
        layer.train()(x)
        layer(x)
        assert len(calls) == 6
        monkeypatch.setattr(LR2VQLinear, "cached", False)
        layer.eval()(x)
        layer(x)
        assert len(calls) == 8
    assert set(layer.state_dict()) == {"basis", "codebook", "codes", "bias"}


def _set_codebook(layer):
    layer.codebook.data.mul_(2.0)  # has no version


def _load(layer):
    layer.load_state_dict(quantized(1).state_dict())


CHANGES = {
    "in place": lambda layer: layer.basis.add_(1.0),
    "through data": _set_codebook,
    "codes": lambda layer: layer.codes.zero_(),
    "loaded": _load,
    "double": lambda layer: layer.double().float() and layer.basis.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_a_change_is_noticed(change):
    layer, x = quantized(), torch.randn(3, 16)
    before = layer(x)
    change(layer)
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(layer(x), F.linear(x, layer.dense_weight(), layer.bias), rtol=0, atol=0)


def test_it_runs_under_inference_mode_and_compile():
    layer, x = quantized(), torch.randn(3, 16)
    want = layer(x).detach()
    with torch.inference_mode():
        assert torch.equal(layer(x), want)
        assert torch.equal(layer(x), want)
    assert torch.equal(layer(x).detach(), want)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want)
