"""The sentences claim what the numbers allow, and no more."""

from fake import comparison

from lowdim.report.reading import read
from lowdim.report.sentences import caveats, headline


def _record(*methods, **others):
    return {"metric": {"name": "accuracy", "higher_is_better": True}, "methods": list(methods), **others}


def _method(name, mean, peak=100 * 2**20, **others):
    return {"name": name, "label": name.upper(), "status": "ok", "within_noise": False, "mean": mean, "scores": [mean] * 5,
            "interval": [mean - 0.01, mean + 0.01], "measured_peak_bytes": peak, **others}  # fmt: skip


def _said(record):
    return " ".join(caveats(read(record)))


def test_a_clear_winner_wins():
    record = _record(_method("a", 0.7), _method("b", 0.8), winner={"method": "b"})
    assert headline(read(record)) == ("B wins", "Accuracy 0.800 [0.790, 0.810], 100 MiB peak memory, the highest of 2 methods.")


def test_where_all_are_within_noise_that_is_said_first():
    record = _record(_method("a", 0.79, 60 * 2**20, within_noise=True), _method("b", 0.8), winner={"method": "a"})
    verdict, rest = headline(read(record))
    assert verdict == "No difference was shown"
    assert rest == (
        "All 2 methods are within noise of B, accuracy 0.800 [0.790, 0.810]. "
        "A is the pick, 60.0 MiB peak memory, accuracy 0.790, at 0.60× its memory."
    )
    assert "No method differs from B by more than noise" in _said(record)


def test_some_within_noise_are_named():
    near = _method("a", 0.79, 60 * 2**20, within_noise=True)
    record = _record(near, _method("b", 0.8), _method("c", 0.5), winner={"method": "b"})
    verdict, rest = headline(read(record))
    assert verdict == "B scores best"
    assert rest.endswith("A is within noise of it at 0.60× the memory.")
    near["measured_peak_bytes"] = 10**9
    assert headline(read(record))[1].endswith("A is within noise of it.")  # more memory is nothing to recommend it


def _trivial(mean, within_noise):
    what = "always answering the majority class, 'usual'"
    return {**_method("majority-class", mean, None, scores=[mean], interval=None), "label": "Majority class", "trivial": True,
            "baseline": True, "within_noise": within_noise, "reason": what}  # fmt: skip


def test_a_best_that_is_no_better_than_a_constant_answer_is_not_praised():
    record = _record(_method("a", 0.95), _method("b", 0.94), _trivial(0.95, True), winner={"method": "a"})
    verdict, rest = headline(read(record))
    assert verdict == "No method is clearly better than majority class"
    assert rest.startswith(
        "Always answering the majority class, 'usual' gives accuracy 0.950; the best method, A, has accuracy"
    )
    assert "f1 (macro) or mcc" in rest
    record["metric"] = {"name": "f1", "higher_is_better": True}
    assert "f1 (macro) 0.950" in headline(read(record))[1]
    assert "Compare by" not in headline(read(record))[1]


def test_a_trivial_row_is_no_candidate():
    record = _record(_method("a", 0.97), _method("b", 0.9), _trivial(0.5, False), winner={"method": "a"})
    assert headline(read(record)) == ("A wins", "Accuracy 0.970 [0.960, 0.980], 100 MiB peak memory, the highest of 2 methods.")
    assert _said(record) == ""
    alone = read(_record(_trivial(0.99, True)))
    assert (alone.best, alone.baseline, headline(alone)[0]) == (None, None, "Nothing was compared")


def test_nobody_wins_on_one_seed_or_without_a_word_on_noise():
    for first in (_method("a", 0.7, scores=[0.7]), _method("a", 0.7, within_noise=None)):
        record = _record(first, _method("b", 0.8, within_noise=None), winner={"method": "b"})
        assert headline(read(record))[0] == "B scores best"


def test_a_pick_that_is_not_the_best_says_so():
    near = _method("a", 0.79, 50 * 2**20, within_noise=True)
    record = _record(near, _method("b", 0.8), _method("c", 0.5), winner={"method": "a"})
    verdict, rest = headline(read(record))
    assert verdict == "A is the pick"
    assert "within noise of the highest score (B, 0.800), at 0.50× its memory" in rest
    near["within_noise"] = False
    assert "behind the highest score (B, 0.800)" in headline(read(record))[1]


