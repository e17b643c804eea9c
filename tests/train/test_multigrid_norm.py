"""Sub-batch norm: formula, reference numbers, parts, files; and its place in a model."""

import copy

import pytest
import torch
from torch import nn

import vectors
from lowdim.linalg import stream
from lowdim.testing.agreement import refuses
from lowdim.testing.norm_case import NormCase
from lowdim.train.multigrid_norm import SubBatchNorm, convert_batch_norm, set_bn_splits


class TestSubBatchNorm(NormCase):
    norm_class = SubBatchNorm
    how = {"num_splits": 2}  # noqa: RUF012 (typed in the base class)
    splits, eps, momentum = 2, 1e-5, 0.1

    def batch(self, seed=0):
        return 1.5 * torch.randn(6, self.features, 2, 3, generator=stream(seed, "batch"), dtype=torch.float64) + seed

    def expected(self, norm, x, training):
        weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
        if not training:
            mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
            return weight * (x - mean) / (var + self.eps).sqrt() + bias, dict(norm.named_buffers())
        y, means, variances = torch.empty_like(x), [], []
        for part in range(self.splits):
            rows = x[part :: self.splits]
            mean, var = rows.mean((0, 2, 3), keepdim=True), rows.var((0, 2, 3), correction=0, keepdim=True)
            y[part :: self.splits] = weight * (rows - mean) / (var + self.eps).sqrt() + bias
            means.append(mean.flatten().detach())
            variances.append(rows.detach().transpose(0, 1).flatten(1).var(1))
        buffers = dict(norm.named_buffers())
        for name, new in (("split_mean", means), ("split_var", variances)):
            buffers[name] = (1 - self.momentum) * buffers[name] + self.momentum * torch.stack(new)
        return y, buffers

    def test_evaluation_takes_the_aggregated_statistics(self):
        """The law of total variance, over the parts."""
        norm = self.trained().eval()
        mean = sum(norm.split_mean) / self.splits
        spread = sum((part - mean) ** 2 for part in norm.split_mean) / self.splits
        self.close(norm.running_mean, mean, "formula")
        self.close(norm.running_var, sum(norm.split_var) / self.splits + spread, "formula")
        assert not torch.equal(norm.running_mean, torch.zeros_like(mean))

    def refusals(self):
        norm, x = self.make(), self.batch()
        return [
            (ValueError, "(N, 5, ...); got (6, 4, 2, 3)", lambda: norm(x[:, :4])),
            (ValueError, "(N, 5, ...); got (5,)", lambda: norm(x[0, :, 0, 0])),
            (ValueError, "a batch of 5 cannot be divided into num_splits=2", lambda: norm(x[:5])),
            (ValueError, "more than one value per channel", lambda: norm(x[:2, :, 0, 0])),
            (ValueError, "more than one value per channel", lambda: norm(x[:0])),
            (ValueError, "num_splits", lambda: SubBatchNorm(4, 0)),
            (ValueError, "num_splits", lambda: norm.set_splits(0)),
            (ValueError, "num_features", lambda: SubBatchNorm(0)),
            (ValueError, "momentum", lambda: SubBatchNorm(4, momentum=1.5)),
            (ValueError, "eps", lambda: SubBatchNorm(4, eps=-1.0)),
        ]


class TestSubBatchNormOfThree(TestSubBatchNorm):
    how = {"num_splits": 3, "momentum": 0.4, "eps": 1e-2}  # noqa: RUF012
    splits, eps, momentum = 3, 1e-2, 0.4

    def refusals(self):
        return [(ValueError, "num_splits=3", lambda: self.make()(self.batch()[:4]))]


