"""MLC as a clusterer and transformer: its training written out, labels, memberships, and scikit-learn's checks."""

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch.nn.functional import normalize

from lowdim.represent import ManifoldLinearizingClustering, MLCLoss, TotalCodingRateLoss, membership
from lowdim.represent.mlc import clustering
from lowdim.testing.estimator_case import EstimatorCase


def blobs(n=36, noise=1.0):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    return 3 * np.kron(np.eye(3), np.ones((1, 2)))[y] + noise * rng.normal(size=(n, 6)), y


class TestManifoldLinearizingClustering(EstimatorCase):
    output = "transform"
    random = True

    def estimator(self, **changes):
        options = {"n_clusters": 3, "n_components": 4, "hidden": 8, "epochs": 2, "warmup_epochs": 1, "random_state": 0}
        return ManifoldLinearizingClustering(**{**options, **changes})

    def data(self):
        return blobs()

    def expected(self, X, y):
        """Standardise, then the learned layers one by one; BatchNorm with its running numbers."""
        net = self.estimator().fit(X, y).network_.double()
        first, norm, _, second, _ = net.backbone
        x = torch.from_numpy((X - X.mean(0)) / X.std(0))
        h = (x @ first.weight.T + first.bias - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        Z = h.clamp_min(0) @ second.weight.T + second.bias
        Z = Z.clamp_min(0) @ net.feature.weight.T + net.feature.bias
        return (Z / Z.norm(dim=1, keepdim=True)).detach().numpy()

    def grid(self):
        return {"n_components": [2, 4]}

    def refusals(self):
        X, _ = self.data()
        return [
            (ValueError, "'n_clusters'", lambda: self.estimator(n_clusters=0).fit(X)),
            (ValueError, "n_samples = 36", lambda: self.estimator(n_clusters=37).fit(X)),
            (ValueError, "'eta'", lambda: self.estimator(eta=0.0).fit(X)),
            (ValueError, "'eps_sq'", lambda: self.estimator(eps_sq=-1.0).fit(X)),
            (ValueError, "'kernel'", lambda: self.estimator(kernel="rbf").fit(X)),
            (ValueError, "'batch_size'", lambda: self.estimator(batch_size=1).fit(X)),
            (ValueError, "infinity", lambda: self.estimator().fit(np.where(X.max() == X, np.inf, X))),
            (ValueError, "smaller lr", lambda: self.estimator(lr=1e30, epochs=4).fit(X)),
        ]


@pytest.mark.parametrize("augmented", [False, True])
def test_the_training_is_sgd_on_the_two_losses(augmented):
    """One batch an epoch; its order does not matter. Momentum, weight decay and the copy of the head by hand."""
    X, _ = blobs()
    options = {"n_components": 3, "hidden": 5, "warmup_epochs": 2, "epochs": 2, "lr": 0.05, "lr_cluster": 0.02}
    options |= {"augment": (lambda batch, generator: 1.5 * batch) if augmented else None, "alignment": 0.01}
    start = ManifoldLinearizingClustering(3, **{**options, "lr": 1e-12, "lr_cluster": 1e-12, "random_state": 0}).fit(X).network_
    fitted = ManifoldLinearizingClustering(3, **options, random_state=0).fit(X)

    net, scale = start.double().train(), 1.5 if augmented else 1.0
    x = scale * torch.from_numpy((X - X.mean(0)) / X.std(0))
    features = [*net.backbone.parameters(), *net.feature.parameters()]
    cluster = [*net.cluster.parameters()]

    def steps(count, loss, groups):
        moving = {p: torch.zeros_like(p) for parameters, _, _ in groups for p in parameters}
        for _ in range(count):
            grads = dict(zip(moving, torch.autograd.grad(loss(), list(moving))))
            with torch.no_grad():
                for parameters, lr, decay in groups:
                    for p in parameters:
                        moving[p].mul_(0.9).add_(grads[p] + decay * p)
                        p -= lr * moving[p]

    def spread():
        Z = net(x)[0]
        return TotalCodingRateLoss(0.1, 0.01)(Z, Z if augmented else None)

    steps(2, spread, [(features, 0.05, 1e-4)])
    net.cluster.load_state_dict(net.feature.state_dict())
    steps(
        2,
        lambda: MLCLoss(0.1, membership_penalty=0.05)(net(x)[0], membership(net(x)[1], 0.175)),
        [(features, 0.05, 1e-4), (cluster, 0.02, 5e-3)],
    )
    for got, want in zip(fitted.network_.parameters(), net.parameters()):
        assert torch.allclose(got.double(), want, atol=2e-4)


def test_labels_are_those_of_the_memberships_of_all_samples():
    X, y = blobs(noise=0.3)
    fitted = ManifoldLinearizingClustering(3, n_components=4, hidden=16, random_state=0, lr=0.03, lr_cluster=0.02).fit(X)
    gamma = fitted.membership(X)
    assert np.abs(gamma.sum(0) - 1).max() < 1e-8
    assert np.abs(gamma.sum(1) - 1).max() < 1e-8
    net = fitted.network_.double()
    C = net(torch.from_numpy((X - X.mean(0)) / X.std(0)))[1].detach()
    want = membership(C, iterations=10_000, tol=1e-9)
    assert np.allclose(gamma, want, atol=1e-9)
    peer = SpectralClustering(3, affinity="precomputed", random_state=0).fit_predict((gamma + gamma.T) / 2)
    assert len({(a, b) for a, b in zip(fitted.labels_, peer)}) == 3, "the same groups"
    assert len({(a, b) for a, b in zip(fitted.labels_, y)}) == 3
    assert np.allclose(np.linalg.norm(fitted.transform(X), axis=1), 1)


@pytest.mark.parametrize("count", [24, 60])
def test_labels_are_scikit_learns_for_few_samples_and_for_many(count):
    """Few: all eigenvectors. Many: the leading ones. The same numbers for the same clusters, from the same seed."""
    X, _ = blobs(count)
    fitted = ManifoldLinearizingClustering(3, n_components=4, hidden=16, epochs=3, random_state=0).fit(X)
    gamma = fitted.membership(X)
    seed = clustering.seed_from(0)
    peer = SpectralClustering(3, affinity="precomputed", random_state=seed).fit_predict((gamma + gamma.T) / 2)
    assert np.array_equal(fitted.labels_, peer)


def test_a_constant_column_is_not_blown_up():
    """The deviation of a column of 0.1 comes out as 1e-17 or so; its scale is 1."""
    X, _ = blobs()
    X = np.c_[X, np.full(len(X), 0.1)]
    assert X[:, -1].std() > 0
    fitted = ManifoldLinearizingClustering(3, n_components=4, hidden=8, epochs=1, warmup_epochs=1, random_state=0).fit(X)
    moved = X + 1e-6 * (np.arange(7) == 6)
    assert np.allclose(fitted.transform(moved), fitted.transform(X), atol=1e-4)


def test_a_network_that_gives_nan_has_no_memberships():
    """Sinkhorn would never end on them."""
    X, _ = blobs()
    fitted = ManifoldLinearizingClustering(3, n_components=4, hidden=8, epochs=1, warmup_epochs=1, random_state=0).fit(X)
    torch.nn.init.constant_(fitted.network_.cluster.bias, torch.nan)
    with pytest.raises(ValueError, match="outputs are not finite"):
        fitted.membership(X)


def test_before_a_classifier_in_a_search():
    X, y = blobs(noise=0.3)
    mlc = ManifoldLinearizingClustering(3, hidden=16, epochs=4, warmup_epochs=2, random_state=0)
    search = GridSearchCV(
        make_pipeline(mlc, LogisticRegression()), {"manifoldlinearizingclustering__n_components": [3, 6]}, cv=2
    ).fit(X, y)
    assert search.score(X, y) > 0.9


def test_augmentations_are_drawn_from_the_seed():
    X, _ = blobs()

    def noisy(batch, generator):
        return batch + 0.1 * torch.randn(batch.shape, generator=generator)

    options = {"n_components": 3, "hidden": 4, "epochs": 1, "warmup_epochs": 1, "augment": noisy, "alignment": 0.01}
    one, same, other = (
        ManifoldLinearizingClustering(3, **options, random_state=seed).fit(X).transform(X) for seed in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_edges():
    X, _ = blobs()
    X[:, 2] = 7.0  # a column that is constant
    small = {"n_components": 3, "hidden": 4, "epochs": 1, "warmup_epochs": 0, "random_state": 0}
    fitted = ManifoldLinearizingClustering(1, batch_size=35, **small).fit(X)  # a last batch of one is left out
    assert not fitted.labels_.any()
    assert np.isfinite(fitted.transform(X)).all()
    assert (normalize(torch.from_numpy(fitted.transform(X))) - torch.from_numpy(fitted.transform(X))).abs().max() < 1e-12


def test_many_rows_are_announced_before_they_are_held(monkeypatch):
    monkeypatch.setattr(clustering, "_MANY", 35)
    X, _ = blobs()
    with pytest.warns(UserWarning, match="memberships of 36 samples"):
        ManifoldLinearizingClustering(3, n_components=3, hidden=4, epochs=1, warmup_epochs=0, random_state=0).fit(X)
