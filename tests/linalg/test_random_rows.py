import pytest
import torch

from lowdim.linalg import combine_rows, random_rows
from lowdim.plan.kept import kept_tensors


def words(seed, start, count):
    """splitmix64 in Python's unbounded integers."""
    mask, found = (1 << 64) - 1, []
    for i in range(start, start + count):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1])
def test_entries_are_the_sixteen_bit_parts_of_splitmix64(seed):
    assert words(0, 0, 1) == [0xE220A8397B1DCDAF]  # as published
    got = random_rows(seed, 3, 5, 6)  # two words to a row, the last half unused
    for row, first in zip(got, (6, 8), strict=True):
        parts = [(word >> shift) & 0xFFFF for word in words(seed, first, 2) for shift in (0, 16, 32, 48)][:6]
        signed = torch.tensor([part - (1 << 16) if part >= 1 << 15 else part for part in parts])
        assert torch.equal(row, (signed + 0.5) / 2**15)


def test_rows_do_not_depend_on_how_many_are_drawn_at_once():
    whole = random_rows(5, 0, 40, 7)
    for step in (1, 3, 40):
        parts = [random_rows(5, i, min(i + step, 40), 7) for i in range(0, 40, step)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(random_rows(6, 0, 40, 7), whole)
    assert random_rows(5, 2, 2, 7).shape == (0, 7)


def test_entries_are_uniform_and_independent():
    numbers = random_rows(1, 0, 512, 1024)
    assert -1 < float(numbers.min()) < -0.9999
    assert 0.9999 < float(numbers.max()) < 1
    n = numbers.numel()
    counts = torch.histc(numbers, 64, -1, 1)
    chi2 = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert 63 - 5 * 126**0.5 < chi2 < 63 + 5 * 126**0.5
    # normalised rows: off the diagonal of the Gram matrix stands noise of deviation 1/√1024
    gram = numbers @ numbers.T / (1024 / 3)
    off = gram[~torch.eye(512, dtype=torch.bool)]
    assert abs(float(off.mean())) < 5e-4
    assert abs(float(off.std()) * 32 - 1) < 0.01
    for lag in (1, 2, 3, 4):
        assert abs(float((numbers[:, lag:] * numbers[:, :-lag]).mean()) * 3) < 5 / n**0.5


def test_no_generator_is_touched():
    before = torch.get_rng_state()
    coefficients = torch.ones(3, requires_grad=True)
    combine_rows(coefficients, 8, seed=1).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [1, 5, 700])
def test_a_combination_and_its_gradient_are_those_of_the_held_matrix(count):
    size = 1000  # 700 rows of it take three chunks
    rows = random_rows(9, 0, count, size).double()
    coefficients = torch.linspace(-1, 2, count, dtype=torch.float64).requires_grad_()
    got = combine_rows(coefficients, size, seed=9)
    torch.testing.assert_close(got.detach(), coefficients.detach() @ rows)
    vector = torch.linspace(0, 1, size, dtype=torch.float64)
    (grad,) = torch.autograd.grad(got @ vector, coefficients)
    torch.testing.assert_close(grad, rows @ vector)
    held = combine_rows(coefficients, size, rows=rows)
    assert torch.equal(held, got)
    assert torch.equal(torch.autograd.grad(held @ vector, coefficients)[0], grad)


def test_gradients_are_right_by_finite_differences():
    coefficients = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: combine_rows(c, 9, seed=2), coefficients)


def test_bfloat16_rounds_the_rows_and_the_sum_but_nothing_between():
    coefficients = torch.linspace(-1, 1, 300).bfloat16()
    rows = random_rows(4, 0, 300, 50).bfloat16()
    got = combine_rows(coefficients, 50, seed=4)
    assert got.dtype == torch.bfloat16
    want = (coefficients.double() @ rows.double()).bfloat16()
    assert float((got.double() - want.double()).abs().max()) <= 2**-8 * float(want.abs().max())
    assert torch.equal(got, combine_rows(coefficients, 50, rows=rows))


def test_autograd_keeps_nothing_and_autocast_changes_nothing():
    coefficients = torch.randn(20).requires_grad_()
    assert kept_tensors(lambda: combine_rows(coefficients, 30, seed=1)) == []
    want = combine_rows(coefficients, 30, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = combine_rows(coefficients, 30, seed=1)
        (grad,) = torch.autograd.grad(got.sum(), coefficients)
    assert torch.equal(got, want)
    assert torch.equal(grad, torch.autograd.grad(want.sum(), coefficients)[0])


def test_shapes_on_meta():
    coefficients = torch.ones(4, device="meta").requires_grad_()
    out = combine_rows(coefficients, 6, seed=0)
    assert out.shape == (6,)
    assert random_rows(0, 1, 4, 5, device="meta").shape == (3, 5)
    out.sum().backward()
    assert coefficients.grad.shape == (4,)
