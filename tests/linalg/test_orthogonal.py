import pytest
import torch

import vectors
from lowdim.linalg import cayley, cayley_inverse, cayley_signs, householder_product, householder_vectors


def orthogonal(*shape, seed=0):
    q, r = torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def test_reference():
    v = vectors.load("matryoshka-kv", "cayley")
    v.close(cayley(v["raw"]), "Q_again")
    v.close(cayley(v["raw"]), "Q")
    v.close(cayley_inverse(v["Q"]), "raw")
    v.close(cayley(v["raw_free"]), "Q_free")
    v.close(cayley(cayley_inverse(v["Q_free"])), "Q_free")


def test_two_dimensions_by_hand():
    t = torch.tensor([0.3, -2.0, 40.0], dtype=torch.float64)
    raw = torch.zeros(3, 2, 2, dtype=torch.float64)
    raw[:, 1, 0] = t  # the angle φ of the rotation has tan(φ / 2) = t / 2
    cos, sin = (4 - t**2) / (4 + t**2), 4 * t / (4 + t**2)
    want = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    torch.testing.assert_close(cayley(raw), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_are_widened_inside(dtype):
    raw = (3 * torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))).to(dtype)
    torch.testing.assert_close(cayley(raw), cayley(raw.double()).to(dtype), rtol=0, atol=0)


def test_gradients():
    raw = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(cayley, raw)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_signs_bring_any_matrix_within_reach(size, seed):
    u = orthogonal(6, size, size, seed=seed)
    u[0] = -torch.eye(size, dtype=torch.float64)
    u[1] = torch.eye(size, dtype=torch.float64)[:, torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
    signs = cayley_signs(u)
    assert set(signs.flatten().tolist()) <= {1.0, -1.0}
    turned = u * signs[:, None]
    eye = torch.eye(size, dtype=torch.float64)
    assert bool((torch.linalg.det(turned + eye) > 1 - 1e-9).all())
    torch.testing.assert_close(cayley(cayley_inverse(turned)), turned, rtol=0, atol=1e-10)


def test_an_eigenvalue_minus_one_is_out_of_reach():
    with pytest.raises(ValueError, match="eigenvalue -1"):
        cayley_inverse(torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        cayley_inverse(torch.stack([torch.eye(3), -torch.eye(3)]))


# Householder reflectors


def one_by_one(v):
    q = torch.eye(len(v), dtype=v.dtype)
    for column in v.T:
        q = q @ (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(column, column) / column.dot(column))
    return q


@pytest.mark.parametrize(("size", "count"), [(1, 1), (3, 1), (6, 6), (40, 40), (70, 65), (5, 9), (4, 0)])
def test_the_product_is_that_of_its_reflectors(size, count):
    """Fewer and more than are applied together, and more than there are dimensions."""
    v = torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = one_by_one(v)
    for columns in {0, 1, size // 2, size, None}:
        wanted = size if columns is None else columns
        torch.testing.assert_close(householder_product(v, columns), q[:, :wanted], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(householder_product(v, columns, transpose=True), q.T[:, :wanted], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transpose", [False, True])
def test_its_gradient(transpose):
    v = torch.randn(37, 34, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    weights = torch.linspace(-1, 2, 37 * 3, dtype=torch.float64).view(37, 3)
    got, want = (
        torch.autograd.grad((q[:, :3] * weights).sum(), v)[0]
        for q in (householder_product(v, 3, transpose=transpose), one_by_one(v).T if transpose else one_by_one(v))
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        (got * v).sum(0), torch.zeros(34, dtype=torch.float64), rtol=0, atol=1e-12
    )  # lengths do not count


def test_it_is_torchs_product_of_reflectors():
    """Whose vectors have an implicit 1 on the diagonal."""
    packed = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = packed.tril(-1) + torch.eye(9, 4, dtype=torch.float64)
    want = torch.linalg.householder_product(packed, 2 / v.square().sum(0))
    torch.testing.assert_close(householder_product(v, 4), want, rtol=1e-12, atol=1e-12)


def test_half_precision_and_lengths_of_all_sizes():
    v = torch.randn(300, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    q = householder_product(v)
    assert q.dtype == torch.float32
    assert float((q.T @ q - torch.eye(300)).abs().max()) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(householder_product(v), q)
    lengths = torch.logspace(-30, 30, 6)
    small = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(householder_product(small * lengths), householder_product(small), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 3), (5, 5), (4, 1), (1, 1), (3, 0)])
def test_vectors_of_given_columns(shape):
    """Random ones; and unit columns, for which LAPACK has no reflector, of either sign."""
    size, rank = shape
    unit = torch.eye(size, rank, dtype=torch.float64) * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])[:rank]
    mixed = torch.eye(size, rank, dtype=torch.float64)
    if rank > 2:  # a column that is a unit vector only once the first reflector has acted
        mixed[:, 1:] = orthogonal(size - 1, rank - 1).new_zeros(size, rank - 1)
        mixed[1:, 1:] = orthogonal(size - 1, rank - 1)
    for q in (orthogonal(*shape) if rank else torch.zeros(shape, dtype=torch.float64), unit, mixed):
        v, signs = householder_vectors(q)
        assert set(signs.tolist()) <= {1.0, -1.0}
        assert torch.equal(v.triu(), torch.eye(*shape, dtype=torch.float64))
        torch.testing.assert_close(householder_product(v, rank) * signs, q, rtol=1e-12, atol=1e-12)


def test_wrong_reflectors():
    v = torch.ones(4, 3)
    for columns in (-1, 5, 2.0):
        with pytest.raises(ValueError, match=r"columns must be an int in \[0, 4\]; got"):
            householder_product(v, columns)
    with pytest.raises(ValueError, match=r"v must have shape \(d, m\).*got \(4,\)"):
        householder_product(v[:, 0])
    for entry, message in ((torch.nan, "column 1 of v has NaN or infinite"), (torch.inf, "column 1 of v has NaN or infinite")):
        bad = v.clone()
        bad[2, 1] = entry
        with pytest.raises(ValueError, match=message):
            householder_product(bad)
    with pytest.raises(ValueError, match="column 2 of v is zero; a reflector needs a direction"):
        householder_product(v * torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"q must have shape \(d, r\) with r <= d; got \(3, 4\)"):
        householder_vectors(v.T)
    with pytest.raises(ValueError, match="q must have orthonormal columns; qᵀ q is up to 4 from the identity"):
        householder_vectors(v)
