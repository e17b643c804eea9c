import math

import numpy as np
import pytest
import torch
from torch import nn

from lowdim.diagnose import feature_dynamics
from lowdim.linalg import stream
from lowdim.testing.result_case import ResultCase

TIMES = [0.0, 2.0, 1e4]


def net():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()


def samples(n=10, seed=0):
    g = stream(seed, "feature dynamics")
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randn(n, 2, generator=g, dtype=torch.float64)


class TestFeatureDynamics(ResultCase):
    plots = True
    tolerance = 1e-8

    def result(self):
        (x, y), (other, labels) = samples(), samples(6, 1)
        return feature_dynamics(net(), "1", [x[:7], x[7:]], y, times=TIMES, held_out=([other], labels))

    def expected(self):
        """By the eigenvectors of `XᵀX`: `w(t) = Σ_λ (1 − e^(−λ t))/λ v vᵀ Xᵀ y` for each output."""
        (x, y), (other, labels) = samples(), samples(6, 1)
        hidden = lambda x: torch.relu(net()[0](x)).detach().numpy()  # noqa: E731
        X, Z, y, labels = hidden(x), hidden(other), y.numpy(), labels.numpy()
        values, V = np.linalg.eigh(X.T @ X)
        moving = values > 1e-10 * values.max()
        values, V = values[moving], V[:, moving]
        train, test, aware = [], [], []
        for t in TIMES:
            W = V @ ((-np.expm1(-values * t) / values)[:, None] * (V.T @ X.T @ y))
            train.append(((X @ W - y) ** 2).mean(0).sum())
            test.append(((Z @ W - labels) ** 2).mean(0).sum())
            aware.append(np.sqrt(values.sum()) * np.linalg.norm(W, axis=0).sum() / 10)
        scale, alpha = 16 * X.var(), 10 / 16
        edges = [scale * (alpha**0.5 + sign) ** 2 for sign in (-1, 1)]
        return {
            "times": TIMES, "train_error": train, "test_error": test, "frozen_dim": 16 - len(values), "naive": aware,
            "frozen_aware": aware, "eigenvalues": values[::-1].copy(), "marchenko_pastur": [*edges, 1 - alpha],
            "outside": float((values > edges[1]).mean()), "samples": 10, "features": 16, "rank": len(values), "rtol": 1e-10,
            "best_time": TIMES[int(np.argmin(test))],
        }  # fmt: skip

    def refusals(self):
        model, (x, y) = net(), samples()
        nan = x * math.nan

        def call(layer="1", batches=None, targets=y, times=TIMES, **more):
            return lambda: feature_dynamics(model, layer, [x] if batches is None else batches, targets, times=times, **more)

        return [
            (ValueError, "layer: '7' is not a module", call(layer="7")),
            (ValueError, "targets must be (10,) or (10, outputs)", call(targets=y[1:])),
            (ValueError, "targets must be given", call(targets=None)),
            (ValueError, "at least two samples", call(batches=[x[:1]], targets=y[:1])),
            (ValueError, "times", call(times=[-1.0])),
            (ValueError, "its features have NaN", call(batches=[nan])),
            (ValueError, "at least one batch", call(batches=[])),
            (TypeError, "put it in a list", call(batches=x)),
            (ValueError, "held_out must have 2 outputs", call(held_out=([x], y[:, 0]))),
            (ValueError, "held_out", call(held_out=1.5)),
            (ValueError, "seed", call(seed=-1)),
            (ValueError, "rtol", call(rtol=1.0)),
        ]

    def test_the_model_is_left_as_it_was(self):
        model, (x, y) = net(), samples()
        feature_dynamics(model, "1", [x], y, times=[1.0])
        assert all(module.training for module in model)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not model[1]._forward_hooks


def test_a_share_is_held_out():
    x, y = samples(40)
    found = feature_dynamics(net(), "1", [x], y[:, 0], times=TIMES, held_out=0.25, seed=2)
    assert found.samples == 30
    assert found.test_error.shape == (3,)
    again = feature_dynamics(net(), "1", [x], y[:, 0], times=TIMES, held_out=0.25, seed=3)
    assert not torch.equal(found.test_error, again.test_error)
    none = feature_dynamics(net(), "1", [x], y[:, 0], times=TIMES)
    assert none.test_error is None
    assert none.best_time is None
    assert none.to_dict()["best_time"] is None
    assert none.rows()[0]["test_error"] is None
    assert "give held-out samples" in none.summary


class Encoder(nn.Module):
    """Token states `(batch, length, 3)`; takes dict batches with labels, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        nn.init.normal_(self.embed.weight, generator=stream(0, "embed"))

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.embed(input_ids)


def test_dict_batches_with_padding_and_labels():
    model, g = Encoder(), stream(1, "tokens")
    ids = torch.randint(9, (6, 4), generator=g)
    mask = torch.ones_like(ids)
    mask[:3, 2:] = 0
    labels = torch.tensor([0, 2, 1, 0, 2, 2])
    batches = [
        {"input_ids": ids[part], "attention_mask": mask[part], "labels": labels[part]} for part in (slice(0, 4), slice(4, 6))
    ]
    found = feature_dynamics(model, "embed", batches, times=[0.0, 1e9])
    states = model.embed.weight.detach().double()[ids]
    X = torch.stack([states[i, : int(mask[i].sum())].mean(0) for i in range(6)])
    one_hot = torch.eye(3).double()[labels] - torch.eye(3).double()[labels].mean(0)
    want = (X @ torch.linalg.lstsq(X, one_hot).solution - one_hot).square().mean(0).sum()
    assert float(found.train_error[1]) == pytest.approx(float(want), rel=1e-8)
    assert float(found.train_error[0]) == pytest.approx(float(one_hot.square().mean(0).sum()))
    other = feature_dynamics(model, "embed", batches, times=[0.0], held_out=batches[:1])
    assert float(other.test_error[0]) == pytest.approx(float(one_hot[:4].square().mean(0).sum())), "the training mean is taken"


def test_the_edges_are_those_of_noise_around_a_mean():
    x = 3.0 + 0.5 * torch.randn(400, 100, generator=stream(4, "edges"), dtype=torch.float64)
    found = feature_dynamics(nn.Sequential(nn.Identity()), "0", [x], x[:, 0], times=[0.0])
    low, high, empty = found.marchenko_pastur
    assert (low, high, empty) == pytest.approx((0.25 * 100, 0.25 * 900, 0.0), rel=0.02)
    assert found.outside == 0.01, "the mean's eigenvalue"
    assert float(found.eigenvalues[1]) == pytest.approx(high, rel=0.05)


def test_over_training_is_said():
    g = stream(3, "over-training")
    x = torch.randn(200, 20, generator=g, dtype=torch.float64)
    y = x[:, 0] + 0.5 * torch.randn(200, generator=g, dtype=torch.float64)
    model = nn.Sequential(nn.Identity())
    found = feature_dynamics(model, "0", [x[:22]], y[:22], times=[0.0, 0.01, 0.05, 0.2, 1e6], held_out=([x[22:]], y[22:]))
    assert found.best_time < 1e6
    assert "stop at" in found.summary
    assert (
        "no over-training"
        in feature_dynamics(model, "0", [x[:180]], x[:180, 0], times=[0.0, 1e6], held_out=([x[180:]], x[180:, 0])).summary
    )
