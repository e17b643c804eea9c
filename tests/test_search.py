"""Successive halving: what goes on, what it costs, and that it finds what an exhaustive search finds."""

import numpy as np
import pytest

from lowdim.comparison import search as searching
from lowdim.comparison.judge import judge
from lowdim.comparison.search import Candidate, one_by_one, rungs_of

EXAMPLES = 50


def halve(found, steps, advance, **how):
    """With a function that trains one candidate."""
    return searching.halve(found, steps, one_by_one(advance), **how)


def candidates(methods, rates=3):
    return [Candidate(name, 10.0**-power) for name in methods for power in range(1, rates + 1)]


def scored(table, noise=0.1):
    """`advance` over final scores by candidate name: half of the gap is there at once, the rest comes with the steps."""
    base = np.random.default_rng(0).normal(0, 1, EXAMPLES)
    calls = []

    def advance(candidate, steps):
        calls.append((candidate, steps))
        value = table[candidate.name]
        if value is None:
            return None
        draw = np.random.default_rng([steps, *candidate.name.encode()])
        return value - 1 / np.sqrt(steps) + base + draw.normal(0, noise, EXAMPLES)

    advance.calls = calls
    return advance


def table(found, **finals):
    """The middle rate is a method's best."""
    return {c.name: finals[c.method] - abs(np.log10(c.lr) + 2) for c in found}


def test_the_rungs_double_up_to_the_end():
    assert rungs_of(1600) == (100, 200, 400, 800, 1600)
    assert rungs_of(100) == (6, 12, 25, 50, 100)
    assert rungs_of(20) == (2, 5, 10, 20)
    assert rungs_of(6) == (2, 3, 6)
    assert rungs_of(5) == (2, 5)
    assert rungs_of(40) == (2, 5, 10, 20, 40)


def test_each_candidate_goes_on_from_where_it_was_and_half_leave():
    found = candidates("abcdef")
    advance = scored(table(found, a=3, b=2, c=1, d=0, e=-1, f=-2))
    search = halve(found, 160, advance)
    steps = {}
    for candidate, rung in advance.calls:
        steps.setdefault(candidate, []).append(rung)
    assert all(taken == list(rungs_of(160)[: len(taken)]) for taken in steps.values())
    alive = [sum(visit.rung == rung for visit in search.visits) for rung in range(5)]
    # At first also the best of the two worst methods; later those leave, too, that are clearly worse than the second.
    assert alive == [18, 11, 4, 2, 2]
    assert search.survivors[0] == Candidate("a", 0.01)
    assert search.best_of("f") == Candidate("f", 0.01)
    assert search.best_of("g") is None
    trained = sum(taken[-1] for taken in steps.values())
    assert search.steps == trained
    assert search.exhaustive_steps == 18 * 160


@pytest.mark.parametrize(("methods", "rates"), [(6, 3), (19, 3), (19, 6), (12, 4)])
def test_it_takes_a_quarter_of_the_steps(methods, rates):
    names = [chr(97 + index) for index in range(methods)]
    found = candidates(names, rates)
    search = halve(found, 160, scored(table(found, **{name: -index for index, name in enumerate(names)})))
    assert search.steps <= search.exhaustive_steps / 4


def test_the_best_of_every_method_reaches_the_second_rung():
    found = candidates("ab", 8)
    finals = table(found, a=100, b=0)
    search = halve(found, 160, scored(finals))
    second = {visit.candidate.method for visit in search.visits if visit.rung == 1}
    third = {visit.candidate.method for visit in search.visits if visit.rung == 2}
    assert second == {"a", "b"}
    assert third == {"a"}
    stayed = next(v for v in search.visits if v.candidate.method == "b" and v.rung == 0 and v.goes_on)
    assert stayed.candidate == Candidate("b", 0.01)
    assert stayed.reason == "the best of its method goes on to the second rung"
    assert all(visit.goes_on or visit.reason for visit in search.visits)


