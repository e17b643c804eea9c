"""LR2VQ's clustering: k-means, differentiable k-means, and the errors that a dimension costs."""

import pytest
import torch

import vectors
from lowdim.compress import dkm, estimate_clustering_dim, lowrank_subvectors, vq_bytes
from lowdim.compress.lr2vq import clustering
from lowdim.linalg import stream


def test_reference_dkm():
    v = vectors.load("lr2vq", "dkm")
    z = v["z"].clone().requires_grad_()
    how = {name: v.hyperparameters[name] for name in ("temperature", "iterations", "tolerance")}
    soft, codebook, attention = dkm(z, v["codebook"], **how)
    v.close(soft, "z_soft")
    v.close(codebook, "codebook_out")
    v.close(attention, "attention")
    soft.square().sum().backward()
    v.close(z.grad, "grad_z")


def points(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=stream(seed, "points"))


def inertia(z, codebook, codes):
    return float((z - codebook[codes]).square().sum())


def test_k_means_ends_where_nothing_moves():
    z = points(300, 2)
    codebook, codes = clustering.cluster(z, 8, stream(0, "test"))
    assert torch.equal(codes, torch.cdist(z, codebook).argmin(1))
    again = torch.stack([z[codes == j].mean(0) for j in range(8)])
    assert float((again - codebook).abs().max()) < 0.05
    assert inertia(z, codebook, codes) < 0.35 * float((z - z.mean(0)).square().sum())


def test_k_means_is_as_good_as_another_program():
    cluster = pytest.importorskip("sklearn.cluster")
    z = points(500, 3)
    want = cluster.KMeans(16, n_init=1, max_iter=25, random_state=0).fit(z.numpy()).inertia_
    got = min(inertia(z, *clustering.cluster(z, 16, stream(seed, "test"))) for seed in range(3))
    assert got < 1.05 * want


@pytest.mark.parametrize("k", [5, 6, 40])
def test_distinct_points_are_never_missed(k):
    z = points(5, 3).repeat(20, 1)
    for seed in range(10):
        codebook, codes = clustering.cluster(z, k, stream(seed, "test"))
        assert len(codebook) == k
        torch.testing.assert_close(codebook[codes], z, rtol=1e-12, atol=1e-12)


def test_no_more_codewords_than_points():
    codebook, codes = clustering.cluster(points(7, 2), 100, stream(0, "test"))
    assert codebook.shape == (7, 2)
    assert sorted(codes.tolist()) == list(range(7))


def test_a_large_set_starts_from_a_sample(monkeypatch):
    z = points(4000, 2)
    whole = inertia(z, *clustering.cluster(z, 4, stream(0, "test")))
    monkeypatch.setattr(clustering, "_POINTS", 50)
    monkeypatch.setattr(clustering, "_FULL", 600)
    codebook, codes = clustering.cluster(z, 4, stream(0, "test"))
    assert torch.equal(codes, torch.cdist(z, codebook).argmin(1))
    assert inertia(z, codebook, codes) < 1.02 * whole


def test_layers_of_ordinary_size_use_all_their_points():
    """2000 for each of two centres, and it ends where each is the mean of its own: a sample does not get there in two steps."""
    for seed in range(3):
        z = points(4000, 1, seed=seed)
        codebook, codes = clustering.cluster(z, 2, stream(seed, "test"))
        torch.testing.assert_close(codebook, torch.stack([z[codes == j].mean(0) for j in range(2)]), rtol=1e-12, atol=1e-12)


def test_nearest_in_blocks(monkeypatch):
    z, codebook = points(50, 3), points(7, 3, seed=1)
    want = torch.cdist(z, codebook).min(1)
    for entries in (1, 30, 2**18):
        monkeypatch.setattr(clustering, "_ENTRIES", entries)
        assert torch.equal(clustering.nearest_codes(z, codebook), want.indices)
    assert clustering.nearest_distance(z, codebook) == pytest.approx(float(want.values.mean()), rel=1e-12)


