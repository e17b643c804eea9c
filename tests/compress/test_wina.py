import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.compress import (
    WINAConfig,
    WINALinear,
    greedy_sparsity,
    last_report,
    wina,
    wina_mask,
    wina_report,
    wina_threshold,
)
from lowdim.linalg import stream
from lowdim.testing.compress_case import CompressCase, small_net


def masked(layer, inputs, chosen):
    """`W (x ⊙ mask) + bias` with the masks of the tokens as rows of 0 and 1."""
    return (inputs * chosen) @ layer.weight.T + layer.bias


def scores(layer, inputs):
    norms = torch.stack([layer.weight[:, j].square().sum().sqrt() for j in range(layer.in_features)])
    return inputs.abs() * norms


class TestWINA(CompressCase):
    options = {"sparsity": 0.3}  # noqa: RUF012 (typed in the base class)
    lossless = {"sparsity": 0.0}  # noqa: RUF012
    needs_data = False
    shrinks = False
    compressed = (WINALinear,)

    def compress(self, model, batches, **options):
        return wina(model, WINAConfig(**options))

    def expected(self, layer, inputs, compressed):
        count = int(layer.in_features * (1 - 0.3))
        rank = scores(layer, inputs).argsort(-1, descending=True).argsort(-1)
        return masked(layer, inputs, (rank < count).to(inputs.dtype))


class TestThresholds(CompressCase):
    options = {"sparsity": 0.4, "mask_by": "threshold", "criterion": "teal"}  # noqa: RUF012
    shrinks = False
    compressed = (WINALinear,)

    def compress(self, model, batches, **options):
        return wina(model, WINAConfig(**options), batches)

    def expected(self, layer, inputs, compressed):
        # Scores are distinct numbers here, so value i (from 0) has i + 1 at or below it, and the threshold is the point where
        # this count, drawn as a line between the values, is 0.4 of them all.
        size = inputs.abs().reshape(-1)[: 2**18].sort().values
        wanted = 0.4 * len(size)
        at = math.ceil(wanted) - 1
        bound = size[at - 1] + (wanted - at) * (size[at] - size[at - 1])
        return masked(layer, inputs, (inputs.abs() > bound).to(inputs.dtype))

    # A batch is no single layer's data: the model's second layer sees fewer than the cap of 2^18 scores, and all are kept.


# Vectors


@pytest.mark.parametrize("case", ["linear", "linear_long"])
def test_official_masks_and_outputs(case):
    v = vectors.load("wina", case)
    sparsity = v.hyperparameters["sparsity"]
    linear = nn.Linear(v["weight"].shape[1], v["weight"].shape[0], dtype=torch.float64)
    linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
    for criterion in ("wina", "teal"):
        layer = WINALinear.from_linear(linear, sparsity, criterion=criterion).eval()
        assert torch.equal(layer.mask(v["x"]), v[f"mask_{criterion}"].bool())
        v.close(layer(v["x"]), f"y_{criterion}")
        with torch.no_grad():
            v.close(layer(v["x"][:, :1]), f"y_token_{criterion}")
            alone = torch.stack([layer(token) for token in v["x"][:, :1]])  # reads the chosen rows only
            v.close(alone, f"y_token_{criterion}")
    v.close(WINALinear.from_linear(linear, sparsity).column_norms, "column_norms")


class Swiglu(nn.Module):
    def __init__(self, v):
        super().__init__()
        for name in ("gate", "up", "down"):
            weight = v[name]
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
            layer.weight.data.copy_(weight)
            setattr(self, f"{name}_proj", layer)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def test_official_mlp():
    v = vectors.load("wina", "swiglu_mlp")
    share = v.hyperparameters["sparsity"]
    v.close(Swiglu(v)(v["x"]), "y_dense")
    v.close(wina(Swiglu(v), WINAConfig(sparsity=share))(v["x"]), "y_all_norms")
    v.close(wina(Swiglu(v), WINAConfig(sparsity=share, criterion="teal"))(v["x"]), "y_teal")
    mixed = wina(Swiglu(v), WINAConfig(sparsity=share, target_modules=["gate_proj"]))
    wina(mixed, WINAConfig(sparsity=share, criterion="teal", target_modules=["up_proj", "down_proj"]))
    v.close(mixed(v["x"]), "y_released_norms")


def test_official_thresholds():
    v = vectors.load("wina", "thresholds")
    for sparsity, want in zip(v["sparsities"].tolist(), v["thresholds"].tolist(), strict=True):
        assert abs(wina_threshold(v["scores"], sparsity) - want) <= 1e-10


