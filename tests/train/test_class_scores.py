"""Scores of classes and numbers, and their value for each row: by hand, by scikit-learn and scipy, and by leaving rows out."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from lowdim.train.class_scores import Answers, area_under_curve, by_class, class_score, positive_class
from lowdim.train.jackknife import jackknife
from lowdim.train.number_scores import number_score

BY_SKLEARN = {
    "accuracy": lambda y, p: sk.accuracy_score(y, p),
    "f1": lambda y, p: sk.f1_score(y, p, average="macro", zero_division=0),
    "f1-micro": lambda y, p: sk.f1_score(y, p, average="micro", zero_division=0),
    "f1-weighted": lambda y, p: sk.f1_score(y, p, average="weighted", zero_division=0),
}


def drawn(classes, rows, seed=0, right=0.6):
    """Labels and answers; the last class stands once, so that it is gone when its row is left out."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes - 1, rows)
    answers = np.where(draw.random(rows) < right, labels, draw.integers(0, classes - 1, rows))
    labels[3] = answers[3] = classes - 1
    return labels, answers


def test_scores_by_hand():
    answers = Answers.single([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], 3)
    # F1 by class: 2·2/(2·2+1+1) = 2/3, 2·2/(2·2+1+0) = 4/5, and 0 for the class that is never answered.
    found = {name: class_score(name, answers)[0] for name in ("accuracy", "f1", "f1-micro", "f1-weighted", "f1-binary")}
    assert found == pytest.approx(
        {
            "accuracy": 4 / 6,
            "f1": (2 / 3 + 4 / 5 + 0) / 3,
            "f1-micro": 4 / 6,
            "f1-weighted": (3 * 2 / 3 + 2 * 4 / 5 + 0) / 6,
            "f1-binary": 4 / 5,
        }
    )
    assert class_score("f1-binary", answers, positive=0)[0] == pytest.approx(2 / 3)
    mcc = class_score("mcc", Answers.single([1, 1, 0, 0], [1, 0, 0, 0], 2))[0]
    assert mcc == pytest.approx((1 * 2 - 0 * 1) / np.sqrt(1 * 2 * 2 * 3))
    assert class_score("mcc", Answers.single([1, 0], [1, 1], 2))[0] == 0.0, "one class alone has no correlation"


def test_a_table_by_class():
    table = by_class(Answers.single([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], 3), ("a", "b", "c"))
    both = pytest.approx(2 / 3)
    assert table == [
        {"class": "a", "precision": both, "recall": both, "f1": both, "count": 3},
        {"class": "b", "precision": both, "recall": 1.0, "f1": pytest.approx(4 / 5), "count": 2},
        {"class": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 1},
    ]


@pytest.mark.parametrize("metric", [*BY_SKLEARN, "mcc"])
def test_one_class_a_row_is_scikit_learn_with_each_row_left_out(metric):
    labels, answers = drawn(4, 40)
    score = BY_SKLEARN.get(metric, sk.matthews_corrcoef)
    value, values = class_score(metric, Answers.single(labels, answers, 4))
    assert value == pytest.approx(score(labels, answers))
    want = jackknife(lambda rows: float(score(labels[rows], answers[rows])), 40)
    assert values == pytest.approx(want, abs=1e-9)
    if metric == "accuracy":
        assert values.tolist() == (labels == answers).astype(float).tolist()


@pytest.mark.parametrize("metric", BY_SKLEARN)
def test_several_classes_a_row_are_scikit_learn_with_each_row_left_out(metric):
    draw = np.random.default_rng(1)
    truth = (draw.random((30, 5)) < (0.5, 0.3, 0.2, 0.1, 0.0)).astype(float)
    answer = np.where(draw.random((30, 5)) < 0.8, truth, 1 - truth)
    value, values = class_score(metric, Answers.several(truth, answer))
    assert value == pytest.approx(BY_SKLEARN[metric](truth, answer))
    assert values == pytest.approx(jackknife(lambda rows: float(BY_SKLEARN[metric](truth[rows], answer[rows])), 30), abs=1e-9)


def test_the_area_is_the_share_of_ordered_pairs():
    draw = np.random.default_rng(2)
    labels = np.array([0, 1, 2] * 8 + [3])
    scores = draw.random((25, 4)).round(1)
    truth = np.eye(4)[labels]
    value, values = area_under_curve(truth, scores)

    def areas(rows):
        found = []
        for k in range(4):
            ours, others = scores[rows][truth[rows][:, k] == 1, k], scores[rows][truth[rows][:, k] == 0, k]
            if len(ours) and len(others):
                gaps = ours[:, None] - others[None]
                found.append((gaps > 0).mean() + (gaps == 0).mean() / 2)
        return float(np.mean(found))

    assert value == pytest.approx(areas(np.arange(25)))
    assert value == pytest.approx(np.mean([sk.roc_auc_score(truth[:, k], scores[:, k]) for k in range(4)]))
    assert values == pytest.approx(jackknife(areas, 25), abs=1e-9)
    one, same = area_under_curve(np.eye(2)[[1, 1, 1]], scores[:3, :2])
    assert (one, same.tolist()) == (0.5, [0.5] * 3), "one class alone"


def test_the_positive_class_is_named_or_rarer():
    assert positive_class(("false", "true"), (1, 9)) == 1
    assert positive_class(("Yes", "No"), (9, 1)) == 0
    assert positive_class(("ham", "spam"), (1, 9)) == 1
    assert positive_class(("fraud", "usual"), (1, 9)) == 0
    assert positive_class(("a", "b"), (9, 1)) == positive_class(("a", "b"), (5, 5)) == 1


@pytest.mark.parametrize("levels", [2, 5, 10**6])
@pytest.mark.parametrize("rows", [3, 4, 17, 64])
def test_rank_correlation_is_scipys_with_each_row_left_out(rows, levels):
    draw = np.random.default_rng(rows)
    x, y = (draw.integers(0, levels, rows).astype(float) for _ in range(2))
    x[:2], y[:3] = (0, 1), (1, 0, 1)

    def score(kept):
        varies = len(set(x[kept])) > 1 and len(set(y[kept])) > 1
        return float(stats.spearmanr(x[kept], y[kept])[0]) if varies else 0.0

    value, values = number_score("spearman", x, y)
    assert value == pytest.approx(score(np.arange(rows)))
    assert values == pytest.approx(jackknife(score, rows), abs=1e-9)


def test_correlation_and_error_with_each_row_left_out():
    draw = np.random.default_rng(3)
    x = 1e6 + draw.normal(size=40)
    y = x + draw.normal(size=40)
    value, values = number_score("pearson", x, y)
    assert value == pytest.approx(stats.pearsonr(x, y)[0])
    assert values == pytest.approx(jackknife(lambda rows: float(stats.pearsonr(x[rows], y[rows])[0]), 40), abs=1e-6)
    value, values = number_score("rmse", x, y)
    assert value == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
    assert values == pytest.approx(-((x - y) ** 2)), "methods are compared by squared errors"


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_answers_that_are_all_equal_have_no_correlation(metric):
    value, values = number_score(metric, np.arange(5.0), np.full(5, 0.1))
    assert (value, values.tolist()) == (0.0, [0.0] * 5)
