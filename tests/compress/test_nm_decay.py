"""N:M decay: masks, schedules, gradients, the weight at the end, and a model that trains with them."""

import copy
import json
import math
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.compress import (
    NMConv2d,
    NMDecayConfig,
    NMLinear,
    SparseTraining,
    finalize,
    load_compressed,
    nm_decay,
    step,
)
from lowdim.modules import describe_layers
from lowdim.testing.scheduled_compress_case import ScheduledCompressCase


def kept(weight, n, m):
    """1 at the n largest magnitudes of every m entries of a row, by counting those that are larger."""
    size = weight.abs().unflatten(-1, (-1, m))
    larger = (size[..., None, :] > size[..., :, None]).sum(-1)
    return (larger < n).to(weight.dtype).flatten(-2)


def used(weight, n, m, a):
    mask = kept(weight, n, m)
    return weight * (mask + (1 - mask) * a)


class Decaying(ScheduledCompressCase):
    compressed = (NMLinear,)
    lossless: ClassVar = {"total_steps": 4, "dense_fraction": 0.5}
    transposed: ClassVar = {"dim": 0}  # the inputs, which Conv1D stores first

    def compress(self, model, batches, **options):
        return nm_decay(model, NMDecayConfig(**options), batches)

    def final(self, layer):
        return used(layer.matrix, self.options.get("n", 2), self.options.get("m", 4), 0)


class TestExponential(Decaying):
    """Without a coefficient 0.001 is left when the last step, which fine-tunes, begins."""

    options: ClassVar = {"n": 1, "m": 4, "total_steps": 8, "fine_tune_fraction": 0.1}
    sparsity = 0.75

    def effective(self, layer, step):
        return used(layer.matrix, 1, 4, 0 if step >= 7 else 1000 ** (-step / 7))


class TestLinearAfterDenseSteps(Decaying):
    """Eight steps: two dense, four of decay, two without."""

    options: ClassVar = {"total_steps": 8, "decay": "linear", "dense_fraction": 0.25, "fine_tune_fraction": 0.25}
    sparsity = 0.5

    def effective(self, layer, step):
        if step < 2:
            return layer.matrix
        return used(layer.matrix, 2, 4, max(0, 1 - (step - 2) / 4))


class TestStepwise(Decaying):
    """3:4, 2:4 from step int(8 / 3), 1:4 from int(16 / 3), without values between."""

    options: ClassVar = {"n": 1, "m": 4, "total_steps": 8, "structure": "stepwise", "decay": "step", "fine_tune_fraction": 0}
    lossless: ClassVar = {"n": 4, "m": 4, "total_steps": 4}
    sparsity = 0.75

    def effective(self, layer, step):
        return used(layer.matrix, [3, 3, 2, 2, 2, 1, 1, 1, 1][step], 4, 0)


class TestSRSTE(Decaying):
    """The mask is full from the first masked step."""

    options: ClassVar = {"total_steps": 8, "method": "srste", "dense_fraction": 0.25, "fine_tune_fraction": 0}
    sparsity = 0.5

    def effective(self, layer, step):
        return layer.matrix if step < 2 else used(layer.matrix, 2, 4, 0)


# Vectors


@pytest.mark.parametrize("case", ["mask_exp", "mask_linear", "srste"])
def test_reference_trajectory(case):
    v = vectors.load("nm-decay", case)
    how = dict(v.hyperparameters)
    rate = how.pop("lr")
    linear = nn.Linear(8, len(v["bias"]), dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(v["weight"])
        linear.bias.copy_(v["bias"])
    layer = NMLinear.from_linear(linear, NMDecayConfig(**how))
    effective, grads = [], []
    for x, target in zip(v["x"], v["target"]):
        effective.append(layer.dense_weight().detach().clone())
        layer.weight.grad = None
        F.mse_loss(layer(x), target).backward()
        grads.append(layer.weight.grad.clone())
        with torch.no_grad():
            layer.weight -= rate * layer.weight.grad
        layer.step()
    v.close(torch.stack(effective), "effective")
    v.close(torch.stack(grads), "grads")
    v.close(layer.weight, "weight_after")


def test_reference_frames():
    v = vectors.load("nm-decay", "structure")
    for k, case in enumerate(v.hyperparameters["cases"]):
        frames = NMDecayConfig(**case).frames()
        assert list(frames) == v[f"starts_{k}"].tolist()
        assert [list(pattern) for pattern in frames.values()] == v[f"pattern_{k}"].tolist()


# The schedule


def test_stepwise_ends_at_the_pattern_whatever_the_quotient():
    def patterns(n, m):
        return list(NMDecayConfig(n, m, total_steps=100, structure="stepwise").frames().values())

    assert patterns(3, 8) == [(7, 8), (3, 8)]
    assert patterns(3, 4) == [(3, 4)]
    assert patterns(3, 16) == [(15, 16), (8, 16), (3, 16)]
    assert patterns(1, 16) == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]


