import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from lowdim.represent import MatryoshkaCascade
from lowdim.testing.result_case import ResultCase


def draw(seed, levels=3, n=25, classes=3):
    g = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(levels, n, classes, generator=g, dtype=torch.float64)).softmax(-1)
    return p, torch.randint(classes, (n,), generator=g)


def test_vectors():
    case = vectors.load("mrl", "cascade")
    p, y, fit, test = (case[k] for k in ("probabilities", "target", "fit_index", "test_index"))
    cascade = MatryoshkaCascade(case.hyperparameters["dims"]).fit(p[:, fit], y[fit])
    case.close(cascade.thresholds_, "thresholds")
    results = [cascade.predict(p[:, test], j + 1) for j in range(8)]
    case.close(torch.tensor([r.expected_dim for r in results], dtype=torch.float64), "expected_dim")
    case.close(torch.stack([(r.predictions == y[test]).double().mean() for r in results]), "accuracy")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.lists(st.sampled_from([0.3, 0.45, 0.6, 0.8, 1.0]), min_size=1))
def test_thresholds_are_the_smallest_best_ones(seed, levels, grid):
    p, y = draw(seed, levels)
    cascade = MatryoshkaCascade(range(1, levels + 1), grid).fit(p, y)
    confidence, guess = p.max(-1).values.numpy(), p.argmax(-1).numpy()
    for g in range(levels - 1):
        scores = [np.mean(np.where(confidence[g] > t, guess[g], guess[g + 1]) == y.numpy()) for t in sorted(grid)]
        assert float(cascade.thresholds_[g]) == sorted(grid)[int(np.argmax(scores))]
    assert len(cascade.thresholds_) == levels - 1
    result = cascade.predict(p)
    for i in range(p.shape[1]):
        sure = [g for g in range(levels - 1) if confidence[g, i] > float(cascade.thresholds_[g])]
        level = sure[0] if sure else levels - 1
        assert int(result.level[i]) == level
        assert int(result.predictions[i]) == guess[level, i]
    assert result.expected_dim == pytest.approx(float(result.level.double().mean()) + 1)


def test_a_confidence_at_the_threshold_is_not_above_it():
    # The small head is right where it says 0.9 and wrong where it says 0.5; the large one the other way round.
    sure, torn = [0.9, 0.1], [0.5, 0.5]
    cascade = MatryoshkaCascade([2, 4], grid=[0.25, 0.5, 0.9])
    p = torch.tensor([[sure, torn], [sure[::-1], sure[::-1]]], dtype=torch.float64)
    cascade.fit(p, torch.tensor([0, 1]))
    assert cascade.thresholds_.tolist() == [0.5]
    assert cascade.predict(p).level.tolist() == [0, 1]


def test_max_level_bounds_the_size():
    p, y = draw(0)
    cascade = MatryoshkaCascade([2, 4, 8]).fit(p, y)
    first = cascade.predict(p, 0)
    assert first.expected_dim == 2
    assert torch.equal(first.predictions, p[0].argmax(-1))
    assert int(cascade.predict(p, 1).level.max()) <= 1
    assert cascade.predict(p).to_dict() == cascade.predict(p, 2).to_dict()


def test_float32_numpy_and_bfloat16_probabilities():
    p, y = draw(2)
    wide = MatryoshkaCascade([2, 4, 8]).fit(p, y)
    assert torch.equal(MatryoshkaCascade([2, 4, 8]).fit(p.numpy(), y.numpy()).thresholds_, wide.thresholds_)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = MatryoshkaCascade([2, 4, 8]).fit(p.to(dtype), y)
        assert narrow.thresholds_.dtype == torch.float64
        assert torch.equal(narrow.predict(p.to(dtype), 0).predictions, p[0].to(dtype).argmax(-1))


class TestCascade(ResultCase):
    def result(self):
        p, y = draw(0)
        return MatryoshkaCascade([2, 4, 8], grid=[0.5, 0.7, 0.9]).fit(p[:, :15], y[:15]).predict(p[:, 15:])

    def expected(self):
        p, y = (array.numpy() for array in draw(0))
        confidence, guess = p.max(axis=2), p.argmax(axis=2)
        thresholds = []
        for g in (0, 1):  # the smallest threshold that is most accurate on the first fifteen
            right = [
                np.sum(np.where(confidence[g, :15] > t, guess[g, :15], guess[g + 1, :15]) == y[:15]) for t in (0.5, 0.7, 0.9)
            ]
            thresholds.append((0.5, 0.7, 0.9)[right.index(max(right))])
        level = [next((g for g in (0, 1) if confidence[g, i] > thresholds[g]), 2) for i in range(15, 25)]
        return {
            "predictions": [int(guess[g, i]) for g, i in zip(level, range(15, 25))],
            "level": level,
            "expected_dim": sum((2, 4, 8)[g] for g in level) / 10,
        }

    def refusals(self):
        p, y = draw(0)
        fitted = MatryoshkaCascade([2, 4, 8]).fit(p, y)
        return [
            (ValueError, "(3, N, C)", lambda: MatryoshkaCascade([2, 4, 8]).fit(p[0], y)),
            (ValueError, "(2, N, C)", lambda: MatryoshkaCascade([2, 4]).fit(p, y)),
            (ValueError, "(25,)", lambda: MatryoshkaCascade([2, 4, 8]).fit(p, y[:3])),
            (ValueError, "at least one sample", lambda: MatryoshkaCascade([2, 4, 8]).fit(p[:, :0], y[:0])),
            (ValueError, "fitted", lambda: MatryoshkaCascade([2, 4, 8]).predict(p)),
            (ValueError, "max_level", lambda: fitted.predict(p, 3)),
            (ValueError, "grid", lambda: MatryoshkaCascade([2, 4], [])),
            (ValueError, "grid", lambda: MatryoshkaCascade([2, 4], [float("nan")])),
            (ValueError, "strictly increasing", lambda: MatryoshkaCascade([4, 2])),
            (TypeError, "integers", lambda: MatryoshkaCascade([2.5, 4])),  # type: ignore[list-item]
        ]
