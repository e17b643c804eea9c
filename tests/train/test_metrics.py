import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowdim.errors import UnknownNameError
from lowdim.train.metrics import METRICS, Metric, classification_score, difference_is_noise, interval, metric_for

scores = st.lists(st.floats(0.0, 1.0, allow_nan=False), min_size=2, max_size=6)


def test_the_metric_of_a_task():
    assert metric_for("classify").name == "accuracy"
    assert metric_for("causal-lm").name == "perplexity"
    assert metric_for("classify", "mcc") is METRICS["mcc"]
    with pytest.raises(
        UnknownNameError, match=r"metric for classify must be one of accuracy, f1, mcc; got 'acuracy' \(nearest: accuracy"
    ):
        metric_for("classify", "acuracy")
    with pytest.raises(UnknownNameError, match="metric for causal-lm must be one of perplexity, loss; got 'accuracy'"):
        metric_for("causal-lm", "accuracy")


def test_better_knows_its_direction_and_nan_beats_nothing():
    up, down = Metric("a", "classify", True), Metric("b", "causal-lm", False)
    assert up.better(2.0, 1.0)
    assert not up.better(1.0, 1.0)
    assert down.better(1.0, 2.0)
    for metric in (up, down):
        assert metric.better(1.0, math.nan)
        assert not metric.better(math.nan, 1.0)
        assert not metric.better(math.nan, math.nan)


def test_scores_by_hand():
    labels, predictions = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]
    assert classification_score("accuracy", labels, predictions) == pytest.approx(4 / 6)
    # F1 by class: 2·2/(2·2+1+1) = 2/3, 2·2/(2·2+1+0) = 4/5, and 0 for the class that is never predicted.
    assert classification_score("f1", labels, predictions) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert classification_score("mcc", [1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx((1 * 2 - 0 * 1) / math.sqrt(1 * 2 * 2 * 3))
    assert classification_score("mcc", [1, 0], [1, 1]) == 0.0


@settings(deadline=None, max_examples=40)
@given(scores)
def test_interval_is_scipys_t_interval(values):
    from scipy import stats

    low, high = interval(values)
    mean = sum(values) / len(values)
    error = stats.sem(values)
    want = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error > 0 else (mean, mean)
    assert (low, high) == pytest.approx(want, abs=1e-12)


def test_interval_by_hand_and_its_ends():
    # Mean 2, standard deviation 1, three values: 2 ± 4.302653 / √3.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.302652729749464 / math.sqrt(3), 2 + 4.302652729749464 / math.sqrt(3))
    )
    assert interval([1.0, 2.0, 3.0], low=0.0, high=3.5) == (0.0, 3.5)
    assert interval([0.5]) is None
    assert interval([]) is None
    narrow, wide = interval([1.0, 2.0, 3.0], 0.5), interval([1.0, 2.0, 3.0], 0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 6), st.data())
def test_noise_without_sampling_error_is_scipys_paired_test(count, data):
    from scipy import stats

    values = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    a, b = data.draw(values), data.draw(values)
    gaps = [x - y for x, y in zip(a, b)]
    if len(set(gaps)) == 1:
        assert difference_is_noise(a, b) == (gaps[0] == 0)
        return
    p = stats.ttest_rel(a, b).pvalue
    if abs(p - 0.05) > 1e-9:
        assert difference_is_noise(a, b) == (p > 0.05)


def test_noise_is_at_95_percent():
    from scipy import stats

    a, b = [4, 3, 2], [1, 1, 1]
    assert 0.05 < stats.ttest_rel(a, b).pvalue < 0.1
    assert difference_is_noise(a, b)
    assert not difference_is_noise([4, 3.5, 3], b)


def test_noise_pairs_the_seeds_and_adds_the_error_of_the_test_set():
    a, b = [0.90, 0.80, 0.70], [0.88, 0.78, 0.681]  # far apart from seed to seed, yet always 0.02 apart
    assert not difference_is_noise(a, b)
    assert difference_is_noise(a, [0.70, 0.88, 0.78])
    # 1.96 · 0.012 = 0.024 is more than the difference of 0.02; 1.96 · 0.005 is less.
    assert difference_is_noise(a, b, 0.012)
    assert not difference_is_noise(a, b, 0.005)
    assert difference_is_noise(a, b) == difference_is_noise(b, a)


@pytest.mark.parametrize("few", [([], []), ([0.9], [0.1]), ([0.9, 0.9], [0.1])])
def test_one_seed_says_nothing(few):
    assert difference_is_noise(*few)