def test_an_explicit_structure_is_dense_before_its_first_step():
    config = NMDecayConfig(total_steps=20, structure={"10": [1, 4], 4: (2, 4)}, decay_coef=0.1)
    assert config.frames() == {4: (2, 4), 10: (1, 4)}
    assert [config.pattern(t) for t in (3, 4, 9, 10, 30)] == [None, (2, 4), (2, 4), (1, 4), (1, 4)]
    assert config.mask_value(3) == 1.0
    assert config.mask_value(5) == pytest.approx(math.exp(-0.5))
    assert NMDecayConfig(**json.loads(json.dumps(config.description()))) == config
    layer = NMLinear(nn.Linear(8, 2), config)
    torch.testing.assert_close(layer.to_plain().weight, used(layer.weight, 1, 4, 0))


def test_a_coefficient_is_by_step():
    config = NMDecayConfig(total_steps=100, decay="linear", decay_coef=0.3, dense_fraction=0.1)
    assert [config.mask_value(t) for t in (9, 10, 12, 14)] == pytest.approx([1, 1, 0.4, 0])


def test_short_and_full_schedules():
    whole = NMDecayConfig(total_steps=3, dense_fraction=0.5, fine_tune_fraction=0.5, structure="densify")
    assert [whole.mask_value(t) for t in range(4)] == [1, 1, 0, 0]
    assert [whole.pattern(t) for t in range(4)] == [None, None, (2, 4), (2, 4)]
    assert NMDecayConfig(total_steps=1, fine_tune_fraction=0).mask_value(1) == 0


# Gradients


@pytest.mark.parametrize(
    ("how", "formula"),
    [
        ({}, lambda g, mask, w, a: g),
        ({"gradient": "masked"}, lambda g, mask, w, a: g * (mask + (1 - mask) * a)),
        ({"method": "srste", "srste_lambda": 0.3}, lambda g, mask, w, a: g + 0.3 * (1 - mask) * w),
        (
            {"method": "srste", "srste_lambda": 0.3, "gradient": "masked"},
            lambda g, mask, w, a: g * mask + 0.3 * (1 - mask) * w,
        ),
    ],
)
@pytest.mark.parametrize("dim", [-1, 0])
def test_gradient_of_the_dense_weight(how, formula, dim):
    torch.manual_seed(0)
    layer = NMLinear(nn.Linear(8, 12, dtype=torch.float64), NMDecayConfig(total_steps=10, decay_coef=0.5, dim=dim, **how))
    layer.step()
    x = torch.randn(5, 8, dtype=torch.float64)
    layer(x).square().sum().backward()
    w = layer.weight.detach()
    mask = kept(w, 2, 4) if dim else kept(w.T, 2, 4).T
    a = 0 if "method" in how else math.exp(-0.5)
    effective = w * (mask + (1 - mask) * a)
    g = 2 * (x @ effective.T + layer.bias.detach()).T @ x
    torch.testing.assert_close(layer.weight.grad, formula(g, mask, w, a))
    torch.testing.assert_close(layer.bias.grad, 2 * (x @ effective.T + layer.bias.detach()).sum(0))


def test_no_shrinkage_while_dense():
    layer = NMLinear(nn.Linear(4, 2), NMDecayConfig(total_steps=4, method="srste", srste_lambda=9.0, dense_fraction=0.5))
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 4))


# Layers


