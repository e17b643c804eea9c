import math

import pytest
import torch

import vectors
from lowdim.diagnose import compression_bound, quantize_subspace


def test_vectors():
    case = vectors.load("said", "bound")
    for row, want in zip(case["rows"].tolist(), case["bound"].tolist(), strict=True):
        error, dimension, n, bits, delta = row
        got = compression_bound(error, int(dimension), int(n), bits=int(bits), delta=delta)
        assert abs(got - want) <= case.tolerance


def test_the_bound_is_the_formula_and_never_above_one():
    want = 0.1 + math.sqrt((10 * 8 * math.log(2) + math.log(20)) / (2 * 5000))
    assert compression_bound(0.1, 10, 5000, bits=8, delta=0.05) == pytest.approx(want, abs=1e-14)
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


def test_bad_input():
    good = (0.1, 10, 100)
    for name, arguments in {
        "train_error": (-0.1, 10, 100),
        "dimension": (0.1, 0, 100),
        "n_samples": (0.1, 10, 0),
    }.items():
        with pytest.raises(ValueError, match=name):
            compression_bound(*arguments)
    with pytest.raises(ValueError, match="train_error"):
        compression_bound(1.5, 10, 100)
    for delta in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="delta"):
            compression_bound(*good, delta=delta)
    for bits in (0, 65, 1.5):
        with pytest.raises(ValueError, match="bits"):
            compression_bound(*good, bits=bits)
    for bits in (0, 17, True):
        with pytest.raises(ValueError, match="bits"):
            quantize_subspace(torch.ones(2), bits)
    for theta in (torch.tensor([]), torch.tensor([float("nan")]), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="theta"):
            quantize_subspace(theta, 8)
