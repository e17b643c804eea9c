"""The judge: its formulas on small tables, and its error rates in comparisons whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lowdim.compare.judge import LEVEL, jackknife, judge


def table(seed=0, shape=(4, 3, 30), scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


def test_the_variance_of_a_difference_is_that_of_the_interactions():
    scores = table()
    methods, seeds, examples = scores.shape
    # Two-way anova of each interaction by its definition.
    grand = scores.mean()
    m, s, e = scores.mean((1, 2)), scores.mean((0, 2)), scores.mean((0, 1))
    ms, me, se = scores.mean(2), scores.mean(1), scores.mean(0)
    square_seed = sum((ms[i, j] - m[i] - s[j] + grand) ** 2 for i in range(methods) for j in range(seeds))
    square_example = sum((me[i, k] - m[i] - e[k] + grand) ** 2 for i in range(methods) for k in range(examples))
    square_rest = sum(
        (scores[i, j, k] - ms[i, j] - me[i, k] - se[j, k] + m[i] + s[j] + e[k] - grand) ** 2
        for i, j, k in itertools.product(range(methods), range(seeds), range(examples))
    )
    df = ((methods - 1) * (seeds - 1), (methods - 1) * (examples - 1), (methods - 1) * (seeds - 1) * (examples - 1))
    mean_squares = (examples * square_seed / df[0], seeds * square_example / df[1], square_rest / df[2])
    total = mean_squares[0] + mean_squares[1] - mean_squares[2]
    found = judge("abcd", scores).parts
    assert (found.seed, found.example, found.rest) == pytest.approx(mean_squares)
    assert found.variance == pytest.approx(max(total, mean_squares[2]) / (seeds * examples))
    want = total**2 / sum(square**2 / free for square, free in zip(mean_squares, df, strict=True))
    assert found.degrees == pytest.approx(df[2] if total <= mean_squares[2] else want)


def test_what_all_methods_share_does_not_count():
    """A hard example, a bad seed, and both together shift every method alike."""
    scores = table()
    draw = np.random.default_rng(9)
    shared = draw.normal(0, 50, (1, 1, 30)) + draw.normal(0, 50, (1, 3, 1)) + draw.normal(0, 50, (1, 3, 30))
    plain, shifted = judge("abcd", scores), judge("abcd", scores + shared)
    assert shifted.half_width == pytest.approx(plain.half_width)
    assert shifted.may_be_best == plain.may_be_best
    assert shifted.difference("a", "b") == pytest.approx(plain.difference("a", "b"))


def test_the_verdict_follows_the_methods_and_not_their_order():
    scores = table()
    scores[2] += 3
    found = judge("abcd", scores)
    turned = judge("dcba", scores[::-1])
    assert found.best == turned.best == "c"
    assert found.may_be_best == turned.may_be_best == ("c",)
    assert judge("abcd", 7 * scores).half_width == pytest.approx(7 * found.half_width)


def test_the_critical_value_for_two_methods_is_students():
    scores = table(shape=(2, 40, 50))
    found = judge("ab", scores)
    want = stats.t.ppf(LEVEL, found.parts.degrees) * math.sqrt(2 * found.parts.variance)
    assert found.half_width == pytest.approx(want, rel=0.02)


def test_the_critical_value_for_many_methods_is_dunnetts():
    scores = table(shape=(6, 60, 50))
    found = judge("abcdef", scores)
    correlated = stats.multivariate_normal(cov=0.5 + 0.5 * np.eye(5))  # differences to one method share it
    critical = found.half_width / math.sqrt(2 * found.parts.variance)
    assert correlated.cdf(np.full(5, critical)) == pytest.approx(LEVEL, abs=0.005)


def test_methods_that_are_alike_in_every_example_are_all_in_the_set():
    found = judge("abcd", np.broadcast_to(table()[0], (4, 3, 30)))
    assert found.half_width == 0.0
    assert found.best is None
    assert found.may_be_best == ("a", "b", "c", "d")


def test_one_seed_shows_nothing():
    scores = table(shape=(3, 1, 50))
    scores[0] += 100
    found = judge("abc", scores)
    assert found.one_seed
    assert found.best is None
    assert found.may_be_best == ("a", "b", "c")
    assert not found.is_better("a", "b")


def test_a_method_that_diverged_does_not_hide_the_others():
    scores = table(shape=(6, 3, 60), scale=0.1)
    scores[0] += 1
    clear = judge("abcdef", scores)
    assert clear.best == "a"
    assert clear.apart == ()
    draw = np.random.default_rng(3)
    scores[5] += draw.normal(0, 30, (3, 1)) - 20
    found = judge("abcdef", scores)
    assert found.apart == ("f",)
    assert found.is_better("a", "b")
    assert found.half_width < 1.5 * clear.half_width
    assert found.difference("a", "f")[1] > 10 * found.half_width


def test_what_more_seeds_and_examples_would_show():
    scores = table(shape=(8, 4, 200)) + np.random.default_rng(1).normal(0, 0.3, (8, 4, 1))
    found = judge("abcdefgh", scores)
    assert found.half_width_with(4, 200) == pytest.approx(found.half_width)
    # The spread between seeds is most of it: more examples hardly help, four times as many seeds halve it.
    assert found.half_width_with(16, 200) == pytest.approx(found.half_width / 2, rel=0.1)
    assert found.half_width_with(4, 20_000) > 0.9 * found.half_width


@pytest.mark.parametrize(
    ("names", "scores", "message"),
    [
        ("ab", np.zeros((3, 2, 5)), r"shape \(methods, seeds, examples\) for 2 methods; got \(3, 2, 5\)"),
        ("ab", np.zeros((2, 5)), r"shape \(methods, seeds, examples\)"),
        ("a", np.zeros((1, 2, 5)), "at least two methods"),
        ("ab", np.zeros((2, 2, 1)), "two examples"),
        ("ab", np.array([[[1.0, 2.0]], [[np.nan, 1.0]]]), "scores of b are not finite"),
    ],
)
def test_tables_that_cannot_be_judged(names, scores, message):
    with pytest.raises(ValueError, match=message):
        judge(names, scores)


def test_the_jackknife_of_a_mean_is_its_examples():
    values = table(shape=(1, 1, 40))[0, 0]
    assert jackknife(lambda rows: float(values[rows].mean()), 40) == pytest.approx(values)


def test_the_jackknife_gives_the_error_of_a_correlation():
    draw = np.random.default_rng(2)
    x = draw.normal(size=400)
    y = 0.6 * x + 0.8 * draw.normal(size=400)
    values = jackknife(lambda rows: float(np.corrcoef(x[rows], y[rows])[0, 1]), 400)
    r = float(np.corrcoef(x, y)[0, 1])
    assert values.mean() == pytest.approx(r, abs=0.005)
    assert values.std(ddof=1) / math.sqrt(400) == pytest.approx((1 - r**2) / math.sqrt(400), rel=0.15)
    with pytest.raises(ValueError, match="at least two examples; got 1"):
        jackknife(lambda rows: 0.0, 1)


def hits(draw, shape, gap):
    """Classification: right or wrong, by the difficulty of the example for all, for the method, and by the run."""
    methods, seeds, examples = shape
    logit = 0.5 + draw.normal(0, 2, examples) + draw.normal(0, 1, (methods, 1, examples))
    logit = logit + draw.normal(0, 0.15, (methods, seeds, 1)) + draw.normal(0, 0.1, (1, seeds, 1)) + draw.normal(0, 0.5, shape)
    found = (draw.random(shape) < 1 / (1 + np.exp(-logit))).astype(float)
    found[0] += gap
    return found


def block_losses(draw, shape, gap):
    """A language model: a block's loss depends mostly on the block."""
    methods, seeds, examples = shape
    block = draw.gamma(4, 0.25, examples)
    loss = 2 + block + draw.normal(0, 0.05, (methods, 1, examples)) + draw.normal(0, 0.01, (methods, seeds, 1))
    loss = loss + draw.normal(0, 0.01, (1, seeds, 1)) + draw.normal(0, 0.02, shape) * (1 + block)
    loss[0] -= gap
    return -loss


