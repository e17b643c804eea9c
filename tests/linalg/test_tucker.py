"""Tucker decomposition against exact multilinear ranks, and against HOSVD alone."""

import pytest
import torch

from lowdim.linalg import mode_products, stream, svd, tucker, unfold


def orthonormal(rows, columns, draw):
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q


def low_rank_tensor(shape=(6, 5, 4, 3), ranks=(3, 2, 2, 2), seed=0):
    draw = stream(seed, "tucker")
    factors = [orthonormal(d, r, draw) for d, r in zip(shape, ranks)]
    core = torch.randn(ranks, generator=draw, dtype=torch.float64)
    return mode_products(core, factors, transpose=False), factors


def test_mode_products_are_einsum():
    draw = stream(0)
    t = torch.randn(2, 3, 4, generator=draw)
    a, b, c = (torch.randn(d, 2, generator=draw) for d in (2, 3, 4))
    assert torch.allclose(mode_products(t, [a, b, c]), torch.einsum("ijk,ia,jb,kc->abc", t, a, b, c), atol=1e-5)
    assert torch.allclose(mode_products(t, [a, b, c], skip=1), torch.einsum("ijk,ia,kc->ajc", t, a, c), atol=1e-5)
    small = torch.randn(2, 2, 2, generator=draw)
    assert torch.allclose(
        mode_products(small, [a, b, c], transpose=False), torch.einsum("abc,ia,jb,kc->ijk", small, a, b, c), atol=1e-5
    )


def test_unfold():
    t = torch.arange(24).view(2, 3, 4)
    assert torch.equal(unfold(t, 1)[2], t[:, 2].flatten())


def test_exact_multilinear_rank_is_recovered():
    t, true = low_rank_tensor()
    core, factors = tucker(t, (3, 2, 2, 2))
    assert core.shape == (3, 2, 2, 2)
    assert torch.allclose(mode_products(core, factors, transpose=False), t, atol=1e-10)
    for got, want in zip(factors, true, strict=True):
        assert torch.allclose(got @ got.mT, want @ want.mT, atol=1e-10)
        pivots = got.gather(0, got.abs().argmax(0, keepdim=True))
        assert bool((pivots > 0).all())


def test_sweeps_do_not_lose_against_hosvd():
    draw = stream(1)
    t = torch.randn(7, 6, 5, generator=draw, dtype=torch.float64)
    ranks = (2, 3, 2)
    higher = [svd(unfold(t, i))[0][:, :r] for i, r in enumerate(ranks)]
    core, factors = tucker(t, ranks)
    assert float(core.norm()) > float(mode_products(t, higher).norm()) + 1e-3
    for f in factors:
        assert torch.allclose(f.mT @ f, torch.eye(f.shape[1], dtype=f.dtype), atol=1e-10)


def test_a_matrix_gives_its_singular_vectors():
    t = torch.randn(6, 4, generator=stream(2), dtype=torch.float64)
    u, s, vh = svd(t)
    core, (left, right) = tucker(t, (2, 2), tolerance=0.0)
    assert torch.allclose(left @ left.mT, u[:, :2] @ u[:, :2].mT, atol=1e-8)
    assert torch.allclose(right @ right.mT, vh[:2].mT @ vh[:2], atol=1e-8)
    assert float(core.norm()) == pytest.approx(float(s[:2].norm()))


def test_a_rank_above_what_the_other_modes_leave():
    """Ranks (4, 1, 1): once two modes are cut to one column each, one direction is left; the factor is filled up."""
    t = torch.randn(4, 3, 3, generator=stream(3), dtype=torch.float64)
    core, factors = tucker(t, (4, 1, 1))
    assert core.shape == (4, 1, 1)
    assert torch.allclose(factors[0].mT @ factors[0], torch.eye(4, dtype=t.dtype), atol=1e-10)


def test_half_precision_is_decomposed_in_float32():
    t, _ = low_rank_tensor()
    core, factors = tucker(t.bfloat16(), (3, 2, 2, 2))
    assert core.dtype == factors[0].dtype == torch.float32
    assert float((mode_products(core, factors, transpose=False) - t).norm() / t.norm()) < 0.01


def test_zero_tensor():
    core, factors = tucker(torch.zeros(3, 3, 3), (2, 2, 2))
    assert torch.equal(core, torch.zeros(2, 2, 2))
    assert all(bool(f.isfinite().all()) for f in factors)


def test_errors():
    with pytest.raises(ValueError, match="one entry per mode"):
        tucker(torch.ones(2, 2, 2), (1, 1))
    with pytest.raises(ValueError, match=r"ranks\[1\]"):
        tucker(torch.ones(2, 2, 2), (1, 3, 1))