def test_greedy_allocation():
    v = vectors.load("wina", "greedy")
    a, p, sizes = (v[name].tolist() for name in ("a", "p", "sizes"))
    names = [f"p{i}" for i in range(len(a))]

    def error(state):
        return sum(a[i] * state[name] ** p[i] for i, name in enumerate(names))

    options = {key: v.hyperparameters[key] for key in ("target", "base_step") if key in v.hyperparameters}
    found = greedy_sparsity(error, {name: int(size) for name, size in zip(names, sizes)}, **options)
    torch.testing.assert_close(torch.tensor(list(found.values()), dtype=torch.float64), v["sparsities"], rtol=1e-9, atol=1e-9)


# The layer


def linear(in_features=32, out_features=12, dtype=torch.float32, seed=0):
    draw = stream(seed, "wina")
    layer = nn.Linear(in_features, out_features, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("rule", ["topk", "threshold"])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
def test_one_token_reads_the_chosen_rows_and_gives_the_masked_product(rule, shape):
    layer = WINALinear.from_linear(linear(), 0.5, mask_by=rule, threshold=3.0).eval()
    x = torch.randn(shape, generator=stream(1, "x"))
    with torch.no_grad():
        got = layer(x)
    assert layer.copied_bytes() == 32 * 12 * 4
    torch.testing.assert_close(got, F.linear(x * layer.mask(x), layer.weight, layer.bias).detach(), rtol=1e-5, atol=1e-5)
    layer.train()
    assert layer.copied_bytes() == 0


@pytest.mark.parametrize(("dtype", "bag"), [(torch.float32, 3), (torch.float32, 4), (torch.float64, 16)])
def test_rows_are_summed_in_bags(dtype, bag, monkeypatch):
    monkeypatch.setattr(sys.modules["lowdim.compress.wina.rows"], "_BAG", bag)
    torch.manual_seed(0)
    layer = WINALinear.from_linear(nn.Linear(16, 9, dtype=dtype), 0.5).eval()
    x = torch.randn(1, 16, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x * layer.mask(x), layer.weight, layer.bias))
    assert layer.copied_bytes() == 16 * 9 * dtype.itemsize


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (77, 9), (700, 1024)])  # the last fills more than one page of 2 MiB
@pytest.mark.parametrize("count", [0, 1, 5])
def test_any_number_of_rows(inputs, outputs, count):
    rows = sys.modules["lowdim.compress.wina.rows"]
    draw = stream(0, "rows")
    matrix, token = torch.randn(outputs, inputs, generator=draw), torch.randn(inputs, generator=draw)
    copied = rows.transposed(matrix)
    assert torch.equal(copied, matrix.T)
    assert copied.is_contiguous()
    chosen = rows.largest(token.abs().numpy(), inputs // 5 * count)
    want = matrix[:, chosen] @ token[chosen]
    torch.testing.assert_close(rows.sum_of_rows(copied, token.numpy(), chosen), want[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_of_equal_and_undefined_scores(dtype):
    largest = sys.modules["lowdim.compress.wina.rows"].largest
    assert largest(np.array([0.5, 3, 1, 2], dtype), 2).tolist() == [1, 3]
    assert largest(np.array([0.5, 3, 1, 2], dtype), 0).tolist() == []
    assert len(largest(np.zeros(6, dtype), 3)) == 3
    equal = largest(np.array([1, 2, 0, 1, 1], dtype), 2)
    assert 1 in equal
    assert len(equal) == 2
    assert 2 not in equal
    assert sorted(largest(np.array([1, math.nan, 2, 0], dtype), 2)) == [1, 2]


def test_a_token_with_a_gradient_under_no_grad():
    layer, x = WINALinear.from_linear(linear(), 0.5).eval(), torch.ones(1, 32, requires_grad=True)
    with torch.no_grad():
        got = layer(x)
    assert layer.copied_bytes() > 0
    torch.testing.assert_close(got, F.linear(x * layer.mask(x), layer.weight, layer.bias).detach(), rtol=1e-5, atol=1e-5)


def test_rows_follow_the_weight():
    layer, x = WINALinear.from_linear(linear(), 0.5).eval(), torch.randn(1, 32)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.refresh()
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))


def test_no_input_above_the_threshold_leaves_the_bias():
    layer = WINALinear.from_linear(linear(), 0.5, mask_by="threshold", threshold=1e9).eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.ones(1, 32)), layer.bias[None])


def test_gradients_flow_through_kept_inputs_only():
    layer = WINALinear.from_linear(linear(dtype=torch.float64), 0.75)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    mask = layer.mask(x)
    torch.testing.assert_close(x.grad, layer.weight.sum(0) * mask)
    torch.testing.assert_close(layer.weight.grad, (x * mask).sum(0).expand(12, -1).detach())


@pytest.mark.parametrize(
    ("prefix", "length", "dense"), [(0.01, 200, 2), (0.01, 10, 1), (0.5, 10, 5), (0.0, 10, 0), (0.3, 1, 0)]
)
def test_the_first_tokens_of_a_sequence_stay_dense(prefix, length, dense):
    layer = WINALinear.from_linear(linear(), 0.5, dense_prefix=prefix)
    counts = layer.mask(torch.randn(2, length, 32)).sum(-1)
    assert counts.tolist() == [[32] * dense + [16] * (length - dense)] * 2
    assert layer.mask(torch.randn(length, 32)).sum(-1).tolist() == [16] * length  # rows without a sequence axis