def test_reference_numbers():
    v = vectors.load("multigrid", "sub_batch_norm")
    how = dict(v.hyperparameters)
    norm = SubBatchNorm(how.pop("num_features"), **how, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(v["weight"])
        norm.bias.copy_(v["bias"])
    for x, y in zip(v["x"], v["y"], strict=True):
        v.close(norm(x), y)
    norm.aggregate()
    v.close(norm.running_mean, "running_mean")
    v.close(norm.running_var, "running_var")
    v.close(norm.eval()(v["x"][0]), "y_eval")


@pytest.mark.parametrize("shape", [(6,), (6, 5), (4, 5, 3), (2, 4, 3, 3)])
def test_one_part_is_torchs_batch_norm(shape):
    """In training and evaluation, for inputs of any number of axes."""
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
    plain = kinds[len(shape)](7)
    norm = convert_batch_norm(copy.deepcopy(plain))
    for seed in range(3):
        x = torch.randn(shape[0], 7, *shape[1:], generator=stream(seed, "x"))
        assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_another_number_of_parts_starts_with_the_statistics_of_all():
    norm = SubBatchNorm(3, 2, dtype=torch.float64)
    x = torch.randn(12, 3, 5, dtype=torch.float64, generator=stream(0, "x"))
    norm(x)
    same, variances = norm.split_mean, norm.split_var
    norm.set_splits(2)
    assert norm.split_mean is same, "the same number changes nothing"
    norm.set_splits(4)
    assert torch.equal(norm.split_mean, same.mean(0).expand(4, 3))
    whole = variances.mean(0) + same.var(0, correction=0)  # the law of total variance
    torch.testing.assert_close(norm.split_var, whole.expand(4, 3), rtol=1e-12, atol=0)
    norm.aggregate()
    torch.testing.assert_close(norm.running_mean, same.mean(0))
    # A norm with precise statistics, set in evaluation mode, keeps them.
    norm.eval().running_mean.fill_(7.0)
    norm.set_splits(1)
    assert torch.equal(norm.eval().split_mean, torch.full((1, 3), 7.0, dtype=torch.float64))
    assert torch.equal(norm.running_mean, torch.full((3,), 7.0, dtype=torch.float64))


def test_a_state_dict_brings_its_number_of_parts():
    """And statistics that are ready for evaluation, though it was taken in training."""
    norm, x = SubBatchNorm(3, 4), torch.randn(8, 3, 5, generator=stream(0, "x"))
    norm(x)
    again = SubBatchNorm(3).eval()
    again.load_state_dict(norm.state_dict())
    assert again.num_splits == 4
    assert torch.equal(again(x), norm.eval()(x))
    again.train()(x)
    norm.train()(x)
    assert torch.equal(again.split_var, norm.split_var)
    with pytest.raises(RuntimeError, match="split_mean"):
        SubBatchNorm(2).load_state_dict(norm.state_dict())


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_half_precision(held):
    """Statistics in float32 beside inputs in bfloat16, as under autocast; or all in bfloat16."""
    x = torch.randn(8, 3, 4, 4, generator=stream(0, "x"))
    want = SubBatchNorm(3, 2)(x)
    norm = SubBatchNorm(3, 2, dtype=held)
    y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert norm.split_mean.dtype == held
    assert float((y.float() - want).detach().abs().max()) < 0.05


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
    model = nn.Module()
    model.body, model.head, model.other = body, nn.BatchNorm1d(6, eps=1e-3, momentum=0.3, affine=False), nn.GroupNorm(2, 4)
    model.again = body[1]  # shared
    return model


def test_converting_keeps_parameters_statistics_and_sharing():
    model = network()
    model.body(torch.randn(4, 1, 3, 6, 6))
    old = model.body[1]
    converted = convert_batch_norm(model)
    new = converted.body[1]
    assert converted is model
    assert isinstance(new, SubBatchNorm)
    assert new is model.again
    assert new.weight is old.weight
    assert torch.equal(new.running_var, old.running_var)
    assert torch.equal(new.split_mean, old.running_mean[None])
    assert (model.head.eps, model.head.momentum, model.head.weight) == (1e-3, 0.3, None)
    assert isinstance(model.other, nn.GroupNorm)
    set_bn_splits(model, 3)
    assert (new.num_splits, model.head.num_splits) == (3, 3)
    set_bn_splits(nn.Linear(2, 2), 3)  # no norm: nothing to do


def test_a_model_that_cannot_be_converted_stays():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None))
    bare = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    refuses(
        [
            (ValueError, "layer 1 has momentum=None", lambda: convert_batch_norm(model)),
            (ValueError, "layer 0 has no running statistics", lambda: convert_batch_norm(bare)),
            (ValueError, "num_splits", lambda: set_bn_splits(model, 0)),
            (ValueError, "layer body.1: a batch of 5", lambda: divided()(torch.randn(5, 1, 2, 4, 4))),
        ]
    )
    assert isinstance(model[0], nn.BatchNorm1d)


def divided():
    model = convert_batch_norm(network())
    set_bn_splits(model, 2)
    return model.body
