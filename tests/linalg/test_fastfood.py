import pytest
import torch

import vectors
from lowdim.linalg import (
    FastfoodDraws,
    fastfood,
    fastfood_draws,
    fastfood_size,
    fastfood_transpose,
    hadamard_transform,
)
from lowdim.plan.kept import kept_tensors


def hadamard(bits):
    index = range(1 << bits)
    return torch.tensor([[(-1.0) ** (a & b).bit_count() for b in index] for a in index], dtype=torch.float64)


def draws(out_dim, seed=0, dtype=torch.float64):
    return fastfood_draws(out_dim, torch.Generator().manual_seed(seed), dtype)


def dense(found, out_dim, in_dim):
    """The matrix by its definition."""
    length = len(found)
    H = hadamard(length.bit_length() - 1)
    mixed = found.gaussian.double()[:, None] * (H * found.signs)[found.permutation.long()]
    return (H @ mixed)[:out_dim, :in_dim] / (out_dim * found.gaussian.double().square().sum()).sqrt()


@pytest.mark.parametrize("name", ["fastfood", "fastfood_full", "fastfood_tall"])
def test_vectors(name):
    case = vectors.load("intrinsic-dimension", name)
    how = case.hyperparameters
    given = FastfoodDraws(case["signs"], case["permutation"], case["gaussian"])
    assert fastfood_size(how["out_dim"]) == how["padded"] == len(given)
    theta = case["theta"].requires_grad_()
    out = fastfood(theta, how["out_dim"], given)
    case.close(out, "out")
    (grad,) = torch.autograd.grad(out, theta, case["grad_out"])
    case.close(grad, "grad_theta")
    case.close(fastfood_transpose(case["grad_out"], how["in_dim"], given), "grad_theta")
    eye = torch.eye(how["in_dim"], dtype=torch.float64)
    matrix = torch.stack([fastfood(row, how["out_dim"], given) for row in eye], 1)
    case.close(matrix[: len(case["matrix"])], "matrix")
    case.close(hadamard_transform(case["hadamard_in"]), "hadamard_out")


@pytest.mark.parametrize("bits", range(9))
def test_hadamard_is_its_matrix_and_its_own_gradient(bits):
    x = torch.randn(2, 3, 1 << bits, dtype=torch.float64, requires_grad=True)
    want = x @ hadamard(bits)
    torch.testing.assert_close(hadamard_transform(x), want, rtol=1e-12, atol=1e-11)
    g = torch.randn_like(x)
    (grad,) = torch.autograd.grad(hadamard_transform(x), x, g)
    torch.testing.assert_close(grad, g @ hadamard(bits), rtol=1e-12, atol=1e-11)


def test_hadamard_of_many_bits():
    x = torch.randn(1 << 15)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)) / (1 << 15), x, rtol=1e-4, atol=1e-5)
    delta = torch.zeros(1 << 15).index_fill(0, torch.tensor([0b101_0000_0000_0001]), 1.0)
    got = hadamard_transform(delta)
    assert [float(got[i]) for i in (0, 1, 0b100_0000_0000_0000, 0b101_0000_0000_0000, 2)] == [1, -1, -1, 1, 1]


