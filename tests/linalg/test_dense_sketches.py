import numpy as np
import pytest
import torch

from lowdim.linalg import SRHT, AMSSketch, CountSketch, GaussianSketch, PooledGaussian, make_sketch, stream
from lowdim.testing.agreement import refuses

KINDS = ("srht", "gaussian", "ams", "pooled", "count")
PRIME = 2**61 - 1


def hadamard(size):
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)], dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_matrix(kind):
    sketch = make_sketch(kind, 8, 21, seed=3)
    S = sketch.dense()
    assert sketch.shape == tuple(S.shape) == (8, 21)
    generator = stream(0, "test")
    for tail in ((), (4,), (0,)):
        x, y = (torch.randn(n, *tail, dtype=torch.float64, generator=generator) for n in (21, 8))
        assert torch.allclose(sketch.apply(x), S @ x, atol=1e-12)
        assert torch.allclose(sketch.apply_transposed(y), S.T @ y, atol=1e-12)
    x = torch.randn(21, 2, requires_grad=True)
    sketch.apply(x).sum().backward()
    assert torch.allclose(x.grad, S.float().sum(0)[:, None].expand(21, 2), atol=1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        got = sketch.apply(x.detach().to(dtype))
        assert got.dtype == dtype
        assert torch.allclose(got.float(), S.float() @ x.detach(), atol=0.2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_squares_in_the_mean(kind):
    x = torch.linspace(-1.0, 2.0, 13, dtype=torch.float64)
    squares = [float(make_sketch(kind, 8, 13, seed=seed).apply(x).square().sum()) for seed in range(400)]
    assert np.mean(squares) == pytest.approx(float(x.square().sum()), rel=0.08)


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_sketch_of_its_own_stream(kind):
    first, again, other = (make_sketch(kind, 8, 20, seed=seed).dense() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    data = torch.randn(8, 20, dtype=torch.float64)
    drawn = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(data, drawn)  # the trap: with the bare seed, a Gaussian sketch would be the data
    assert not torch.equal(first * 8**0.5, data)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_linear_operator_of_scipys(kind):
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="linear operators are scipy's")
    sketch = make_sketch(kind, 4, 10)
    operator, S = sketch.as_linear_operator(), sketch.dense().numpy()
    assert isinstance(operator, linalg.LinearOperator)
    for got, want in (
        (operator @ np.arange(10.0), S @ np.arange(10.0)),
        (operator @ np.eye(10), S),
        (operator @ np.ones((10, 1)), S @ np.ones((10, 1))),
        (operator.T @ np.arange(4.0), S.T @ np.arange(4.0)),
        (operator.T @ np.eye(4), S.T),
    ):
        assert np.allclose(got, want, atol=1e-12)


def test_rows_of_the_hadamard_matrix_without_replacement():
    signs, rows = torch.tensor([1.0, -1, -1, 1, 1], dtype=torch.float64), torch.tensor([6, 0, 3])
    want = hadamard(8)[rows][:, :5] * signs / 3**0.5
    assert torch.allclose(SRHT(signs, rows, 5).dense(), want)
    assert len(set(SRHT.draw(16, 9, generator=stream(0, "rows")).rows.tolist())) == 16


def test_pooled_blocks():
    generator = stream(0, "pooled")
    signs, permutation = torch.tensor([1.0, -1, -1], dtype=torch.float64), torch.randperm(8, generator=generator)
    gaussians = torch.randn(8, generator=generator, dtype=torch.float64)
    x = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    z = hadamard(8)[:, :3] @ (signs * x) / 8**0.5
    want = (z[permutation] * gaussians).view(2, 4).sum(1)
    assert torch.allclose(PooledGaussian(signs, permutation, gaussians, 2).apply(x), want)
    assert make_sketch("pooled", 9, 20).gaussians.shape == (64,)  # 16 rows
    assert make_sketch("pooled", 4, 100).gaussians.shape == (128,)


def test_signs_are_exact_modulo_the_prime():
    """With Python's integers, at the largest coefficients and columns."""
    coefficients = torch.tensor([[PRIME - 1] * 4, [PRIME - 1, 0, PRIME // 2, 7], [0, 0, 0, 1], [123456789012345678] * 4])
    sketch = AMSSketch(coefficients, 2**31)
    for start in (0, 2**31 - 3):
        got = sketch._signs(start, start + 3)
        for row, (a, b, c, e) in enumerate(coefficients.tolist()):
            want = [1 if (a * j**3 + b * j**2 + c * j + e) % PRIME % 2 == 0 else -1 for j in range(start, start + 3)]
            assert got[row].tolist() == want


def test_blocks_of_signs_make_one_matrix(monkeypatch):
    sketch = make_sketch("ams", 8, 50)
    whole, x = sketch.dense(), torch.arange(50.0, dtype=torch.float64)
    monkeypatch.setattr("lowdim.linalg.ams_sketch._BLOCK", 8 * 7)
    assert len(sketch._blocks()) == 8
    assert torch.equal(sketch.dense(), whole)
    assert torch.allclose(sketch.apply(x), whole @ x)


def test_one_number():
    for kind in KINDS:
        assert float(make_sketch(kind, 1, 1).dense().abs()) > 0


def test_wrong_input_is_refused():
    signs, rows = torch.ones(5), torch.tensor([0, 1])
    four = torch.ones(4)
    refuses(
        [
            (ValueError, "[0, 8)", lambda: SRHT(signs, rows + 7)),
            (ValueError, "distinct", lambda: SRHT(signs, rows * 0)),
            (ValueError, "±1", lambda: SRHT(2 * signs, rows)),
            (ValueError, "n=4", lambda: SRHT(signs, rows, 4)),
            (TypeError, "integers", lambda: SRHT(signs, rows.float())),
            (ValueError, "[1, 8]", lambda: SRHT.draw(9, 5)),
            (ValueError, "2-D", lambda: GaussianSketch(four)),
            (ValueError, "power of two", lambda: PooledGaussian(four, torch.arange(6), torch.ones(6), 2)),
            (ValueError, "at least 5", lambda: PooledGaussian(signs, torch.arange(4), four, 2)),
            (ValueError, "rows=3", lambda: PooledGaussian(four, torch.arange(4), four, 3)),
            (ValueError, "each of 0 to 3", lambda: PooledGaussian(four, torch.zeros(4, dtype=torch.int64), four, 2)),
            (ValueError, "power of two", lambda: PooledGaussian.draw(3, 8)),
            (TypeError, "int64", lambda: AMSSketch(torch.zeros(2, 4), 5)),
            (ValueError, "(m, 4)", lambda: AMSSketch(torch.zeros(2, 3, dtype=torch.int64), 5)),
            (ValueError, f"[0, {PRIME})", lambda: AMSSketch(torch.full((1, 4), PRIME), 5)),
            (ValueError, "n must", lambda: AMSSketch(torch.zeros(1, 4, dtype=torch.int64), 0)),
            (ValueError, "kind must be one of", lambda: make_sketch("hash", 2, 5)),
            (ValueError, "rows", lambda: make_sketch("srht", 0, 5)),
            (ValueError, "(4,)", lambda: make_sketch("srht", 2, 5).apply(four)),
            (ValueError, "y must", lambda: make_sketch("ams", 2, 5).apply_transposed(four)),
            (ValueError, "y must", lambda: make_sketch("count", 2, 5).apply_transposed(four)),
            (ValueError, "batch", lambda: CountSketch.draw(2, 3, 5).as_linear_operator()),
        ]
    )
