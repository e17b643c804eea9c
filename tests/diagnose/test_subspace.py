import math

import pytest
import torch

import vectors
from lowdim.diagnose import compression_bound, quantize_subspace
from lowdim.testing.result_case import ValueCase


def test_vectors():
    case = vectors.load("said", "bound")
    for row, want in zip(case["rows"].tolist(), case["bound"].tolist(), strict=True):
        error, dimension, n, bits, delta = row
        got = compression_bound(error, int(dimension), int(n), bits=int(bits), delta=delta)
        assert abs(got - want) <= case.tolerance


class TestBound(ValueCase):
    def result(self):
        return compression_bound(0.1, 10, 5000, bits=8, delta=0.05)

    def expected(self):
        return 0.1 + math.sqrt((10 * 8 * math.log(2) + math.log(1 / 0.05)) / (2 * 5000))

    def refusals(self):
        good = (0.1, 10, 100)
        return [
            (ValueError, "train_error", lambda: compression_bound(-0.1, 10, 100)),
            (ValueError, "train_error", lambda: compression_bound(1.5, 10, 100)),
            (ValueError, "dimension", lambda: compression_bound(0.1, 0, 100)),
            (ValueError, "n_samples", lambda: compression_bound(0.1, 10, 0)),
            *((ValueError, "delta", lambda d=d: compression_bound(*good, delta=d)) for d in (0.0, 1.0, float("nan"))),
            *((ValueError, "bits", lambda b=b: compression_bound(*good, bits=b)) for b in (0, 65, 1.5)),
        ]


class TestQuantizedSubspace(ValueCase):
    theta = torch.tensor([-1.5, -0.2, 0.1, 0.7, 1.2], dtype=torch.float64)

    def result(self):
        return quantize_subspace(self.theta, 3)

    def expected(self):
        return [min((1.5 * (2 * i / 7 - 1) for i in range(8)), key=lambda level: abs(level - t)) for t in self.theta.tolist()]

    def refusals(self):
        bad = (torch.tensor([]), torch.tensor([float("nan")]), torch.ones(2, dtype=torch.int64))
        return [
            *((ValueError, "bits", lambda b=b: quantize_subspace(torch.ones(2), b)) for b in (0, 17, True)),
            *((ValueError, "theta", lambda t=t: quantize_subspace(t, 8)) for t in bad),
        ]


def test_the_bound_is_never_above_one():
    assert compression_bound(0.0, 1000, 500) == 1.0
    assert compression_bound(1.0, 1, 10**9) == 1.0


def test_the_bound_falls_with_samples_and_rises_with_what_is_described():
    base = compression_bound(0.1, 20, 4000, bits=8)
    assert compression_bound(0.1, 20, 8000, bits=8) < base
    assert compression_bound(0.1, 21, 4000, bits=8) > base
    assert compression_bound(0.1, 20, 4000, bits=9) > base
    assert compression_bound(0.1, 20, 4000, bits=8, delta=0.01) > base


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quantized_numbers_are_levels_within_half_a_step(bits, dtype):
    theta = torch.randn(500, dtype=dtype)
    q = quantize_subspace(theta, bits)
    assert q.dtype == dtype
    size = float(theta.abs().max())
    step = 2 * size / (2**bits - 1)
    levels = (q.double() + size) / step
    rounding = 1e-2 if dtype == torch.float32 else 1e-9  # of the result, in steps
    assert float((levels - levels.round()).abs().max()) <= rounding
    assert float((q.double() - theta.double()).abs().max()) <= step * (0.5 + rounding)
    assert len(q.unique()) <= 2**bits
    assert torch.equal(quantize_subspace(q, bits), q)


def test_bfloat16_is_quantized_in_wide_numbers():
    theta = torch.randn(100).bfloat16()
    assert torch.equal(quantize_subspace(theta, 8), quantize_subspace(theta.double(), 8).bfloat16())


def test_zeros_stay():
    assert torch.equal(quantize_subspace(torch.zeros(3), 4), torch.zeros(3))