def test_a_convolution_is_grouped_by_channels():
    torch.manual_seed(0)
    for dim in (-1, 0):
        conv = nn.Conv2d(8, 4, 3, stride=2, padding=1, padding_mode="reflect", dtype=torch.float64)
        layer = NMConv2d.from_conv(conv, NMDecayConfig(1, 4, total_steps=5, decay_coef=0.7, dim=dim))
        assert layer.weight is conv.weight
        layer.step()
        w = conv.weight.detach()
        mask = kept(w.movedim(1, -1), 1, 4).movedim(-1, 1) if dim else kept(w.movedim(0, -1), 1, 4).movedim(-1, 0)
        assert torch.equal(layer.mask(), mask)
        x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
        plain = copy.deepcopy(conv)
        with torch.no_grad():
            plain.weight.copy_(w * (mask + (1 - mask) * math.exp(-0.7)))
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(layer.to_conv()(x), plain(x))
        final = layer.to_plain()
        assert type(final) is nn.Conv2d
        torch.testing.assert_close(final.weight.detach(), w * mask)
        assert int((final.weight != 0).sum()) == w.numel() // 4


def test_convolutions_are_taken_where_they_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    fresh = copy.deepcopy(model)
    assert type(nm_decay(copy.deepcopy(model), NMDecayConfig(total_steps=4))[0]) is nn.Conv2d
    nm_decay(model, NMDecayConfig(total_steps=4, target_modules=["0", "3"]))
    assert [type(layer) for layer in model] == [NMConv2d, nn.ReLU, nn.Flatten, NMLinear]
    x = torch.randn(5, 4, 3, 3)
    step(model)
    again = load_compressed(fresh, model.state_dict(), json.loads(json.dumps(describe_layers(model))))
    assert torch.equal(again(x), model(x))
    assert [type(layer) for layer in finalize(model)] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]


@pytest.mark.parametrize("dim", [-1, 0])
def test_groups_of_a_transposed_layer_run_along_its_stored_axis(dim):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain = conv1d(12, 8)  # stores (8 inputs, 12 outputs)
    layer = NMLinear(plain, NMDecayConfig(total_steps=5, decay="step", dim=dim))
    assert layer.weight is plain.weight
    stored = plain.weight.detach()
    mask = kept(stored.T, 2, 4).T if dim == 0 else kept(stored, 2, 4)
    assert torch.equal(layer.mask(), mask.T)  # (out, in), as of every layer
    x = torch.randn(3, 8)
    y = layer(x)
    torch.testing.assert_close(y, x @ (stored * mask) + plain.bias)
    y.sum().backward()
    torch.testing.assert_close(plain.weight.grad, x.sum(0)[:, None].expand(8, 12))
    final = layer.to_plain()
    assert type(final) is conv1d
    torch.testing.assert_close(final.weight.detach(), stored * mask)


def test_a_transposed_layer_names_the_side_that_does_not_divide():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    plain = conv1d(6, 8)
    with pytest.raises(ValueError, match=r"m=4 must divide the outputs of a weight \(8, 6\); got 6"):
        NMLinear(plain, NMDecayConfig(total_steps=5))
    layer = NMLinear(plain, NMDecayConfig(total_steps=5, dim=0))
    assert torch.equal(layer.mask(), kept(plain.weight.detach().T, 2, 4))


def test_an_optimizer_that_was_built_before_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    nm_decay(model, NMDecayConfig(total_steps=2))
    companion = SparseTraining(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        companion.step(optimizer)
    companion.finish()
    assert bool((model[0].weight[model[0].weight != 0] != before[model[0].weight != 0]).all())
    assert {int(count) for count in (model[0].weight.view(-1, 4) != 0).sum(1)} == {2}


def test_a_run_leaves_plain_layers_whose_groups_hold(tmp_path):
    """The length of the schedule is that of the training; the head stays dense."""
    from lowdim import models
    from lowdim.surgery import find_layers, is_linear
    from lowdim.train.recipes import Recipe
    from lowdim.train.run import run_recipe

    (tmp_path / "text.txt").write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:4000])
    how = {"steps": 6, "batch_size": 4, "max_length": 16, "limit": 48, "method": "nm-decay", "lr": 1e-3}
    how["options"] = {"n": 1, "m": 4, "decay": "linear"}
    run_recipe(
        Recipe(model="stories260k", task="causal-lm", data=[str(tmp_path / "text.txt")], out=str(tmp_path / "out"), **how)
    )
    after = models.load_model(str(tmp_path / "out" / "model"), "causal-lm")
    layers = find_layers(after, accept=is_linear)
    assert layers
    for name, layer in layers.items():
        assert type(layer) is nn.Linear
        assert bool(((layer.weight.unflatten(-1, (-1, 4)) != 0).sum(-1) == 1).all()), name
    assert bool((after.lm_head.weight != 0).all())


