import functools
import json
from typing import ClassVar

import numpy as np
import pytest
from scipy.stats import spearmanr

from lowdim.represent import SizeTable, shrink_encoder, size_table
from lowdim.represent.core.bootstrap import draws, midranks, spearman, weighted_spearman
from lowdim.represent.starbucks import sizes
from lowdim.testing.result_case import ResultCase
from lowdim.testing.small_encoder import WORDS, small_encoder

pytest.importorskip("sentence_transformers", reason="what is measured is a SentenceTransformer")

draw = np.random.default_rng(0)
FIRST = [" ".join(draw.choice(WORDS, 4)) for _ in range(30)]
SECOND = [" ".join([*text.split()[: 1 + i % 3], *draw.choice(WORDS, 2)]) for i, text in enumerate(FIRST)]
SCORES = [float(len(set(a.split()) & set(b.split()))) for a, b in zip(FIRST, SECOND)]


MEASURE = sizes._time


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Time that does not pass: the tables of two calls are equal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "_time", lambda *_: 0.0)
        yield


@functools.cache
def model():
    return small_encoder()


def cosines(layer, dim):
    a, b = (shrink_encoder(model(), layer, dim).encode(side).astype(float) for side in (FIRST, SECOND))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


class TestSizeTable(ResultCase):
    plots = True
    tolerance = 1e-6  # embeddings are float32
    unchecked: ClassVar = {"notes": "sentences; see below"}

    def result(self):
        return size_table(model(), (FIRST, SECOND, SCORES), layers=[1, 3], dims=[4, 16], repeats=1, resamples=50)

    def expected(self):
        sizes = []
        texts = list(dict.fromkeys([*FIRST, *SECOND]))
        for layer in (1, 3):
            whole = shrink_encoder(model(), layer, 16)
            x = whole.encode(texts).astype(float)
            x = x - x.mean(0)
            projected = x @ np.linalg.svd(x, full_matrices=False)[2].T
            for dim in (4, 16):
                rows = [projected[[texts.index(t) for t in side], :dim] for side in (FIRST, SECOND)]
                a, b = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows)
                low, high = self.bounds(cosines(layer, dim))
                sizes.append(
                    {
                        "layers": layer,
                        "dim": dim,
                        "quality": spearmanr(cosines(layer, dim), SCORES)[0],
                        "low": low,
                        "high": high,
                        "pca": spearmanr((a * b).sum(1), SCORES)[0],
                        "model_bytes": 4 * sum(p.numel() for p in whole.parameters()),
                        "vector_bytes": 4 * dim,
                        "ms": 0.0,
                    }
                )
        return {"sizes": sizes, "model": "BertModel", "pairs": 30, "metric": "spearman"}

    def bounds(self, values):
        """The bootstrap by scipy, resample by resample, with the same draws."""
        found = []
        for weights in draws(30, 50, 0):
            for row in weights.astype(int):
                picks = np.repeat(np.arange(30), row)
                found.append(spearmanr(values[picks], np.array(SCORES)[picks])[0])
        return np.quantile(found, 0.025), np.quantile(found, 0.975)

    def refusals(self):
        def table(*pairs, **options):
            return lambda: size_table(model(), pairs, **options)

        return [
            (ValueError, "1 parts", table(FIRST)),
            (ValueError, "30 and 29", table(FIRST, SECOND[1:])),
            (ValueError, "at least 2", table(FIRST[:1], SECOND[:1])),
            (ValueError, "a score for each of the 30 pairs; got 29", table(FIRST, SECOND, SCORES[1:])),
            (ValueError, "not all equal", table(FIRST, SECOND, [1.0] * 30)),
            (ValueError, "finite", table(FIRST, SECOND, [float("nan"), *SCORES[1:]])),
            (ValueError, "needs scores", table(FIRST, SECOND, metric="spearman")),
            (ValueError, "metric must be one of", table(FIRST, SECOND, metric="ndcg")),
            (ValueError, "the number of layers (3)", table(FIRST, SECOND, layers=[1, 4])),
            (ValueError, "the model's dimensions (16)", table(FIRST, SECOND, dims=[17])),
            (TypeError, "needs a SentenceTransformer", lambda: size_table(3, (FIRST, SECOND))),
        ]