def test_norms_stay_in_float32():
    layer = WINALinear.from_linear(linear(), 0.5).to(torch.bfloat16)
    assert layer.column_norms.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    assert WINALinear.from_linear(linear(dtype=torch.bfloat16), 0.5).column_norms.dtype == torch.float32


def test_a_changed_weight_is_reported_once():
    layer = WINALinear.from_linear(linear(), 0.5)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"column norms were taken; call refresh\(\)"):
        layer(torch.ones(2, 32))
    layer(torch.ones(2, 32))  # a second warning would be an error
    layer.refresh()
    torch.testing.assert_close(layer.column_norms, layer.weight.detach().square().sum(0).sqrt())


@pytest.mark.filterwarnings("error")
def test_a_copy_and_a_loaded_layer_have_fresh_norms():
    layer, other = WINALinear.from_linear(linear(), 0.5), WINALinear.from_linear(linear(seed=1), 0.5)
    want = layer(torch.ones(2, 32))
    assert torch.equal(copy.deepcopy(layer)(torch.ones(2, 32)), want)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(torch.ones(2, 32)), want)
    with torch.no_grad():
        other.weight.mul_(2)
    other.to(torch.float64)
    with pytest.raises(UserWarning, match="refresh"):
        other(torch.ones(2, 32, dtype=torch.float64))


def test_the_count_is_truncated():
    assert int(wina_mask(torch.randn(10), None, 0.31).sum()) == 6  # int(6.9)
    assert int(wina_mask(torch.randn(3, 12), None, 0.95).sum()) == 0


# The model


def test_sparsity_by_name():
    model = wina(small_net(), WINAConfig(sparsity={"down": 0.75}))
    assert (model.up.sparsity, model.down.sparsity) == (0.0, 0.75)
    with pytest.raises(ValueError, match="'dwn' matches no module; nearest names: down"):
        wina(small_net(), WINAConfig(sparsity={"dwn": 0.75}))


def test_report_counts_what_a_token_reads():
    model = wina(small_net(), WINAConfig(sparsity=0.3))
    read = int(12 * 0.7) * 48 + int(48 * 0.7) * 12
    assert wina_report(model) == {
        "dense_weight_bytes": 4 * 2 * 12 * 48,
        "read_weight_bytes": 4 * read,
        "dense_flops_per_token": 2 * 2 * 12 * 48,
        "flops_per_token": 2 * read,
        "copied_weight_bytes": 0,
    }
    assert last_report(model).details == wina_report(model)
    assert "30% of its inputs left out" in str(last_report(model))


def test_thresholds_of_many_tokens_come_from_every_kth():
    draw = stream(0, "many")
    model = nn.Sequential(nn.Linear(64, 8))
    batches = [torch.randn(1024, 64, generator=draw) for _ in range(6)]  # 6,144 tokens; 4,096 are the most that are kept
    wina(model, WINAConfig(sparsity=0.5, mask_by="threshold", criterion="teal"), batches)
    kept = torch.cat(batches)[::2].abs().flatten().sort().values
    assert model[0].threshold == pytest.approx(float(kept[len(kept) // 2 - 1]), rel=1e-5)


def test_padding_and_heads_are_left_alone():
    model = wina(small_net(), WINAConfig())
    assert type(model.classifier) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": {"up": -0.1}}, r"sparsity\['up'\]"),
        ({"sparsity": {}}, "at least one module"),
        ({"criterion": "norm"}, "criterion"),
        ({"mask_by": "top"}, "mask_by"),
        ({"dense_prefix": 2.0}, "dense_prefix"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        WINAConfig(**options)


def test_wrong_input():
    with pytest.raises(ValueError, match="one entry for each of the 8 inputs"):
        wina_mask(torch.ones(8), torch.ones(7), 0.5)
    with pytest.raises(ValueError, match="needs a threshold"):
        WINALinear.from_linear(linear(), 0.5, mask_by="threshold")
    with pytest.raises(ValueError, match="not finite"):
        wina_threshold(torch.tensor([1.0, math.nan]), 0.5)
    with pytest.raises(ValueError, match="cannot be reached"):
        greedy_sparsity(lambda state: 0.0, {"a": 10}, target=0.95, base_step=0.3)
    with pytest.raises(ValueError, match="has no WINALinear"):
        wina_report(small_net())


def test_dense_again():
    net = small_net()
    want = copy.deepcopy(net)
    wina(net, WINAConfig(sparsity=0.6))
    assert torch.equal(net.up.to_linear().weight, want.up.weight)
    assert torch.equal(net.up.dense_weight(), want.up.weight)
