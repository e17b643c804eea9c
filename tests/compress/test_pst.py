"""PST: the weight in use, its gradient, the schedule, what is trained, and a model that loses weights while it is tuned."""

import json
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.compress import PSTConfig, PSTLinear, load_compressed, pst
from lowdim.modules import describe_layers
from lowdim.testing.scheduled_compress_case import ScheduledCompressCase

SIX = {"weight_U", "weight_V", "mask_scores_A", "mask_scores_B", "mask_scores_R", "mask_scores_C"}


def in_use(layer, sparsity, beta=1.0, alpha1=1.0, alpha2=1.0):
    """The formula of the paper: the whole matrix is sorted, and the first entries are left out."""
    moved = layer.matrix + beta * layer.weight_U @ layer.weight_V
    scores = moved.abs() + alpha1 * layer.mask_scores_A @ layer.mask_scores_B
    scores = scores + alpha2 * (layer.mask_scores_R[:, None] + layer.mask_scores_C[None, :])
    order = scores.flatten().argsort(stable=True)
    mask = torch.ones(scores.numel(), dtype=scores.dtype)
    mask[order[: int(scores.numel() * sparsity)]] = 0
    return mask.view_as(scores) * moved


class Pruned(ScheduledCompressCase):
    compressed = (PSTLinear,)
    frozen = ("weight", "bias", "weight_U", "mask_scores_A")  # the last two only at first, while V and B are 0
    lossless: ClassVar = {"total_steps": 4}

    def compress(self, model, batches, **options):
        return pst(model, PSTConfig(**options), batches)


class TestPST(Pruned):
    """Eight steps: 0 to step 1, then cubic, 75 % from step 6 on."""

    options: ClassVar = {"total_steps": 8, "sparsity": 0.75, "weight_rank": 2, "mask_rank": 3, "initial_warmup": 0.125,
                         "final_warmup": 0.25}  # fmt: skip
    sparsity = 0.75
    freezes_others = True

    def effective(self, layer, step):
        share = 0 if step <= 1 else 0.75 if step >= 6 else 0.75 - 0.75 * (1 - (step - 1) / 5) ** 3
        return in_use(layer, share)