def test_accuracy_counts_equal_texts_as_found():
    second = [*SECOND[:-1], SECOND[0]]  # one text twice
    table = size_table(model(), (second, second), layers=[2], dims=[16], repeats=1, resamples=5)
    assert table.metric == "accuracy@1"
    assert table.sizes[0].quality == table.sizes[0].low == table.sizes[0].high == 1.0
    other = size_table(model(), (FIRST, SECOND), layers=[3], dims=[8], repeats=1, resamples=5)
    a, b = (shrink_encoder(model(), 3, 8, head="dense").encode(side) for side in (FIRST, SECOND))
    hits = [SECOND[j] == SECOND[i] for i, j in enumerate((a @ b.T).argmax(1))]
    assert other.sizes[0].quality == pytest.approx(np.mean(hits))


def test_defaults_are_all_layers_and_halves():
    table = size_table(small_encoder(layers=2, width=64), (FIRST, SECOND), repeats=1, resamples=2)
    assert [(row.layers, row.dim) for row in table.sizes] == [(1, 32), (1, 64), (2, 32), (2, 64)]


def row(layers, dim, quality, high, pca=0.0):
    return sizes.SizeRow(layers, dim, quality, quality - 0.02, high, pca, 1000 * layers, 4 * dim, 1.0)


def test_smallest_and_notes(tmp_path):
    rows = (row(1, 8, 0.5, 0.6), row(1, 16, 0.7, 0.795), row(2, 8, 0.78, 0.85), row(2, 16, 0.8, 0.85))
    table = SizeTable(rows, "m", 10, "spearman", ())
    assert table.full == rows[3]
    assert table.smallest() == rows[1]  # half the bytes of the model; its interval reaches 0.79
    assert table.smallest(within=0.0) == rows[2]
    with pytest.raises(ValueError, match="within"):
        table.smallest(-1.0)
    record = json.loads(table.save(tmp_path / "sizes.json").read_text())
    assert [r["layers"] for r in record["rows"]] == [1, 1, 2, 2]
    assert record["pairs"] == 10
    page = SizeTable(10 * rows, "m", 10, "spearman", ("a < b",)).save(tmp_path / "sizes.html").read_text()
    assert page.count("<td>0.795</td>") == 10  # every row
    assert "<td>a &lt; b</td>" in page


def test_a_note_where_pca_is_better():
    assert sizes._notes([row(1, 16, 0.5, 0.6, pca=0.9), row(1, 8, 0.5, 0.6, pca=0.505)], 16) == []
    (note,) = sizes._notes([row(1, 8, 0.5, 0.6, pca=0.52), row(2, 8, 0.5, 0.6, pca=0.7)], 16)
    assert "not trained to be cut at (1, 8), (2, 8)" in note
    assert "(2, 8), 0.700 against 0.500" in note


def test_ranks_of_resamples_with_ties():
    values, scores = np.array([3.0, 1.0, 1.0, 2.0]), np.array([1.0, 2.0, 2.0, 0.0])
    weights = np.array([[2.0, 0.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    got = weighted_spearman(weights, midranks(values)(weights), midranks(scores)(weights))
    assert got[0] == pytest.approx(spearmanr([3, 3, 1, 2], [1, 1, 2, 0])[0])
    assert got[1] == 0.0  # one row only
    assert got[2] == pytest.approx(spearman(values, scores)) == pytest.approx(spearmanr(values, scores)[0])


def test_time_is_the_median_for_a_text():
    class Encoder:
        clock, calls = 0.0, []

        def encode(self, texts, **how):
            self.calls.append(len(texts))
            Encoder.clock += (50.0, 1.0, 9.0, 2.0)[len(self.calls) - 1]  # the first one is not counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes.time, "perf_counter", lambda: Encoder.clock)
        ms = MEASURE(Encoder(), ["text"] * 100, 5, 3)
    assert Encoder.calls == [20] * 4
    assert ms == pytest.approx(2000 / 20)