def test_an_empty_cluster_keeps_its_centre():
    z, codebook = points(6, 2), torch.tensor([[0.0, 0.0], [9.0, 9.0]], dtype=torch.float64)
    moved = clustering._means(z, torch.zeros(6, dtype=torch.long), codebook)
    torch.testing.assert_close(moved[0], z.mean(0))
    assert torch.equal(moved[1], codebook[1])


def test_errors_of_a_dimension():
    W = points(24, 16) * torch.logspace(0, -1, 8, dtype=torch.float64).repeat(2)
    rows = estimate_clustering_dim(W, codebook_size=8, subvector_size=8)
    assert [row["clustering_dim"] for row in rows] == list(range(1, 9))
    energy = torch.linalg.eigvalsh(W.view(-1, 8).T @ W.view(-1, 8)).flip(0)
    for row in rows:
        d = row["clustering_dim"]
        assert row["approximation_error"] == pytest.approx(float(energy[d:].sum() / energy.sum()), abs=1e-12)
        z, _ = lowrank_subvectors(W, 8, d)
        best = min(inertia(z, *clustering.cluster(z, 8, stream(seed, "other"))) for seed in range(5))
        assert 0.9 * best < row["clustering_error"] * float(W.square().sum()) < 1.3 * best
    falls, rises = ([row[name] for row in rows] for name in ("approximation_error", "clustering_error"))
    assert falls == sorted(falls, reverse=True)
    assert falls[-1] == 0
    assert rises[0] < 0.3 * rises[-1]


def test_dkm_stops_when_nothing_moves():
    z, codebook = points(40, 2), points(3, 2, seed=1)
    steps = [dkm(z, codebook, temperature=0.3, iterations=i, tolerance=0.0)[1] for i in (1, 2, 3)]
    change = float((steps[1] - steps[0]).abs().max())
    got = dkm(z, codebook, temperature=0.3, iterations=3, tolerance=change * 1.001)[1]
    assert torch.equal(got, steps[1])
    assert not torch.equal(steps[2], steps[1])


def test_dkm_at_low_temperature_is_k_means():
    z, codebook = points(40, 2), points(3, 2, seed=1)
    soft, moved, attention = dkm(z, codebook, temperature=1e-4, iterations=1, tolerance=0.0)
    codes = torch.cdist(z, codebook).argmin(1)
    torch.testing.assert_close(moved, torch.stack([z[codes == j].mean(0) for j in range(3)]))
    torch.testing.assert_close(soft, moved[torch.cdist(z, moved).argmin(1)])
    torch.testing.assert_close(attention.sum(1), torch.ones(40, dtype=torch.float64))


def test_a_centre_without_attention_keeps_its_place():
    z = points(5, 2).requires_grad_()
    far = torch.tensor([[0.0, 0.0], [1e6, 1e6]], dtype=torch.float64)
    soft, moved, _ = dkm(z, far, temperature=0.1)
    assert torch.equal(moved[1], far[1])
    assert bool(torch.isfinite(torch.autograd.grad(soft.sum(), z)[0]).all())


def test_a_point_on_its_centre_has_a_gradient():
    z = points(4, 2).requires_grad_()
    soft, _, _ = dkm(z, z.detach().clone(), temperature=0.5)
    assert bool(torch.isfinite(torch.autograd.grad(soft.square().sum(), z)[0]).all())


def test_wrong_points():
    z = points(4, 2)
    with pytest.raises(ValueError, match=r"z must be \(n, d\) and codebook \(k, d\); got \(4, 2\) and \(3, 1\)"):
        dkm(z, points(3, 1), temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature must be a finite number in \(0, inf\]; got 0"):
        dkm(z, z, temperature=0)
    with pytest.raises(ValueError, match="iterations must be an int >= 1"):
        dkm(z, z, temperature=1.0, iterations=0)
    with pytest.raises(ValueError, match=r"dims must be an int in \[1, 2\]; got 3"):
        estimate_clustering_dim(torch.ones(2, 4), codebook_size=2, subvector_size=2, dims=[3])
    with pytest.raises(ValueError, match="subvector_size must divide numel=10; got 4"):
        vq_bytes(10, 4, 4, 2)
