"""FCCov-Net as a transformer: its training written out, whitening and rotation, metrics, and scikit-learn's checks."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from test_fccov import by_definition
from torch import nn

from lowdim.represent import FCCovNet
from lowdim.testing.estimator_case import EstimatorCase


def data(n=30):
    X = np.random.default_rng(0).normal(size=(n, 3))
    return X, X[:, 0] ** 2 + 0.1 * X[:, 1]


def distances(y):
    """Between numbers; a function of this module, so that it can be stored."""
    return np.abs(y[:, None] - y)


def turned(U, D):
    """Centred, whitened, and turned to the eigenvectors of M, largest first, by Cholesky and numpy."""
    U = U - U.mean(0)
    white = U @ np.linalg.inv(np.linalg.cholesky(U.T @ U / len(U))).T
    values, vectors = np.linalg.eigh(by_definition(torch.from_numpy(white), torch.from_numpy(D)).numpy())
    return values[::-1], white @ vectors[:, ::-1]


def up_to_sign(got, want):
    return got * np.sign((got * want).sum(0))


class TestFCCovNet(EstimatorCase):
    output = "transform"
    random = True

    def estimator(self, **changes):
        return FCCovNet(**{"epochs": 3, "hidden": (8,), "random_state": 0, **changes})

    def data(self):
        return data()

    def expected(self, X, y):
        fitted = self.estimator().fit(X, y)
        first, _, last = fitted.network_
        hidden = X @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy()
        U = np.maximum(hidden, 0) @ last.weight.detach().double().numpy().T + last.bias.detach().double().numpy()
        return up_to_sign(turned(U, distances(y))[1], fitted.transform(X))

    def grid(self):
        return {"n_components": [1, 2]}

    def refusals(self):
        X, y = self.data()
        D = distances(y)
        precomputed = {"metric": "precomputed"}
        return [
            (ValueError, "'n_components'", lambda: self.estimator(n_components=0).fit(X, y)),
            (ValueError, "'penalty'", lambda: self.estimator(penalty=0.0).fit(X, y)),
            (ValueError, "'metric'", lambda: self.estimator(metric="cosine").fit(X, y)),
            (ValueError, "hidden must be an int >= 1; got 0", lambda: self.estimator(hidden=(8, 0)).fit(X, y)),
            (ValueError, "target y is None", lambda: self.estimator().fit(X)),
            (ValueError, "minimum of 3", lambda: self.estimator().fit(X[:2], y[:2])),
            (ValueError, "distances=", lambda: self.estimator(**precomputed).fit(X[:20], D[:20])),
            (ValueError, "y must be symmetric", lambda: self.estimator(**precomputed).fit(X, D * np.arange(30))),
            (ValueError, "integers in [0, 30)", lambda: self.estimator(**precomputed, distances=D).fit(X, y)),
            (ValueError, "(29, 29)", lambda: self.estimator(metric=lambda y: D[1:, 1:]).fit(X, y)),
            (ValueError, "2 numbers (n_components)", lambda: self.estimator(network=nn.Linear(3, 4)).fit(X, y)),
            (ValueError, "smaller lr", lambda: self.estimator(lr=1e30).fit(X, y)),
        ]


def test_the_training_is_adam_on_the_loss():
    X, y = data()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    before = [p.detach().clone() for p in network.parameters()]
    fitted = FCCovNet(network=network, epochs=4, batch_size=30, lr=0.02, penalty=0.3).fit(X, y)
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before)), "the network given is never trained"

    x, D = torch.from_numpy(X), torch.from_numpy(distances(y))
    means, squares = ([torch.zeros_like(p) for p in before] for _ in range(2))
    for step in range(1, 5):
        U = network(x)
        centred = U - U.mean(0)
        spread = ((centred.T @ centred / 30 - torch.eye(2)) ** 2).sum()
        grads = torch.autograd.grad(0.3 * spread - by_definition(U, D).trace(), list(network.parameters()))
        with torch.no_grad():
            for p, g, m, v in zip(network.parameters(), grads, means, squares):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g**2)
                p -= 0.02 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    values, want = turned(network(x).detach().numpy(), D.numpy())
    got = fitted.transform(X)
    assert np.abs(got - up_to_sign(want, got)).max() < 1e-7
    assert np.allclose(fitted.eigenvalues_, values, rtol=1e-7)
    assert fitted.fccov_ == pytest.approx(values.sum(), rel=1e-7)
    assert np.allclose(got.T @ got / 30, np.eye(2), atol=1e-10)


def test_the_metrics_say_the_same():
    X, y = data()
    D, how = distances(y), {"epochs": 2, "hidden": (4,), "random_state": 0, "batch_size": 16}
    want = FCCovNet(**how).fit(X, y).transform(X)
    shuffled = np.random.default_rng(1).permutation(30)
    named = FCCovNet(metric="precomputed", distances=D[np.ix_(shuffled, shuffled)], **how).fit(X, np.argsort(shuffled))
    for fitted in (
        FCCovNet(metric=distances, **how).fit(X, y),
        FCCovNet(metric="precomputed", **how).fit(X, D),
        FCCovNet(**how).fit(X, np.stack([y, 0 * y], axis=1)),
        named,
    ):
        assert np.allclose(fitted.transform(X), want, atol=1e-9)


def test_it_finds_what_has_no_linear_trend_and_serves_a_search():
    X = np.random.default_rng(2).normal(size=(200, 4))
    y = X[:, 0] ** 2
    search = GridSearchCV(
        make_pipeline(FCCovNet(hidden=(32,), epochs=30, lr=0.03, random_state=0), KNeighborsRegressor(10)),
        {"fccovnet__n_components": [1, 2]},
        cv=2,
        error_score="raise",
    ).fit(X, y)
    assert search.score(X, y) > 0.7 > 0.2 > LinearRegression().fit(X, y).score(X, y)
    rows = GridSearchCV(
        FCCovNet(metric="precomputed", distances=distances(y), epochs=1, hidden=(4,), random_state=0),
        {"n_components": [1, 2]},
        cv=2,
        error_score="raise",
        scoring=lambda fitted, X, y: fitted.fccov_,
    ).fit(X, np.arange(200))
    assert rows.best_estimator_.n_features_in_ == 4


def test_images_go_through_a_network_of_ones_own():
    images = np.random.default_rng(3).normal(size=(24, 1, 6, 6))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))
    before = torch.random.get_rng_state()
    fits = [FCCovNet(1, network=network, epochs=2, random_state=0).fit(images, images.mean((1, 2, 3))) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own random numbers are left alone"
    first, second = (fitted.transform(images) for fitted in fits)
    assert first.shape == (24, 1)
    assert np.array_equal(first, second)


def test_responses_that_are_all_the_same():
    X, _ = data()
    with pytest.warns(UserWarning, match="all responses are the same"):
        fitted = FCCovNet(epochs=1, hidden=(4,), random_state=0).fit(X, np.ones(30))
    assert fitted.fccov_ == 0
    assert np.isfinite(fitted.transform(X)).all()


def test_more_components_than_the_network_has_directions():
    X, y = data()
    fitted = FCCovNet(3, network=nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 3)), epochs=1).fit(X, y)
    got = fitted.transform(X)
    assert np.allclose((got**2).mean(0), [1, 0, 0], atol=1e-6)