class TestOthersTrain(Pruned):
    """From a pruned model, with other factors; the first forward is dense, as the authors'."""

    options: ClassVar = {"total_steps": 6, "sparsity": 0.5, "initial_sparsity": 0.25, "weight_rank": 1, "mask_rank": 1,
                         "weight_beta": 0.5, "mask_alpha1": 0.3, "mask_alpha2": 2.0, "initial_warmup": 0.5, "final_warmup": 0.5,
                         "train_others": True}  # fmt: skip
    sparsity = 0.5

    def effective(self, layer, step):
        share = 0 if step == 0 else 0.25 if step <= 3 else 0.5
        return in_use(layer, share, 0.5, 0.3, 2.0)

    def test_others_train(self):
        model = self.prepared()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        other = {"norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}
        assert trained == {f"{name}.{path}" for name in ("up", "down") for path in SIX} | other


# Vectors


@pytest.mark.parametrize("case", ["train", "train_scaled"])
def test_authors_trajectory(case):
    v = vectors.load("pst", case)
    how = {k: x for k, x in v.hyperparameters.items() if k not in ("in_features", "out_features", "lr", "optimizer")}
    linear = nn.Linear(v["weight"].shape[1], v["weight"].shape[0], dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(v["weight"])
        linear.bias.copy_(v["bias"])
    layer = PSTLinear.from_linear(linear, PSTConfig(**how))
    with torch.no_grad():
        for name in SIX:
            assert layer.get_parameter(name).shape == v[name].shape
            layer.get_parameter(name).copy_(v[name])
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=v.hyperparameters["lr"])
    outputs, sparsity = [], []
    for index, (x, target) in enumerate(zip(v["x"], v["target"])):
        sparsity.append(layer.sparsity)
        y = layer(x)
        outputs.append(y.detach())
        optimizer.zero_grad()
        F.mse_loss(y, target).backward()
        if index == int(v["grad_step"]):
            for name in SIX:
                v.close(layer.get_parameter(name).grad, f"grad_{name}")
        optimizer.step()
        layer.step()
    v.close(torch.stack(outputs), "y")
    v.close(torch.tensor(sparsity, dtype=torch.float64), "sparsity")
    for name in SIX:
        v.close(layer.get_parameter(name), f"{name}_after")
    v.close(torch.tensor([layer.sparsity], dtype=torch.float64), "final_sparsity")
    v.close(layer.to_plain().weight, "final_weight")
    assert torch.equal(layer.weight.detach(), v["weight"])
    assert torch.equal(layer.bias.detach(), v["bias"])


def test_authors_schedule():
    v = vectors.load("pst", "schedule")
    config = PSTConfig(**v.hyperparameters)
    v.close(torch.tensor([config.sparsity_at(t) for t in range(41)], dtype=torch.float64), "sparsity")


# The schedule


def test_warm_ups_that_fill_the_training():
    config = PSTConfig(total_steps=100, initial_sparsity=0.2, sparsity=0.6, initial_warmup=0.29, final_warmup=0.71)
    assert [config.sparsity_at(t) for t in (0, 28, 29, 30, 100, 200)] == [0.2, 0.2, 0.6, 0.6, 0.6, 0.6]
    assert PSTConfig(total_steps=1, sparsity=0.3).sparsity_at(1) == 0.3
    ends = PSTConfig(total_steps=4, sparsity=0.8, initial_warmup=0, final_warmup=0)
    assert [round(ends.sparsity_at(t), 6) for t in range(5)] == [0, 0.4625, 0.7, 0.7875, 0.8]
    assert PSTConfig(**json.loads(json.dumps(config.description()))) == config


# Layers


def test_gradients_by_autograd():
    """The rule is that of plain autograd where the mask is replaced by `s + (mask - s).detach()`."""
    torch.manual_seed(0)
    config = PSTConfig(
        total_steps=2, sparsity=0.5, weight_rank=2, mask_rank=2, weight_beta=0.7, mask_alpha1=0.4, mask_alpha2=1.5
    )
    layer = PSTLinear(nn.Linear(6, 5, dtype=torch.float64), config)
    with torch.no_grad():
        for name in SIX:
            layer.get_parameter(name).normal_()
    layer.weight.requires_grad_(True)
    layer.step()
    layer.step()
    x = torch.randn(7, 6, dtype=torch.float64)
    moved = layer.weight + 0.7 * layer.weight_U @ layer.weight_V
    scores = moved.abs() + 0.4 * layer.mask_scores_A @ layer.mask_scores_B
    scores = scores + 1.5 * (layer.mask_scores_R[:, None] + layer.mask_scores_C)
    mask = (scores > scores.flatten().sort().values[14]).double()
    assert torch.equal(layer.mask(), mask)
    torch.testing.assert_close(layer.scores(), scores)
    wanted = {"weight", *SIX}
    parameters = [layer.get_parameter(name) for name in wanted]
    want = torch.autograd.grad((x @ ((scores + (mask - scores).detach()) * moved).T).sin().sum(), parameters)
    got = torch.autograd.grad((layer(x) - layer.bias).sin().sum(), parameters)
    for name, one, two in zip(wanted, got, want):
        torch.testing.assert_close(one, two, msg=name)


def test_nothing_is_kept_in_float32_but_the_result_of_half_precision():
    """What the backward pass needs: the weight in use and a mask of one byte an entry; the sums are done in float32."""
    torch.manual_seed(0)
    layer = PSTLinear(
        nn.Linear(64, 48, dtype=torch.bfloat16), PSTConfig(total_steps=1, sparsity=0.5, weight_rank=1, mask_rank=1)
    )
    layer.step()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True))
    own = {p.data_ptr() for p in layer.parameters()}
    large = sorted(str(t.dtype) for t in kept if t.numel() >= 64 * 48 and t.data_ptr() not in own)
    assert large == ["torch.bfloat16", "torch.bool"]
    y.float().square().sum().backward()
    assert {layer.get_parameter(name).grad.dtype for name in SIX} == {torch.bfloat16}
    with torch.no_grad():
        wide = in_use(layer.float(), 0.5)
    torch.testing.assert_close(layer.dense_weight().detach(), wide)


def test_autocast_does_not_choose_the_mask():
    torch.manual_seed(0)
    layer = PSTLinear(nn.Linear(16, 16), PSTConfig(total_steps=1, weight_rank=2, mask_rank=2))
    with torch.no_grad():
        layer.weight_V.normal_()
        layer.mask_scores_B.normal_()
    layer.step()
    want = layer.mask()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.mask(), want)
        y = layer(torch.randn(2, 16))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.to_plain().weight != 0, want.bool())