def test_rows_that_always_stand_are_trained_to_the_end():
    found = candidates("abcd")
    search = halve(found, 160, scored(table(found, a=9, b=8, c=7, d=-50)), always={"d"})
    assert search.survivors[-1] == Candidate("d", 0.01)
    assert {c.method for c in search.survivors} >= {"a", "d"}


def test_a_second_candidate_gives_way_to_another_method_that_is_as_good():
    finals = {"a/lr-0.1": 1.001, "a/lr-0.01": 1.0, "a/lr-0.001": 0.999, "b/lr-0.1": 0.998, "b/lr-0.01": 0.5, "b/lr-0.001": 0.5}
    search = halve(candidates("ab"), 160, scored(finals))
    assert {c.method for c in search.survivors} == {"a", "b"}
    clear = {**finals, "b/lr-0.1": 0.6}
    assert {c.method for c in halve(candidates("ab"), 160, scored(clear, noise=0.01)).survivors} == {"a"}


def test_a_candidate_that_fails_leaves_with_its_reason():
    found = candidates("ab")
    finals = {**table(found, a=2, b=1), "a/lr-0.1": None}
    search = halve(found, 160, scored(finals))
    (failed,) = [visit for visit in search.visits if visit.candidate.name == "a/lr-0.1"]
    assert (failed.score, failed.goes_on, failed.reason) == (None, False, "its training failed")
    everything = halve(found, 160, scored(dict.fromkeys(finals)))
    assert everything.survivors == []
    assert len(everything.visits) == 6


def test_rates_widen_outward_while_the_edge_wins():
    scale = [10.0**-power for power in range(7)]

    def widen(candidate, upward):
        place = min(range(7), key=lambda i: abs(scale[i] - candidate.lr)) + (-1 if upward else 1)
        return Candidate(candidate.method, scale[place]) if 0 <= place < 7 else None

    found = [Candidate("a", rate) for rate in (1e-3, 1e-4)] + [Candidate("b", rate) for rate in (1e-2, 1e-3, 1e-4)]
    finals = {Candidate(m, rate).name: -abs(np.log10(rate) - best) for m, best in (("a", -1), ("b", -3)) for rate in scale}
    search = halve(found, 160, scored(finals, noise=0.01), widen=widen)
    tried = {method: {v.candidate.lr for v in search.visits if v.candidate.method == method} for method in "ab"}
    assert tried["a"] == {1e-4, 1e-3, 1e-2, 1e-1, 1.0}  # up to the first that is worse
    assert tried["b"] == {1e-4, 1e-3, 1e-2}
    assert search.best_of("a").lr == pytest.approx(0.1)
    assert search.exhaustive_steps == 8 * 160
    found = [Candidate("c", 1e-3), Candidate("c", 1e-4)]
    finals = {Candidate("c", rate).name: np.log10(rate) for rate in [10.0**power for power in range(-5, 9)]}
    endless = halve(found, 160, scored(finals, noise=0.01), widen=lambda c, up: Candidate("c", float(f"{c.lr * 10:.0e}")))
    assert max(v.candidate.lr for v in endless.visits) == pytest.approx(1e2), "five more, and no further"


@pytest.mark.parametrize(("lead", "widens"), [(0.0, False), (0.1, False), (1.0, True)])
def test_an_edge_widens_where_it_wins_by_more_than_its_error(lead, widens):
    """Its values differ from its neighbour's by ±1, so two standard errors are about 2 / sqrt(EXAMPLES)."""
    apart = np.resize([1.0, -1.0], EXAMPLES)
    assert (lead > 2 / np.sqrt(EXAMPLES - 1)) == widens
    asked = []
    halve(
        [Candidate("a", rate) for rate in (1e-2, 1e-3, 1e-4)],
        160,
        lambda candidate, steps: lead + apart if candidate.lr == 1e-2 else np.zeros(EXAMPLES),
        widen=lambda candidate, upward: asked.append(candidate),
    )
    assert bool(asked) == widens