def test_a_frozen_weight_stays_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    finalize(nm_decay(model, NMDecayConfig(total_steps=2)))
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_cost():
    layer = NMLinear(nn.Linear(64, 32), NMDecayConfig(1, 16, total_steps=3))
    assert layer.cost(10).flops_forward == 2 * 10 * 64 * 32
    cost = layer.inference_cost(10, itemsize=2)
    numbers = 64 * 32 // 16
    assert cost.parameters == numbers + 32
    assert cost.flops_forward == 2 * 10 * numbers
    assert cost.bytes_forward == 2 * (10 * 64 + 10 * 32 + numbers) + numbers * 4 // 8
    assert (cost.flops_backward, cost.bytes_backward) == (0, 0)
    conv = NMConv2d(nn.Conv2d(8, 4, 3), NMDecayConfig(total_steps=3))
    assert conv.cost(5).flops_forward == 2 * 5 * 72 * 4
    assert conv.inference_cost(5).flops_forward == 5 * 72 * 4


def test_the_tensors_of_semi_structured_kernels_are_accepted():
    """Their layout, on any machine; `to_sparse_semi_structured` itself needs a GPU."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).half()
    weight = finalize(nm_decay(model, NMDecayConfig(total_steps=1)))[0].weight.detach()
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert torch.equal(back, weight)


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an int"),
        ({"m": 2.0}, "m must be an int"),
        ({"n": 5}, r"n must be an int in \[1, 4\]; got 5"),
        ({"total_steps": 0}, "total_steps must be an int >= 1"),
        ({"method": "ste"}, "method must be one of decay, srste; got 'ste'"),
        ({"decay": "cosine"}, "decay must be one of exp, linear, step"),
        ({"structure": "steps"}, "structure must be one of stepwise, geometric, densify"),
        ({"structure": 3}, "structure must be one of"),
        ({"structure": {}}, "structure must be one of"),
        ({"structure": {0: (3, 2)}}, r"n in structure at step 0 must be an int in \[1, 2\]"),
        ({"structure": {-1: (1, 2)}}, "a first step in structure must be an int >= 0"),
        ({"structure": {0: 4}}, r"structure must map step 0 to a pair \(n, m\); got 4"),
        ({"gradient": "none"}, "gradient must be one of straight_through, masked"),
        ({"dense_fraction": 1.0}, r"dense_fraction must be a finite number in \[0, 1\)"),
        ({"dense_fraction": 0.6, "fine_tune_fraction": 0.5}, "must add up to 1 at most; got 0.6 and 0.5"),
        ({"decay_coef": 0.0}, "decay_coef must be a finite number in"),
        ({"dim": 1}, "dim must be -1 .* or 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        NMDecayConfig(**options)


def test_wrong_layers():
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(6, 8, 3))
    with pytest.raises(ValueError, match=r"layer 0: groups of m=8 must divide the inputs of a weight \(8, 12\); got 12"):
        nm_decay(model, NMDecayConfig(2, 8, total_steps=4))
    with pytest.raises(ValueError, match=r"layer 1: .*m=16 must divide the inputs .*got 8"):
        nm_decay(model, NMDecayConfig(1, 2, total_steps=4, structure="geometric", target_modules=["1"]))
    with pytest.raises(ValueError, match=r"layer 1: .*must divide the outputs of a weight \(3, 8\); got 3"):
        nm_decay(model, NMDecayConfig(total_steps=4, dim=0))
    with pytest.raises(ValueError, match=r"layer 3: .*got 6"):
        nm_decay(model, NMDecayConfig(total_steps=4, target_modules=["3"]))
    with pytest.raises(TypeError, match=r"layer 2: conv must be nn.Conv2d with groups=1; got"):
        nm_decay(model, NMDecayConfig(total_steps=4, target_modules=["2"]))
    assert {type(layer) for layer in model} == {nn.Linear, nn.Conv2d}


def test_a_schedule_needs_its_length():
    config = NMDecayConfig()
    for ask in (
        config.frames, lambda: config.mask_value(0), lambda: config.pattern(0),
        lambda: nm_decay(nn.Sequential(nn.Linear(4, 4)), config), lambda: NMLinear(nn.Linear(4, 4), config),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="total_steps of NMDecayConfig must be the number of optimizer steps"):
            ask()