def test_the_smallest_layers():
    layer = PSTLinear(nn.Linear(1, 1), PSTConfig(total_steps=1, sparsity=0.99))
    layer.step()
    assert layer.mask().tolist() == [[1.0]]  # int(0.99) entries are left out
    assert layer(torch.ones(0, 1)).shape == (0, 1)
    half = PSTLinear(nn.Linear(2, 1), PSTConfig(total_steps=1, sparsity=0.5, weight_rank=5, mask_rank=7))
    with torch.no_grad():
        half.weight.fill_(0.0)
    half.step()
    assert half.mask().tolist() == [[0.0, 1.0]]  # of equal scores the first goes
    half(torch.ones(1, 2)).sum().backward()


def test_ranks_of_its_own_seeds():
    def layers(seed):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        pst(model, PSTConfig(total_steps=1, seed=seed))
        return [model[i].weight_U.detach() for i in (0, 1)] + [model[0].mask_scores_A.detach()]

    one, again, other = layers(0), layers(0), layers(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2])
    linear = nn.Linear(6, 6)
    config = PSTConfig(total_steps=1, seed=3)
    assert torch.equal(PSTLinear(linear, config).weight_U, PSTLinear.from_linear(linear, config, seed=3).weight_U)
    big = PSTLinear(nn.Linear(200, 300), config)
    for factor in (big.weight_U, big.mask_scores_A):
        assert abs(float(factor.detach().std()) - 1) < 0.05
        assert abs(float(factor.detach().mean())) < 0.05


def test_cost():
    cost = PSTLinear(nn.Linear(64, 32), PSTConfig(total_steps=3, weight_rank=2, mask_rank=3)).cost(10, itemsize=2)
    assert cost.parameters == 5 * 96 + 96
    assert cost.flops_forward == 2 * 10 * 2048 + 2 * 2048 * 5 + 4 * 2048
    assert cost.flops_backward == 4 * 10 * 2048 + 4 * 2048 * 5 + 8 * 2048
    assert cost.bytes_forward == 2 * (640 + 320 + 3 * 2048 + 5 * 96)
    assert cost.bytes_backward == 2 * cost.bytes_forward


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an int >= 1; got 0"),
        ({"sparsity": 1.0}, r"sparsity must be a finite number in \[0, 1\); got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be"),
        ({"initial_sparsity": 1}, r"initial_sparsity must be a finite number in \[0, 1\)"),
        ({"weight_rank": 0}, "weight_rank must be an int >= 1; got 0"),
        ({"mask_rank": 0}, "mask_rank must be an int >= 1; got 0"),
        ({"initial_warmup": 1.1}, r"initial_warmup must be a finite number in \[0, 1\]"),
        ({"final_warmup": -0.1}, r"final_warmup must be a finite number in \[0, 1\]"),
        ({"initial_warmup": 0.6, "final_warmup": 0.5}, "must add up to 1 at most; got 0.6 and 0.5"),
        ({"weight_beta": float("nan")}, "weight_beta must be a finite number"),
        ({"mask_alpha1": "1"}, "mask_alpha1 must be a finite number"),
        ({"train_others": 1}, "train_others must be True or False; got 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        PSTConfig(**options)


def test_wrong_models():
    with pytest.raises(ValueError, match="no layer is left"):
        pst(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), PSTConfig(total_steps=4))
    with pytest.raises(TypeError, match=r"layer must be nn.Linear or Conv1D; got"):
        PSTLinear(nn.Conv2d(3, 3, 1), PSTConfig(total_steps=4))
    with pytest.raises(ValueError, match="step must be an int >= 0; got -1"):
        PSTConfig(total_steps=4).sparsity_at(-1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer 1: its weight has NaN or infinite entries"):
        pst(model, PSTConfig(total_steps=4))
    assert all(p.requires_grad for p in model.parameters())


def test_a_schedule_needs_its_length():
    config = PSTConfig()
    for ask in (
        lambda: config.sparsity_at(0),
        lambda: pst(nn.Sequential(nn.Linear(4, 4)), config), lambda: PSTLinear(nn.Linear(4, 4), config),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="total_steps of PSTConfig must be the number of optimizer steps"):
            ask()


def test_a_file_with_another_rank_is_refused():
    from lowdim.errors import CheckpointError

    model = pst(nn.Sequential(nn.Linear(4, 4)), PSTConfig(total_steps=4, weight_rank=2))
    layers = json.loads(json.dumps(describe_layers(model)))
    layers["0"]["weight_rank"] = 3
    with pytest.raises(CheckpointError, match="layer 0 is a"):
        load_compressed(nn.Sequential(nn.Linear(4, 4)), model.state_dict(), layers)
