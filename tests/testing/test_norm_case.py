"""The shared case of normalisations: torch's batch norm passes it, and each wrong version fails it."""

import pytest
import torch
from torch import nn

from lowdim.linalg import stream
from lowdim.testing.norm_case import NormCase


class TestBatchNorm(NormCase):
    norm_class = nn.BatchNorm1d
    test_the_output_has_the_dtype_of_the_input = None  # type: ignore[assignment]  # torch's kernel refuses mixed dtypes

    def batch(self, seed=0):
        x = torch.randn(8, self.features, generator=stream(seed, "norm", "batch"), dtype=torch.float64)
        return x * torch.arange(1, 6) + seed

    def expected(self, norm, x, training):
        """`(x − mean) / √(var + 1e-5) · weight + bias`; a tenth of the batch's mean and unbiased variance moves in."""
        mean, var = norm.running_mean, norm.running_var
        buffers = dict(norm.named_buffers())
        if training:
            mean = x.mean(0)
            var = ((x - mean) ** 2).sum(0) / len(x)
            buffers = {
                "running_mean": 0.9 * norm.running_mean + 0.1 * mean,
                "running_var": 0.9 * norm.running_var + 0.1 * var * len(x) / (len(x) - 1),
                "num_batches_tracked": norm.num_batches_tracked + 1,
            }
        return (x - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias, buffers

    def refusals(self):
        return [(ValueError, "2D or 3D", lambda: self.make()(torch.zeros(5, dtype=torch.float64)))]


class TooLarge(nn.BatchNorm1d):
    def forward(self, x):
        return 1.01 * super().forward(x)


class MovesTooFast(nn.BatchNorm1d):
    def __init__(self, features, **options):
        super().__init__(features, momentum=0.2, **options)


class MovesInEvaluation(nn.BatchNorm1d):
    def forward(self, x):
        y = super().forward(x)
        if not self.training:
            self.running_mean.lerp_(x.mean(0), 0.1)
        return y


class AlwaysTheBatch(nn.BatchNorm1d):
    def forward(self, x):
        kept = (None, None) if not self.training else (self.running_mean, self.running_var)
        return nn.functional.batch_norm(x, *kept, self.weight, self.bias, training=True)


class AlwaysTheRunning(nn.BatchNorm1d):
    def forward(self, x):
        super().forward(x)
        return nn.functional.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), self.weight, self.bias)


class DetachedStatistics(nn.BatchNorm1d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        super().forward(x.detach())
        mean, var = x.mean(0).detach(), x.var(0, correction=0).detach()
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


class KeepsTheGraph(nn.BatchNorm1d):
    def forward(self, x):
        self.running_mean = self.running_mean.detach()
        y = super().forward(x)
        self.running_mean = self.running_mean + 0 * x.mean(0)
        return y


class ForgetsOnSaving(nn.BatchNorm1d):
    def __init__(self, features, **options):
        super().__init__(features, **options)
        self.register_buffer("running_mean", self.running_mean, persistent=False)


@pytest.mark.parametrize(
    ("wrong", "found_by"),
    [
        (TooLarge, ("test_training_is_the_formula",)),
        (MovesTooFast, ("test_training_is_the_formula",)),
        (MovesInEvaluation, ("test_evaluation_is_the_formula_and_moves_nothing",)),
        (AlwaysTheBatch, ("test_evaluation_is_the_formula_and_moves_nothing",)),
        (AlwaysTheBatch, ("test_evaluation_takes_rows_one_by_one",)),
        (AlwaysTheRunning, ("test_training_is_the_formula",)),
        (DetachedStatistics, ("test_gradients_are_those_of_the_formula", True)),
        (KeepsTheGraph, ("test_running_statistics_hold_no_graph",)),
        (ForgetsOnSaving, ("test_training_continues_from_a_state_dict",)),
    ],
)
def test_a_wrong_norm_fails_its_case(wrong, found_by):
    class Case(TestBatchNorm):
        norm_class = wrong

    name, *arguments = found_by
    with pytest.raises((AssertionError, ValueError)):  # torch refuses to normalise a single row by itself
        getattr(Case(), name)(*arguments)


def test_a_case_without_a_formula_cannot_run():
    class TestNothing(NormCase):
        norm_class = nn.BatchNorm1d

    with pytest.raises(TypeError, match="batch"):
        TestNothing()
