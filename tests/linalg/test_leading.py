"""One-sided singular vectors: exact ones against the SVD, sketched ones by the energy that they hold."""

import pytest
import torch

from lowdim.linalg import has_numbers, leading_vectors, stream, svd


def decaying(m=120, n=90, seed=0, noise=0.1):
    """Singular values 1/i in random directions, and noise."""
    draw = stream(seed, "leading")
    left = torch.linalg.qr(torch.randn(m, 40, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, 40, generator=draw, dtype=torch.float64)).Q
    signal = (left / torch.arange(1, 41)) @ right.T
    rest = torch.randn(m, n, generator=draw, dtype=torch.float64)
    return signal + rest * (noise * signal.norm() / rest.norm())


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
def test_exact(shape):
    a = torch.randn(shape, generator=stream(1), dtype=torch.float64)
    u, s, _ = svd(a)
    basis, energy = leading_vectors(a, 5)
    assert torch.allclose(basis, u[:, :5], atol=1e-12)
    assert float(energy) == pytest.approx(float(s[:5].square().sum() / s.square().sum()))


@pytest.mark.parametrize("warm", ["cold", "same", "unrelated", "orthogonal", "narrow"])
def test_sketch_holds_nearly_all_the_energy(warm):
    """Even where the old basis is orthogonal to everything that matters now."""
    a = decaying()
    exact, best = leading_vectors(a, 10, method="exact")
    start = {
        "cold": None,
        "same": exact,
        "unrelated": leading_vectors(decaying(seed=5), 10, method="exact")[0],
        "orthogonal": torch.linalg.qr(torch.cat([exact, torch.randn(120, 40, generator=stream(9), dtype=a.dtype)], 1)).Q[
            :, -10:
        ],
        "narrow": exact[:, :3],
    }[warm]
    basis, energy = leading_vectors(a, 10, method="randomized", start=start, generator=stream(2))
    assert basis.shape == (120, 10)
    assert torch.allclose(basis.mT @ basis, torch.eye(10, dtype=a.dtype), atol=1e-10)
    assert float(energy) == pytest.approx(float((basis.mT @ a).square().sum() / a.square().sum()), rel=1e-9)
    assert 0.99 * float(best) <= float(energy) <= float(best) * (1 + 1e-12)
    # the leading directions are found one by one, not only as a span
    assert float((basis[:, :3] - exact[:, :3]).abs().max()) < 0.05


def test_start_whose_image_is_zero():
    """Aᵀ start = 0: without the mixed-in noise nothing would ever be found again."""
    a = torch.zeros(40, 30)
    a[:5] = torch.randn(5, 30, generator=stream(0))
    start = torch.eye(40)[:, 20:25]
    _, energy = leading_vectors(a, 5, method="randomized", start=start, generator=stream(1))
    assert float(energy) > 0.999


def test_same_seed_same_bits():
    a = decaying().float()
    one, two = (leading_vectors(a, 8, method="randomized", generator=stream(3))[0] for _ in range(2))
    assert torch.equal(one, two)


def test_auto_uses_the_sketch_for_large_matrices_only():
    """A tall matrix with short side 512 is exact; beyond it the sketch differs in the last bits at least."""
    for size, same in ((64, True), (600, False)):
        a = torch.randn(size, size, generator=stream(4))
        auto = leading_vectors(a, 2, generator=stream(5))[0]
        exact = leading_vectors(a, 2, method="exact")[0]
        assert torch.equal(auto, exact) == same


def test_zero_matrix_and_full_rank():
    for method in ("exact", "randomized"):
        basis, energy = leading_vectors(torch.zeros(6, 4), 2, method=method)
        assert bool(basis.isfinite().all())
        assert float(energy) == 1.0
        basis, energy = leading_vectors(torch.eye(4), 4, method=method)
        assert float(energy) == pytest.approx(1.0)


def test_errors():
    with pytest.raises(ValueError, match="rank"):
        leading_vectors(torch.ones(3, 4), 4)
    with pytest.raises(ValueError, match="method"):
        leading_vectors(torch.ones(3, 4), 2, method="lanczos")
    with pytest.raises(ValueError, match="two dimensions"):
        leading_vectors(torch.ones(3), 1)


def test_has_numbers():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert has_numbers(torch.ones(1))
    assert not has_numbers(torch.ones(1, device="meta"))
    with FakeTensorMode():
        assert not has_numbers(torch.ones(1))


@pytest.mark.parametrize("warm", [False, True])
def test_many_directions_are_left_as_they_are_found(warm, monkeypatch):
    """Above a bound the basis spans the leading subspace and is not turned onto the singular vectors."""
    from lowdim.linalg import leading

    monkeypatch.setattr(leading, "_UNTURNED", 8)
    draw = stream(0, "many")
    left, right = (torch.linalg.qr(torch.randn(90, 60, generator=draw, dtype=torch.float64)).Q for _ in range(2))
    matrix = (left * 0.8 ** torch.arange(60)) @ right.mT
    start = leading_vectors(matrix, 12, method="exact")[0] if warm else None
    basis, energy = leading_vectors(matrix, 12, method="randomized", start=start, generator=stream(1, "many"))
    exact, most = leading_vectors(matrix, 12, method="exact")
    assert torch.allclose(basis.mT @ basis, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    assert float(energy) == pytest.approx(float((basis.mT @ matrix).square().sum() / matrix.square().sum()))
    assert float(energy) >= 0.999 * float(most)
    assert float((exact.mT @ basis).square().sum()) / 12 > 0.9
    again = leading_vectors(matrix, 12, method="randomized", start=start, generator=stream(1, "many"))[0]
    assert torch.equal(basis, again)