@pytest.mark.parametrize("best", [0.5, 5e-3, 1e-6])
def test_a_rate_of_another_origin_widens_nothing_and_stops_no_widening(best):
    """With a measured rate the usual ones are those that are tried without it, wherever it lies and however good it is."""
    usual = [Candidate("a", rate) for rate in (1e-2, 1e-3, 1e-4)]

    def advance(candidate, steps):
        value = 9.0 if candidate.origin else -abs(np.log10(candidate.lr) + 0.5)
        return value + np.zeros(EXAMPLES)

    def widen(candidate, upward):
        return Candidate(candidate.method, candidate.lr * (10 if upward else 0.1))

    def tried(found):
        return [v.candidate for v in halve(found, 160, advance, widen=widen).visits if v.rung == 0 and not v.candidate.origin]

    measured = Candidate("a", best, origin="curvature")
    assert tried([*usual, measured]) == tried(usual)
    assert len(tried(usual)) > len(usual), "they do widen"
    search = halve([*usual, measured], 160, advance, widen=widen)
    assert search.survivors[0].origin == "curvature"
    assert Candidate("a", best) == measured, "the origin makes no other candidate"


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="needs different candidates; got \\[\\]"):
        halve([], 100, scored({}))
    with pytest.raises(ValueError, match="needs different candidates"):
        halve([Candidate("a", 0.1)] * 2, 100, scored({}))


def world(draw, methods, rates):
    """Candidates whose learning curves cross: what is good at the end may be slow; the best rate is at random."""
    final = draw.normal(0, 0.05, methods)
    found = [Candidate(f"m{i}", 10.0**-power) for i in range(methods) for power in range(rates)]
    example = draw.normal(0, 0.5, EXAMPLES)
    curves = {}
    for place in range(methods):
        best = draw.integers(rates)
        for k, c in enumerate(c for c in found if c.method == f"m{place}"):
            lost = 0.0 if k == best else abs(draw.normal(0, 0.1))
            curves[c] = (
                final[place] - lost,
                abs(draw.normal(0.6, 0.2)),
                draw.uniform(0.4, 0.8),
                draw.normal(0, 0.05, EXAMPLES),
            )
    noise = int(draw.integers(2**31))

    def value(candidate, steps, seed=0):
        end, far, power, own = curves[candidate]
        run = np.random.default_rng([noise, steps, seed, *candidate.name.encode()])
        return end - far * steps**-power + example + own + run.normal(0, 0.01) + run.normal(0, 0.06, EXAMPLES)

    return found, value


def share_that_holds_a_member(methods, rates, comparisons):
    """Of comparisons in which a survivor of halving is in the set of methods that an exhaustive search ends with."""
    draw, held, cost = np.random.default_rng(3), 0, []
    for _ in range(comparisons):
        found, value = world(draw, methods, rates)
        search = halve(found, 160, value)
        cost.append(search.steps / search.exhaustive_steps)
        own = [[c for c in found if c.method == f"m{i}"] for i in range(methods)]
        best = [max(each, key=lambda c: value(c, 160).mean()) for each in own]
        final = judge([c.method for c in best], np.stack([[value(c, 160, 1 + seed) for seed in range(3)] for c in best]))
        held += any(c.method in final.may_be_best for c in search.survivors)
    return held / comparisons, max(cost)


def test_halving_finds_a_member_of_the_exhaustive_set_in_few_comparisons():
    held, cost = share_that_holds_a_member(6, 3, 25)
    assert held >= 0.9
    assert cost <= 0.25


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "rates"), [(6, 3), (20, 3), (19, 6)])
def test_halving_finds_a_member_of_the_exhaustive_set(methods, rates):
    held, cost = share_that_holds_a_member(methods, rates, 400)
    assert held >= 0.95
    assert cost <= 0.25
