"""The judge: its formulas on small tables, and its error rates in comparisons whose truth is known."""

import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lowdim.comparison.judge import LEVEL, judge

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))
simulation = importlib.import_module("judge_simulation")


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
    want = stats.t.ppf(0.5 + LEVEL / 2, found.parts.degrees) * math.sqrt(2 * found.parts.variance)
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
    assert found.close == ("a",)  # by the error of the test examples alone


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


def test_a_row_that_was_never_trained_stays_out_of_the_pool():
    """One score for each example, whatever the seed: the variance is of a method's own seeds and of the examples' gaps."""
    draw = np.random.default_rng(4)
    scores = table(shape=(4, 3, 60), scale=0.1) + draw.normal(0, 0.2, (4, 3, 1)) + draw.normal(0, 0.3, (1, 3, 1))
    row = draw.normal(0, 1, 60)
    methods, seeds, examples = scores.shape
    found, without = judge("abcd", scores, fixed={"row": row}), judge("abcd", scores)
    assert found.names == ("a", "b", "c", "d", "row")
    assert found.parts == without.parts
    # Mean squares over a method's own seeds, averaged over the methods: by their definition.
    m, ms, me = scores.mean((1, 2)), scores.mean(2), scores.mean(1)
    own_seed = examples * sum((ms[i, j] - m[i]) ** 2 for i in range(methods) for j in range(seeds)) / (methods * (seeds - 1))
    rest = sum(
        (scores[i, j, k] - ms[i, j] - me[i, k] + m[i]) ** 2
        for i, j, k in itertools.product(range(methods), range(seeds), range(examples))
    ) / (methods * (seeds - 1) * (examples - 1))
    gap = me[1] - row
    example = seeds * ((gap - gap.mean()) ** 2).sum() / (examples - 1)
    # Seeds are shared: a part of the spread over seeds is common to all methods and counts once.
    z = ms.mean(0)
    common = examples * ((z - z.mean()) ** 2).sum() / (seeds - 1)
    df = (seeds - 1, (methods - 1) * (seeds - 1), examples - 1, (seeds - 1) * (examples - 1))
    total = own_seed + example - rest
    below = sum(s**2 / f for s, f in zip((common, own_seed - common, example, rest), df, strict=True))
    gap_and_width = found.difference("b", "row")
    assert gap_and_width[0] == pytest.approx(scores[1].mean() - row.mean())
    critical = gap_and_width[1] / math.sqrt(total / (seeds * examples))
    # Dunnett's for five rows at these degrees of freedom, which are rounded down.
    degrees = math.floor(4 * total**2 / below) / 4
    normal = np.random.default_rng(5).standard_normal((200_000, 5))
    largest = (normal[:, 1:] - normal[:, :1]).max(1) / np.sqrt(
        2 * np.random.default_rng(6).chisquare(degrees, 200_000) / degrees
    )
    assert critical == pytest.approx(np.quantile(largest, LEVEL), rel=0.03)


def test_one_method_against_what_was_never_trained():
    draw = np.random.default_rng(0)
    scores = draw.normal(0, 0.1, (1, 3, 100))
    found = judge("a", scores + 1, fixed={"row": draw.normal(0, 0.1, 100)})
    assert found.best == "a"
    assert found.difference("a", "row") == (pytest.approx(1.0, abs=0.05), found.half_width)
    assert judge("a", scores, fixed={"row": scores.mean((0, 1))}).may_be_best == ("a", "row")


def test_two_fixed_rows_differ_by_their_examples_alone():
    draw = np.random.default_rng(1)
    one, two = draw.normal(0, 1, (2, 50))
    found = judge("ab", table(shape=(2, 3, 50)), fixed={"one": one, "two": two})
    want = math.sqrt((one - two).var(ddof=1) / 50)
    assert found.difference("one", "two")[1] / want == pytest.approx(
        stats.t.ppf(0.5 + LEVEL / 2, 49), rel=0.15
    )  # Dunnett's for four rows


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


def test_a_fixed_row_must_fit_the_table():
    with pytest.raises(ValueError, match="fixed row t must have a score for each of the 30 examples; got 3"):
        judge("abcd", table(), fixed={"t": [0.0, 1.0, 0.0]})
    with pytest.raises(ValueError, match="scores of t are not finite"):
        judge("abcd", table(), fixed={"t": [math.inf] * 30})


KINDS = [simulation.hits, simulation.block_losses]
#: At most so many, or at least: of a few comparisons, which scatter, and of the full number.
FEW = {"left_out": 0.15, "row_left_out": 0.15, "called_better": 0.05, "found": 0.8, "best_is_in": 0.95}
MANY = {"left_out": 0.06, "row_left_out": 0.06, "called_better": 0.01, "found": 0.90, "best_is_in": 0.95}


def check(found, bounds):
    for name, share in found.items():
        assert share <= bounds[name] if name in ("left_out", "row_left_out", "called_better") else share >= bounds[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_error_rates_in_few_comparisons(kind):
    check(simulation.rates(kind, (6, 3, 98), 60), FEW)


@pytest.mark.parametrize("row", [simulation.untouched_row, simulation.constant_row])
def test_error_rates_with_a_row_that_was_never_trained_in_few_comparisons(row):
    check(simulation.rates_with_a_row(row, (6, 2, 98), 60), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [98, 300])
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("methods", [6, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_error_rates(kind, methods, seeds, examples):
    check(simulation.rates(kind, (methods, seeds, examples), 400), MANY)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 3, 300), (20, 2, 98)])
@pytest.mark.parametrize("kind", [simulation.f1_values, simulation.correlations, simulation.uneven])
def test_error_rates_of_jackknife_values_and_of_methods_without_a_spread_over_seeds(kind, shape):
    check(simulation.rates(kind, shape, 400), {**MANY, "found": 0.85})


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 2, 98), (6, 3, 300), (20, 3, 98)])
@pytest.mark.parametrize("row", [simulation.untouched_row, simulation.constant_row])
def test_error_rates_with_a_row_that_was_never_trained(row, shape):
    check(simulation.rates_with_a_row(row, shape, 400), MANY)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [6, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_error_rates_where_the_judge_looks_after_every_round(kind, methods):
    check(simulation.rates_in_rounds(kind, (methods, 5, 98), 400), {**MANY, "left_out": 0.08})


def test_the_record_of_the_simulation_holds_what_is_claimed():
    record = json.loads((BENCH.parent / "results" / "judge-simulation.json").read_text())
    rows = record["rows"]
    assert record["comparisons"] == 400
    for row in rows:
        bounds = {**MANY, "left_out": 0.08} if row["what"].startswith("rounds") else MANY
        if row["scores"] not in ("hits", "block_losses"):
            bounds = {**bounds, "found": 0.85}
        check({name: row[name] for name in MANY if name in row}, bounds)
    fixed = {(row["scores"], row["methods"], row["seeds"]) for row in rows if row["what"] == "fixed seeds"}
    assert {(kind.__name__, methods, seeds) for kind in KINDS for methods in (6, 20) for seeds in (2, 3)} <= fixed