def test_lower_is_better_turns_the_order():
    record = _record(_method("a", 21.5), _method("b", 19.2), metric={"name": "perplexity", "higher_is_better": False})
    verdict, rest = headline(read(record))
    assert verdict == "B wins"
    assert "Perplexity 19.20" in rest
    assert "the lowest of 2 methods" in rest


def test_the_baseline_is_named():
    record = _record(_method("full", 0.75, baseline=True), _method("b", 0.8), winner={"method": "b"})
    assert headline(read(record))[1].endswith("The baseline, FULL, reaches 0.750.")


def test_nothing_finished():
    failed, skipped = {"name": "a", "status": "failed"}, {"name": "b", "status": "skipped"}
    assert headline(read(_record(failed, skipped, failed))) == (
        "No method finished",
        "2 failed and 1 was skipped; the reasons are below.",
    )
    assert headline(read({}))[0] == "Nothing was compared"


def test_seeds_are_counted_honestly():
    one = _record(_method("a", 0.8, scores=[0.8]), _method("b", 0.7, scores=[0.7]))
    assert "may be luck" in _said(one)
    assert "3 seeds for each method" in _said(comparison())
    mixed = _record(_method("a", 0.8, scores=[0.8] * 2), _method("b", 0.7))
    assert "between 2 and 5 seeds" in _said(mixed)
    assert "seed" not in _said(_record(_method("a", 0.8), _method("b", 0.7)))


def test_the_test_sets_own_error_is_stated():
    record = _record(_method("a", 0.8), data={"test": 400})
    assert "±0.039" in _said(record)  # 1.96 · sqrt(0.8 · 0.2 / 400)
    assert "±" not in _said(_record(_method("a", 0.8), data={"test": 10**7}))


def test_diverged_edge_budget_and_forecast_are_stated():
    trials = [{"lr": 1e-4, "score": 0.6}, {"lr": 1e-3, "score": 0.7}, {"lr": 1e-2, "score": 0.8}]
    loss = {"seed": 0, "step": [1, 2], "loss": [0.7, float("inf")]}
    record = _record(
        _method("a", 0.8, lr=1e-2, trials=trials, curves=[loss], forecast_peak_bytes=150 * 2**20), budget_bytes=2**20
    )
    said = _said(record)
    assert "A: its best learning rate was the smallest or largest one tried" in said
    assert "A: the training loss was not finite" in said
    assert "A: measured peak memory is above the budget of 1.00 MiB" in said
    assert "off by up to 50% (A)" in said
    assert "A: 1 of 4 runs failed: boom" in _said(_record(_method("a", 0.8, reason="1 of 4 runs failed: boom")))
    quiet = _record(_method("a", 0.8, lr=1e-3, trials=trials, forecast_peak_bytes=101 * 2**20))
    assert _said(quiet) == ""


def test_an_edge_needs_three_rates():
    def edge(rates, chosen, failed=()):
        trials = [{"lr": r, "score": None if r in failed else 0.5} for r in rates]
        return "smallest or largest one tried" in _said(_record(_method("a", 0.8, lr=chosen, trials=trials)))

    assert not edge([1e-3], 1e-3)
    assert not edge([1e-3, 1e-2], 1e-2)
    assert not edge([1e-3, 1e-3, 1e-2], 1e-2)  # the same rate twice
    assert edge([1e-4, 1e-3, 1e-2], 1e-2)
    assert edge([1e-4, 1e-3, 1e-2], 1e-4)
    assert not edge([1e-4, 1e-3, 1e-2], 1e-3)
    assert not edge([1e-4, 1e-3, 1e-2, 1e-1], 1e-2, failed=[1e-1])  # a larger rate was tried and failed


def test_scores_have_the_digits_that_tell_them_apart():
    def shown(*means):
        record = read(_record(*(_method(f"m{i}", m) for i, m in enumerate(means))))
        return [record.score(m) for m in means]

    assert shown(0.9501, 0.91) == ["0.950", "0.910"]
    assert shown(0.9501, 0.9502) == ["0.9501", "0.9502"]
    assert shown(0.95, 0.95) == ["0.950", "0.950"]
    assert shown(0.9500000001, 0.95) == ["0.950", "0.950"]
    assert shown(12.864, 12.861) == ["12.864", "12.861"]
    assert shown(2.6e12, 47.87) == ["2.6e12", "47.9"]