@pytest.mark.parametrize(("out_dim", "in_dim"), [(1, 1), (2, 1), (3, 4), (16, 16), (17, 3), (100, 33), (129, 1)])
def test_it_is_the_matrix_and_its_transpose(out_dim, in_dim):
    found = draws(out_dim)
    P = dense(found, out_dim, in_dim)
    theta = torch.randn(in_dim, dtype=torch.float64, requires_grad=True)
    g = torch.randn(out_dim, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(fastfood(theta, out_dim, found), P @ theta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fastfood_transpose(g, in_dim, found), P.T @ g, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: fastfood(t, out_dim, found), theta)
    assert torch.autograd.gradgradcheck(lambda t: fastfood(t, out_dim, found).square(), theta)
    assert torch.autograd.gradcheck(lambda v: fastfood_transpose(v, in_dim, found), g)


def test_columns_have_unit_length_and_are_nearly_orthogonal():
    found = draws(5000, dtype=torch.float32)
    P = torch.stack([fastfood(row, 5000, found) for row in torch.eye(20)], 1)
    assert float((P.norm(dim=0) - 1).abs().max()) < 0.05
    assert float((P.T @ P - torch.eye(20)).abs().max()) < 0.1


def test_same_seed_same_draws_in_the_order_signs_permutation_gaussian():
    one, two, other = draws(33), draws(33), draws(33, seed=1)
    for key in ("signs", "permutation", "gaussian"):
        assert torch.equal(getattr(one, key), getattr(two, key))
        assert not torch.equal(getattr(one, key), getattr(other, key))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(torch.randint(0, 2, (64,), dtype=torch.int8, generator=generator) * 2 - 1, one.signs)
    assert torch.equal(torch.randperm(64, generator=generator), one.permutation)
    assert torch.equal(torch.randn(64, dtype=torch.float64, generator=generator), one.gaussian)


def test_compact_draws_give_the_same():
    found = draws(1000, dtype=torch.float32)
    small = FastfoodDraws(found.signs.to(torch.int8), found.permutation.int(), found.gaussian)
    theta = torch.randn(70)
    assert torch.equal(fastfood(theta, 1000, small), fastfood(theta, 1000, found))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_low_precision(dtype, tolerance):
    found = draws(3000)
    theta = torch.randn(50).to(dtype)
    got, want = fastfood(theta, 3000, found), fastfood(theta.double(), 3000, found)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())
    g = torch.randn(3000).to(dtype)
    got, want = fastfood_transpose(g, 50, found), fastfood_transpose(g.double(), 50, found)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


def test_autocast_leaves_it_alone():
    found = draws(3000, dtype=torch.float32)
    theta = torch.randn(50, requires_grad=True)
    want = fastfood(theta, 3000, found)
    with torch.autocast("cpu", torch.bfloat16):
        got = fastfood(theta, 3000, found)
    assert torch.equal(got, want)


def test_nothing_long_is_kept_for_the_backward_pass():
    found = draws(5000, dtype=torch.float32)
    theta = torch.randn(50, requires_grad=True)
    assert kept_tensors(lambda: fastfood(2 * theta, 5000, found)) == []


def test_compiled():
    found = draws(300, dtype=torch.float64)
    theta = torch.randn(20, dtype=torch.float64, requires_grad=True)
    run = lambda t: fastfood(t * 2, 300, found).square().sum()  # noqa: E731
    (want,) = torch.autograd.grad(run(theta), theta)
    (got,) = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(theta), theta)
    torch.testing.assert_close(got, want)


def test_bad_input():
    found = draws(13)
    with pytest.raises(ValueError, match="theta must have between 1 and 16"):
        fastfood(torch.randn(17), 13, found)
    with pytest.raises(ValueError, match="must have length 32; got 16"):
        fastfood(torch.randn(3), 17, found)
    with pytest.raises(ValueError, match="vector of floating"):
        fastfood(torch.ones(3, dtype=torch.int64), 13, found)
    with pytest.raises(ValueError, match="in_dim"):
        fastfood_transpose(torch.randn(13), 17, found)
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="out_dim"):
            fastfood_size(bad)
    for shape in ((), (3,), (4, 0)):
        with pytest.raises(ValueError, match="power of two"):
            hadamard_transform(torch.ones(shape))
    with pytest.raises(ValueError, match="power of two"):
        FastfoodDraws(torch.ones(3), torch.arange(3), torch.ones(3))
    with pytest.raises(ValueError, match="one length"):
        FastfoodDraws(torch.ones(4), torch.arange(8), torch.ones(4))
    with pytest.raises(ValueError, match="permutation must be int64"):
        FastfoodDraws(torch.ones(4), torch.ones(4), torch.ones(4))
