import json
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

import vectors
from lowdim.represent import (
    average_accuracy,
    average_compatibility,
    compatibility_inequalities,
    identification_accuracy,
    replacement_report,
)
from lowdim.testing.result_case import ResultCase, ValueCase

CLASSES, EACH, SIZE = 5, 8, 6


def items(noise=0.8, seed=0):
    """Labels, old and new vectors of the same items; the new ones are turned a little."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(CLASSES) * 3 + 1, EACH))
    centres = draw.normal(size=(20, SIZE))
    old = centres[labels] + noise * draw.normal(size=(len(labels), SIZE))
    new = centres[labels] + noise * draw.normal(size=(len(labels), SIZE))
    return labels, old, new


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def accuracy(gallery, of_gallery, query, of_query):
    names = sorted(set(of_gallery))
    templates = np.stack([unit(unit(gallery[of_gallery == name]).mean(0)) for name in names])
    return np.array([names[i] for i in (unit(query) @ templates.T).argmax(1)]) == of_query


class TestIdentification(ValueCase):
    def result(self):
        labels, old, new = items()
        return identification_accuracy(old, labels, torch.tensor(new), labels.tolist())

    def expected(self):
        labels, old, new = items()
        return accuracy(old, labels, new, labels).mean()

    def refusals(self):
        labels, old, new = items()
        bad = old.copy()
        bad[3, 0] = np.nan
        return [
            (
                ValueError,
                "without a gallery item: 1",
                lambda: identification_accuracy(old[labels > 1], labels[labels > 1], new, labels),
            ),
            (ValueError, "one label for each of the 40 rows", lambda: identification_accuracy(old, labels[1:], new, labels)),
            (ValueError, "same size; got 6 and 5", lambda: identification_accuracy(old, labels, new[:, 1:], labels)),
            (ValueError, "first in row 3", lambda: identification_accuracy(bad, labels, new, labels)),
            (ValueError, "integers or texts", lambda: identification_accuracy(old, labels + 0.5, new, labels)),
            (ValueError, "floating-point", lambda: identification_accuracy(old.astype(int), labels, new, labels)),
            (ValueError, "query must be a matrix", lambda: identification_accuracy(old, labels, new[:0], labels[:0])),
        ]


class TestInequalities(ValueCase):
    def result(self):
        labels, old, new = items()
        return compatibility_inequalities(new, old, labels)

    def expected(self):
        labels, old, new = items()
        held = {True: [], False: []}
        for a in range(len(labels)):
            for b in range(len(labels)):
                if a != b:
                    near = 1 - unit(new[a]) @ unit(old[b]), 1 - unit(old[a]) @ unit(old[b])
                    same = bool(labels[a] == labels[b])
                    held[same].append(near[0] <= near[1] if same else near[0] >= near[1])
        return np.mean(held[True]), np.mean(held[False])

    def refusals(self):
        labels, old, new = items()
        return [
            (ValueError, "same shape", lambda: compatibility_inequalities(new[:, 1:], old, labels)),
            (ValueError, "40 rows", lambda: compatibility_inequalities(new, old, labels[:3])),
        ]


class TestReplacementReport(ResultCase):
    plots = True
    unchecked: ClassVar = {"reason": "a sentence"}

    def result(self):
        labels, old, new = items()
        return replacement_report(old, new, labels, query=self.asks(), resamples=200)

    def asks(self):
        return np.arange(CLASSES * EACH) % 2 == 0

    def expected(self):
        labels, old, new = items()
        q, g = self.asks(), ~self.asks()
        sides = (old, new)
        hits = [[accuracy(sides[j][g], labels[g], sides[i][q], labels[q]) for j in (0, 1)] for i in (0, 1)]
        M = [[hit.mean() for hit in row] for row in hits]
        difference = hits[1][0].astype(float) - hits[0][0]
        from lowdim.represent.core.bootstrap import draws

        means = np.concatenate([weights @ difference / len(difference) for weights in draws(len(difference), 200, 0)])
        low, high = np.quantile(means, 0.025), np.quantile(means, 0.975)
        rows = []
        for name in sorted(set(labels)):
            of = labels[q] == name
            found = [hits[i][j][of].mean() for i, j in ((0, 0), (1, 0), (1, 1))]
            rows.append(
                dict(
                    zip(
                        ("label", "queries", "old_old", "new_old", "new_new", "loss"),
                        (int(name), int(of.sum()), *found, found[0] - found[1]),
                    )
                )
            )
        return {
            "verdict": "stay" if low >= -0.01 else "rebuild" if high < -0.01 else "unclear",
            "items": 40,
            "old_size": SIZE,
            "new_size": SIZE,
            "matrix": M,
            "average_compatibility": float(M[1][0] > M[0][0]),
            "average_accuracy": (M[0][0] + M[1][0] + M[1][1]) / 3,
            "gap": M[1][0] - M[0][0],
            "low": low,
            "high": high,
            "inequalities": TestInequalities().expected(),
            "self_match": None,
            "overlap_at_k": None,
            "k": None,
            "per_class": sorted(rows, key=lambda row: -row["loss"]),
        }  # fmt: skip

    def refusals(self):
        labels, old, new = items()
        alone = labels.copy()
        alone[0] = 99
        return [
            (ValueError, "40 and 39 rows", lambda: replacement_report(old, new[1:], labels)),
            (ValueError, "without an item that asks: 99", lambda: replacement_report(old, new, alone)),
            (
                ValueError,
                "without an item in the gallery: 99",
                lambda: replacement_report(old, new, alone, query=self.asks() | (alone == 99)),
            ),
            (ValueError, "40 truth values", lambda: replacement_report(old, new, labels, query=labels)),
            (ValueError, "query needs labels", lambda: replacement_report(old, new, query=labels > 1)),
            (ValueError, "k must be an int in [1, 39]", lambda: replacement_report(old, new, k=40)),
            (ValueError, "resamples", lambda: replacement_report(old, new, labels, resamples=0)),
            (ValueError, "old has NaN", lambda: replacement_report(old * np.nan, new, labels)),
        ]


class TestWithoutLabels(ResultCase):
    plots = True
    unchecked: ClassVar = {"reason": "a sentence"}

    def result(self):
        _, old, new = items()
        return replacement_report(old, new, k=4)

    def expected(self):
        _, old, new = items()
        to_old, to_new = unit(new) @ unit(old).T, unit(new) @ unit(new).T
        shared = []
        for i in range(40):
            lists = [[j for j in (-row[i]).argsort() if j != i][:4] for row in (to_old, to_new)]
            shared.append(len(set(lists[0]) & set(lists[1])) / 4)
        overlap = np.mean(shared)
        empty = ("matrix", "average_compatibility", "average_accuracy", "gap", "low", "high", "inequalities")
        return {
            "verdict": "unclear" if 0.5 <= overlap < 0.95 else "rebuild",
            "items": 40,
            "old_size": SIZE,
            "new_size": SIZE,
            "self_match": (to_old.argmax(1) == np.arange(40)).mean(),
            "overlap_at_k": overlap,
            "k": 4,
            "per_class": (),
            **dict.fromkeys(empty),
        }

    def refusals(self):
        _, old, new = items()
        return [(ValueError, "k must be", lambda: replacement_report(old, new, k=0))]


def test_vectors_of_metrics():
    case = vectors.load("d-simplex", "metrics")
    matrix = case["matrix"]
    assert average_compatibility(matrix) == pytest.approx(float(case["average_compatibility"]), abs=1e-12)
    assert 100 * average_accuracy(matrix) == pytest.approx(float(case["average_accuracy_percent"]), rel=1e-12)
    for tasks, want in enumerate(case["per_task"].tolist(), 2):
        assert average_compatibility(matrix[:tasks, :tasks]) == pytest.approx(want, abs=1e-12)


def test_vectors_of_search():
    case = vectors.load("d-simplex", "search")
    labels = case["gallery_labels"], case["query_labels"]
    got = identification_accuracy(case["gallery"], labels[0], case["query"], labels[1])
    assert got == pytest.approx(float(case["accuracy"]), abs=1e-12)
    # `query` are the old features of the same items as `new_features`.
    same, different = compatibility_inequalities(case["new_features"], case["query"], labels[1])
    assert (same, different) == pytest.approx((float(case["same"]), float(case["different"])), abs=1e-12)


def test_matrices_that_are_refused_and_small_ones():
    assert average_compatibility([[0.3]]) == 1.0
    assert average_accuracy([[0.3]]) == 0.3
    assert average_compatibility([[0.5, 0.9], [0.5, 0.9]]) == 0.0  # strict
    for wrong in ([[1.0, 2.0]], [], [[0.1, 0.0], [float("nan"), 0.2]]):
        with pytest.raises(ValueError, match="matrix must be"):
            average_accuracy(wrong)


def test_each_later_model_is_compared_with_the_gallerys_own():
    """`Σ_{i > j} 1[M_ij > M_jj] / (T (T - 1) / 2)`; above the diagonal nothing counts."""
    matrix = [[0.5, 9.0, 9.0], [0.6, 0.9, 9.0], [0.4, 0.7, 0.2]]
    assert average_compatibility(matrix) == pytest.approx(1 / 3)  # 0.6 > 0.5 holds, 0.4 > 0.5 and 0.7 > 0.9 do not
    assert average_accuracy(matrix) == pytest.approx((0.5 + 0.6 + 0.9 + 0.4 + 0.7 + 0.2) / 6)


def test_inequalities_in_blocks_and_of_a_model_with_itself(monkeypatch):
    labels, old, new = items()
    whole = compatibility_inequalities(new, old, labels)
    monkeypatch.setattr("lowdim.represent.d_simplex.compatibility._BLOCK", 7 * len(labels))
    assert compatibility_inequalities(new, old, labels) == whole
    assert compatibility_inequalities(old, old, labels) == (1.0, 1.0)  # both hold with equality


def test_it_agrees_with_scikit_learn():
    labels, old, new = items()
    centroid = NearestCentroid().fit(unit(old), labels)
    centroid.centroids_ = unit(centroid.centroids_)
    assert identification_accuracy(old, labels, new, labels) == centroid.score(unit(new), labels)


def test_texts_as_labels_and_the_default_split():
    labels, old, _ = items(noise=0.1)
    names = np.array([f"class {label}" for label in labels])
    report = replacement_report(old, 3 * old, names.tolist())
    assert report.verdict == "stay"
    assert report.gap == report.low == report.high == 0.0
    assert sum(row.queries for row in report.per_class) == 20
    assert {row.label for row in report.per_class} == set(names)
    assert replacement_report(old, 3 * old, names.tolist(), seed=0) == report


def test_a_model_of_another_space_and_a_shuffle():
    labels, old, _ = items(noise=0.1)
    other = old @ np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, SIZE)))[0]
    assert replacement_report(old, other, labels).verdict == "rebuild"
    shuffled = replacement_report(old, old[np.random.default_rng(0).permutation(40)], labels)
    assert shuffled.verdict == "rebuild"
    assert "rows in another order" in shuffled.reason
    bare = replacement_report(old, np.random.default_rng(5).normal(size=old.shape), k=3)
    assert bare.verdict == "rebuild"
    assert "no labels: weaker evidence" in bare.reason
    assert replacement_report(old, old, k=3).verdict == "stay"
    assert replacement_report(old, old, k=3).self_match == 1.0


def test_other_sizes_cannot_be_compared():
    labels, old, new = items()
    with_labels = replacement_report(old, new[:, :4], labels)
    assert with_labels.verdict == "rebuild"
    assert "6 dimensions and the new ones 4" in with_labels.reason
    assert with_labels.matrix is not None
    assert with_labels.matrix[0][1] is None
    assert with_labels.matrix[1][0] is None
    assert {row.loss for row in with_labels.per_class} == {None}
    assert with_labels.plot() is not None
    assert replacement_report(old, new[:, :4]).verdict == "rebuild"


def test_the_record_is_written(tmp_path):
    labels, old, new = items()
    record = json.loads(replacement_report(old, new, labels).save(tmp_path / "report.json").read_text())
    assert set(record["per_class"][0]) == {"label", "queries", "old_old", "new_old", "new_new", "loss"}
    assert record["verdict"] in ("stay", "rebuild", "unclear")


def test_a_page_holds_matrix_and_every_class(tmp_path):
    labels, old, new = items()
    report = replacement_report(old, new, [f"<{label}>" for label in labels])
    page = report.save(tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<td>old model asks</td>" in page
    assert f"<td>{report.matrix[1][0]:.4g}</td>" in page
    assert all(f"<td>&lt;{label}&gt;</td>" in page for label in set(labels))
    bare = replacement_report(old, new, k=4)
    assert f"<td>{bare.overlap_at_k:.4g}</td>" in bare.save(tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match=r"must end in \.html .* or \.json"):
        report.save(tmp_path / "report.txt")


def test_half_precision_decides_as_float32():
    labels, old, new = items(noise=0.1)
    half = [torch.tensor(x).to(torch.float16) for x in (old, new)]
    assert replacement_report(*half, labels).matrix == replacement_report(*(x.float() for x in half), labels).matrix


@pytest.mark.slow
def test_ten_thousand_items_take_seconds():
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(10_000, 384, generator=g), torch.randn(10_000, 384, generator=g)
    begun = time.process_time()
    replacement_report(old, new, torch.arange(10_000) % 100)
    assert time.process_time() - begun < 20  # of one core
