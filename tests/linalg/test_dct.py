"""The cosine transform: its matrix against the formula, the FFT against the product, and what is kept between calls."""

import importlib
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vectors
from lowdim.linalg import dct, dct_columns, dct_matrix, stream

SIZES = [1, 2, 3, 4, 5, 8, 9, 31, 64, 100, 257]


def formula(n):
    i = torch.arange(n, dtype=torch.float64)
    C = math.sqrt(2 / n) * torch.cos(math.pi * i[:, None] * (2 * i[None] + 1) / (2 * n))
    C[0] *= math.sqrt(0.5)
    return C


@pytest.mark.parametrize("n", SIZES)
def test_matrix_is_the_formula_and_orthogonal(n):
    C = dct_matrix(n)
    assert C.dtype == torch.float64
    assert float((C - formula(n)).abs().max()) < 1e-13 * n
    assert float((C @ C.T - torch.eye(n, dtype=C.dtype)).abs().max()) < 1e-14
    assert torch.equal(dct_matrix(n, kind=3), C.T)
    assert torch.equal(dct_matrix(n, dtype=torch.float32), C.float())  # rounded once


@pytest.mark.parametrize(("name", "kind"), [("tall", 2), ("wide_rotate", 2), ("dct2_feedback", 3), ("dct2_wide", 3)])
def test_the_authors_bases(name, kind):
    """Their first path multiplies by C, their second transforms by it: two different bases."""
    case = vectors.load("dct", name)
    case.close(dct_matrix(len(case["basis"]), kind=kind), "basis")


def test_angles_of_large_sizes_are_exact():
    """i (2 j + 1) reaches 2 n²; reduced as an integer it loses nothing."""
    n = 40_001  # above what 32 bits hold
    index = torch.tensor([0, 1, 20_000, n - 1])
    columns = dct_columns(n, index, kind=3)
    assert float((columns.norm(dim=0) - 1).abs().max()) < 1e-12
    assert float((columns.T @ columns - torch.eye(4, dtype=columns.dtype)).abs().max()) < 1e-12


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_fft_and_product_agree(n, kind):
    x = torch.randn(3, n, 2, generator=stream(0, "dct", n), dtype=torch.float64)
    want = torch.einsum("ij,bjc->bic", dct_matrix(n, kind=kind), x)
    for method in ("fft", "product", "auto"):
        got = dct(x, kind=kind, dim=1, method=method)
        assert got.shape == x.shape
        assert float((got - want).abs().max()) < 1e-13 * math.sqrt(n)
        assert float((dct(got, kind=5 - kind, dim=1, method=method) - x).abs().max()) < 1e-12


@pytest.mark.parametrize("method", ["fft", "product"])
def test_float32_is_as_good_as_float32(method):
    x = torch.randn(4, 300, generator=stream(0, "dct", "float"), dtype=torch.float64)
    error = dct(x.float(), method=method).double() - dct(x)
    assert float(error.norm() / x.norm()) < 1e-6


def test_half_precision_is_rounded_once():
    x = torch.randn(4, 300, generator=stream(0, "dct", "half")).bfloat16()
    got = dct(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, dct(x.float()).bfloat16())


def test_columns_are_those_of_the_matrix():
    for kind in (2, 3):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            index = torch.tensor([0, 3, 6], dtype=torch.int32)
            assert torch.equal(
                dct_columns(7, index, kind=kind, dtype=dtype), dct_matrix(7, kind=kind, dtype=dtype)[:, index.long()]
            )


def test_energy_compaction():
    """What the transform is for: a smooth signal needs few coefficients."""
    smooth = torch.linspace(0, 1, 64, dtype=torch.float64).square()
    y = dct(smooth)
    assert float(y[:6].square().sum() / y.square().sum()) > 0.999


def test_tables_survive_forecasts_and_inference_mode():
    """A fake tensor must not be kept, nor one that autograd refuses."""
    with FakeTensorMode():
        assert dct(torch.empty(2, 301), method="fft").shape == (2, 301)
        assert dct(torch.empty(2, 11), method="product").shape == (2, 11)
    with torch.inference_mode():
        dct(torch.ones(2, 301), method="fft"), dct(torch.ones(2, 11), method="product")
    for n, method in ((301, "fft"), (11, "product")):
        x = torch.ones(2, n, dtype=torch.float32, requires_grad=True)
        dct(x, method=method).square().sum().backward()
        assert float((x.grad - 2).abs().max()) < 1e-4  # orthogonal: the gradient of ‖C x‖² is 2 x


def test_matrix_is_shared():
    module = importlib.import_module("lowdim.linalg.dct")
    kept = [module._kept(module._make_matrix, 13, torch.float32, torch.device("cpu")) for _ in range(2)]
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert module._kept(module._make_matrix, 13, torch.float64, torch.device("cpu")).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dct_matrix(0), "n must be an int >= 1"),
        (lambda: dct_matrix(4, kind=1), "kind must be 2"),
        (lambda: dct_columns(4, torch.zeros(2)), "index must be a vector of integers"),
        (lambda: dct_columns(4, torch.zeros(2, 2, dtype=torch.int64)), "index"),
        (lambda: dct(torch.ones(3), kind=4), "kind"),
        (lambda: dct(torch.ones(3), method="fast"), "method must be one of"),
        (lambda: dct(torch.ones(3, 0)), "at least one entry"),
        (lambda: dct(torch.tensor(1.0)), "at least one entry"),
    ],
)
def test_wrong_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