def rates(kind, shape, comparisons):
    """Shares of comparisons: a given equal method left out; equals called better; a gap of twice the half-width found; the
    best in the set, at that gap and at half of it."""
    draw = np.random.default_rng(7)
    names = [str(index) for index in range(shape[0])]
    equal = [judge(names, kind(draw, shape, 0.0)) for _ in range(comparisons)]
    width = float(np.median([found.half_width for found in equal]))
    apart = [judge(names, kind(draw, shape, 2 * width)) for _ in range(comparisons)]
    near = [judge(names, kind(draw, shape, width)) for _ in range(comparisons)]
    return {
        "left out": np.mean(["1" not in found.may_be_best for found in equal]),
        "called better": np.mean([found.best is not None for found in equal]),
        "found": np.mean([found.best == "0" for found in apart]),
        "best is in": np.mean(["0" in found.may_be_best for found in [*apart, *near]]),
    }


@pytest.mark.parametrize("kind", [hits, block_losses])
def test_error_rates_in_few_comparisons(kind):
    found = rates(kind, (6, 3, 98), 60)
    assert found["left out"] <= 0.15
    assert found["called better"] <= 0.05
    assert found["found"] >= 0.8
    assert found["best is in"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("examples", [98, 300])
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("methods", [6, 20])
@pytest.mark.parametrize("kind", [hits, block_losses])
def test_error_rates(kind, methods, seeds, examples):
    found = rates(kind, (methods, seeds, examples), 400)
    assert found["left out"] <= 0.06
    assert found["called better"] <= 0.01
    assert found["found"] >= 0.90
    assert found["best is in"] >= 0.95
