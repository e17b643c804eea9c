"""The verdict claims what was shown: not against a constant answer, not between methods that may both be the best."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

import tiny
from lowdim.catalogue import variant
from lowdim.comparison import CompareSettings, compare
from lowdim.comparison.judge import judge
from lowdim.comparison.judging import judge_runs
from lowdim.comparison.needed import needed
from lowdim.comparison.result import remarks, samples_of, summarise
from lowdim.comparison.verdict import cheapest, conclude
from lowdim.errors import UnknownNameError
from lowdim.records import ComparedRun, MethodRecord, Trial, difference_text, with_error
from lowdim.train.baselines import worth
from lowdim.train.metrics import METRICS
from lowdim.train.tasks import Classification

ACCURACY, F1, PERPLEXITY = METRICS["accuracy"], METRICS["f1"], METRICS["perplexity"]
LABELS = {"full": "Full fine-tuning", "lora": "LoRA", "linear-probe": "Linear probe", "untouched": "Untouched model"}


def row(name, scores, memory=100, seconds=1.0, file=10, **fields):
    return MethodRecord(
        name=name, label=LABELS.get(name, name.upper()), scores=list(scores), mean=sum(scores) / len(scores),
        measured_peak_bytes=memory, seconds_per_step=seconds, file_bytes=file, **fields,
    )  # fmt: skip


def said(means, memory, *, trivial=None, metric=ACCURACY, seeds=3, spread=0.01, prefer="memory"):
    """The conclusion on methods with these means of judged values, which differ by run and row by `spread`.

    Args:
        trivial: name -> mean and what it is.
    """
    draw = np.random.default_rng(0)
    noise = draw.normal(0, spread, (len(means) + 1, seeds, 200))
    noise -= noise.mean((1, 2), keepdims=True)  # the means are as given
    table = np.array([*means.values()])[:, None, None] + noise[:-1]
    fixed = {name: mean + noise[-1, 0] - noise[-1, 0].mean() for name, (mean, _) in (trivial or {}).items()}
    score = (lambda judged: judged) if metric.higher_is_better else (lambda judged: math.exp(-judged))
    rows = [row(name, [score(means[name])] * seeds, memory[name]) for name in means]
    rows += [row(name, [score(mean)], None, trivial=True, reason=what) for name, (mean, what) in (trivial or {}).items()]
    found = judge(list(means), table, fixed=fixed)
    return conclude(rows, found, metric, prefer), rows, found


def test_one_method_in_the_final_is_compared_with_no_other():
    """As where a time limit left no room: it beats what was never trained, and that is no difference between methods."""
    draw = np.random.default_rng(0)
    values = 0.8 + draw.normal(0, 0.01, (1, 1, 200))
    rows = [row("lora", [0.8]), row("majority", [0.5], None, trivial=True, reason="always answering yes")]
    rows.append(MethodRecord(name="full", label="Full fine-tuning", status="left", reason="no room for its final"))
    found = judge(["lora"], values, fixed={"majority": 0.5 + draw.normal(0, 0.01, 200)})
    pick, why, record = conclude(rows, found, ACCURACY)
    assert pick.name == "lora"
    assert record.headline == "Only LoRA was trained to the end, so it is compared with no other method."
    assert why == "LoRA is handed over: no other method was trained to the end."


# --- between methods -------------------------------------------------------------------------------------------------------


def test_the_best_is_handed_over_whatever_it_costs_with_the_difference_its_error_and_its_memory():
    memory = {"a": 300, "b": 100, "full": 1000}
    (pick, why, record), rows, found = said({"a": 0.816, "b": 0.80, "full": 0.79}, memory)
    assert (pick.name, record.best, record.may_be_best) == ("a", "a", ["a"])
    half = found.half_width
    by = f"1.6 ± {100 * half:.1f} points of accuracy"
    assert record.headline == f"A is better than every other method by {by}, at 0.3 x the memory of full training."
    assert record.reasons == ["A has the best mean: accuracy 0.816; B is next, with 0.800."]
    assert why == "A is handed over: no other method may be the best."
    assert record.needed == ""
    assert (record.seeds, record.examples, record.half_width, record.level) == (3, 200, half, 0.95)
    assert [r.difference for r in rows] == pytest.approx([0, -0.016, -0.026])
    assert [r.half_width for r in rows] == [None, pytest.approx(half), pytest.approx(half)]
    assert [r.may_be_best for r in rows] == [True, False, False]


def test_the_same_mean_is_not_said_to_be_behind():
    (_, _, record), _, _ = said({"a": 0.8, "b": 0.8, "c": 0.5}, {"a": 300, "b": 100, "c": 200}, spread=0)
    assert record.reasons[0] == "A has the best mean: accuracy 0.800; B has the same."


def test_of_those_that_may_be_best_the_cheapest_is_handed_over():
    means = {"a": 0.8, "b": 0.7999, "c": 0.7998, "d": 0.5}
    (pick, why, record), _, found = said(means, {"a": 300, "b": 100, "c": 200, "d": 1})
    assert (pick.name, record.best, record.may_be_best) == ("b", None, ["a", "b", "c"])
    assert record.headline == "A, B and C may be the best; B needs the least memory of them."
    behind = f"0.01 ± {100 * found.half_width:.2f}" if found.half_width < 0.001 else f"0.0 ± {100 * found.half_width:.1f}"
    assert record.reasons == [f"A has the best mean: accuracy 0.800; B, with 0.800, is {behind} points of accuracy behind."]
    assert why == "B is handed over: of the methods that may be the best it needs the least memory (100 B)."
    assert record.needed == needed(found, "accuracy") != ""
    assert said(means, {"a": 300, "b": 100, "c": 200, "d": 1}, prefer="score")[0].pick.name == "a"
    with pytest.raises(UnknownNameError, match="--prefer must be one of memory, time, size, score; got 'cost'"):
        said(means, {"a": 300, "b": 100, "c": 200, "d": 1}, prefer="cost")


def test_where_nothing_is_shown_it_is_said():
    (pick, _, record), *_ = said({"a": 0.8, "b": 0.8, "c": 0.8}, {"a": 3, "b": 1, "c": 2})
    assert (pick.name, record.headline) == (
        "b",
        "No difference is shown between the 3 methods; B needs the least memory of them.",
    )
    probe = {"linear-probe": 0.8, "b": 0.8, "c": 0.8}
    (pick, _, record), *_ = said(probe, {"linear-probe": 1, "b": 3, "c": 2})
    assert (pick.name, record.headline) == ("linear-probe", "No method is shown to be better than a linear probe.")


def test_what_is_cheapest():
    def pick(prefer, *rows):
        return cheapest(rows, prefer, lambda row: row.mean).name

    dear, slow, large = row("dear", [0.9], 5, 1.0, 1), row("slow", [0.8], 4, 2.0, 2), row("large", [0.7], 4, 1.5, 3)
    assert pick("memory", dear, slow, large) == "large", "of equal memory, the time decides"
    assert pick("time", dear, slow, large) == "dear"
    assert pick("size", dear, slow, large) == "dear"
    assert pick("score", large, dear, slow) == "dear"
    assert pick("memory", row("a", [1], 5, 1.0, file=3), row("b", [1], 5, 1.0, file=2)) == "b"
    assert pick("memory", row("a", [1], None), row("b", [1], 10**9)) == "b", "what is not known counts as most"


def test_language_models_are_judged_by_their_loss():
    (pick, _, record), *_ = said({"a": -2.9, "b": -3.0}, {"a": 2, "b": 1}, metric=PERPLEXITY)
    assert (pick.name, record.judged) == ("a", "loss")
    assert record.headline.startswith("A is better than every other method by 0.10")
    assert record.headline.endswith(" in loss.")
    assert record.reasons == [f"A has the best mean: perplexity {math.exp(2.9):.4g}; B is next, with {math.exp(3):.4g}."]


def test_one_seed_shows_nothing_and_the_cheapest_within_the_error_of_the_test_rows_is_named():
    memory = {"a": 300, "b": 200, "c": 100}
    (pick, why, record), rows, _ = said({"a": 0.8, "b": 0.7999, "c": 0.5}, memory, seeds=1)
    assert pick.name == "b", "the cheapest would be worse by more than the error of 200 rows"
    assert (record.best, record.half_width, record.may_be_best) == (None, None, ["a", "b", "c"])
    assert record.headline == (
        "One seed shows no difference between methods; of those close to the best, B needs the least memory."
    )
    assert "The spread between seeds is not known from one seed" in record.reasons[1]
    assert "of those that the test rows do not tell apart" in why
    assert all(r.may_be_best for r in rows)


def test_what_would_show_a_smaller_difference():
    draw = np.random.default_rng(2)
    found = judge("abcdef", draw.normal(0, 1, (6, 1, 100)) + np.zeros((6, 3, 1)))  # the examples are all of the error
    sentence = needed(found, "loss")
    assert sentence.startswith(
        f"Two methods that differ by less than {found.half_width:.2g} in loss cannot be told apart here;"
    )
    assert sentence.endswith("half of that would take 400 test rows instead of 100.")
    found = judge("abcdef", draw.normal(0, 1, (6, 3, 1)) + draw.normal(0, 1e-3, (6, 3, 100)))  # the seeds are
    assert needed(found, "accuracy").endswith("half of that would take 12 seeds instead of 3.")
    assert needed(judge("ab", np.zeros((2, 2, 5))), "loss") == "", "nothing differs"


def test_differences_in_words():
    assert difference_text("accuracy", 0.016, 0.0042) == "1.6 ± 0.4 points of accuracy"
    assert difference_text("f1", -0.016, 0.0004) == "-1.60 ± 0.04 points of f1 (macro)"
    assert difference_text("exact-match", 0.5) == "50.0 points of exact match"
    assert difference_text("squared error", 12.3, 4.56) == "12.3 ± 4.6 in squared error"
    assert difference_text("bits-per-byte", 0.0951, 0.0123) == "0.095 ± 0.012 in bits per byte"
    assert [with_error(1.0, width) for width in (0.95, 0.012, 2, 19.9, 0.0)] == [
        "1.00 ± 0.95", "1.000 ± 0.012", "1.0 ± 2.0", "1 ± 20", "1"
    ]  # fmt: skip


def test_an_edge_needs_three_different_rates():
    def noted(rates, chosen):
        one = row("a", [0.9, 0.8])
        one.lr, one.trials = chosen, [Trial(rate, 0.5) for rate in rates]
        return "edge" in " ".join(remarks([one]))

    assert noted([1e-4, 1e-3, 1e-2], 1e-2)
    assert not noted([1e-4, 1e-3, 1e-2], 1e-3)
    assert not noted([1e-3, 1e-2], 1e-2)
    assert not noted([1e-3, 1e-2, 1e-2], 1e-2)


# --- from the runs ---------------------------------------------------------------------------------------------------------


def measured(seed, values, method="a", **fields):
    return ComparedRun(
        fingerprint="", method=method, label=method.upper(), phase="seed", seed=seed, lr=0.1, steps=1, batch_size=1,
        metric="accuracy", environment={}, values=values, test=float(np.mean(values)) if values else None, **fields,
    )  # fmt: skip


def test_runs_are_paired_by_their_seed_whatever_their_order():
    draw = np.random.default_rng(0)
    table = draw.normal(0, 1, (2, 3, 20)) + draw.normal(0, 5, (1, 3, 20))
    runs = {
        "a": [measured(s, table[0, s].tolist()) for s in (0, 1, 2)],
        "b": [measured(s, table[1, s].tolist()) for s in (2, 0, 1)],
    }
    fixed = draw.normal(0, 1, 20).tolist()
    found, want = judge_runs(runs, {"untouched": fixed}), judge("ab", table, fixed={"untouched": fixed})
    assert found.names == ("a", "b", "untouched")
    assert found.means == pytest.approx(want.means)
    assert found.widths == pytest.approx(want.widths)


def test_a_seed_that_failed_for_one_method_counts_for_none():
    table = np.random.default_rng(1).normal(0, 1, (2, 3, 20))
    runs = {name: [measured(s, table[m, s].tolist()) for s in range(3)] for m, name in enumerate("ab")}
    runs["b"][1] = measured(1, table[1, 1].tolist(), failure="the loss became nan")
    assert judge_runs(runs).means == pytest.approx(judge("ab", table[:, [0, 2]]).means)
    runs["b"][1] = measured(1, None)
    assert judge_runs(runs).seeds == 2


def test_a_method_that_failed_too_often_is_not_judged():
    table = np.random.default_rng(1).normal(0, 1, (3, 3, 20))
    runs = {name: [measured(s, table[m, s].tolist()) for s in range(3)] for m, name in enumerate("abc")}
    runs["b"][:2] = [measured(s, None, failure="the loss became nan") for s in range(2)]
    found = judge_runs(runs)
    assert (found.names, found.seeds) == (("a", "c"), 3)
    rows = [row(name, [0.5]) for name in "abc"]
    _, _, record = conclude(rows, found, ACCURACY)
    assert record.reasons[-1] == "Not judged, since too many of its seeds failed: B."
    assert rows[1].may_be_best is None


def test_what_cannot_be_judged():
    values = [0.0, 1.0, 1.0]
    assert judge_runs({}) is None
    assert judge_runs({"a": [measured(0, values)]}) is None
    assert judge_runs({"a": [measured(0, [1.0])], "b": [measured(0, [1.0])]}) is None
    assert judge_runs({"a": [measured(0, values)], "b": [measured(0, [])]}) is None
    assert judge_runs({"a": [measured(0, values)]}, {"t": [math.inf] * 3}) is None
    assert judge_runs({"a": [measured(0, values)]}, {"t": values}).names == ("a", "t")
    assert judge_runs({"a": [measured(0, None, hits="011")], "b": [measured(0, values)]}).means == pytest.approx((2 / 3, 2 / 3))
    assert conclude([], None, ACCURACY) == (None, "", None)
    pick, why, record = conclude([row("a", [0.5])], None, ACCURACY)
    assert (
        (pick.name, record.headline) == ("a", "A is the only row with a score, so it is compared with nothing.") == ("a", why)
    )


def test_a_row_has_what_its_runs_have():
    table = [{"class": "x", "precision": 1.0, "recall": 0.5, "f1": 0.67, "count": 4}]
    seeds = [measured(s, [1.0, 0.0], size=8, by_class=table, kept=[1.5, 1.6]) for s in range(2)]
    found = summarise(variant("lora"), [], seeds, 10, None)
    assert (found.size, found.by_class, found.kept, found.interval) == (8, table, [1.5, 1.6], None)


def test_samples_stand_by_their_prompt():
    def wrote(answer, prompts=("p", "q")):
        return [{"prompt": prompt, "expected": prompt.upper(), "answer": f"{answer} {prompt}"} for prompt in prompts]

    runs = {"a": [measured(0, None, failure="no"), measured(1, [1.0], samples=wrote("a"))], "b": [measured(1, [1.0])]}
    first, second = samples_of(wrote("before"), runs)
    assert (first.prompt, first.expected, first.answers) == ("p", "P", {"untouched": "before p", "a": "a p"})
    assert second.answers == {"untouched": "before q", "a": "a q"}
    assert [sample.answers for sample in samples_of([], runs)] == [{"a": "a p"}, {"a": "a q"}]
    assert samples_of([], {}) == []


# --- against what was never trained: the sentences ---------------------------------------------------------------------------


def test_a_row_that_was_never_trained_in_the_set_is_said_first():
    trivial = {"majority-class": (0.8, "always answering the majority class, 'yes'")}
    (pick, _, record), rows, _ = said({"a": 0.8001, "b": 0.8}, {"a": 2, "b": 1}, trivial=trivial)
    assert record.headline == "No method is shown to be better than always answering the majority class, 'yes'."
    assert pick.name == "b"
    assert "--metric f1 or mcc give a constant answer no credit." in record.reasons
    assert (rows[-1].may_be_best, rows[-1].within_noise) == (True, True)


def test_nothing_is_handed_over_where_the_untouched_model_is_better():
    (pick, why, record), *_ = said(
        {"a": -3.0, "b": -3.1}, {"a": 2, "b": 1}, trivial={"untouched": (-2.0, "the untouched model")}, metric=PERPLEXITY
    )
    assert (pick, why, record.best) == (None, "", "untouched")
    assert record.headline == "Every method is shown to be worse than the untouched model."
    assert "No method is handed over: train longer, try other rates, or use more data." in record.reasons
    (pick, why, _), *_ = said(
        {"a": -3.0, "b": -3.1},
        {"a": 2, "b": 1},
        trivial={"untouched": (-2.0, "the untouched model")},
        metric=PERPLEXITY,
        seeds=1,
    )
    assert pick.name == "a", "one seed shows nothing"
    assert why == "A is handed over for its mean, but the untouched model is better on the test rows."


def test_a_method_alone_against_what_was_never_trained():
    (pick, _, record), *_ = said({"a": -3.0}, {"a": 2}, trivial={"untouched": (-4.8, "the untouched model")}, metric=PERPLEXITY)
    assert pick.name == record.best == "a"
    assert record.headline.startswith("A is better than the untouched model by 1.8")


# --- against what was never trained ----------------------------------------------------------------------------------------


def constant(labels, metric=ACCURACY, train=(0, 0, 1)):
    """The constant answer on these test labels of a task whose training part has mostly class 0."""
    part = {"labels": labels}
    task = Classification(
        train={"labels": list(train)}, validation=part, test=part, collate=dict, classes=("usual", "rare", "odd")
    )
    return task.baseline(part, metric)


def test_what_a_constant_answer_scores_by_hand():
    found = constant([0] * 19 + [1])
    assert (found.name, found.degenerate) == ("majority-class", False)
    # F1 of class 0: 2·19/(2·19 + 1) = 38/39; of class 1: 0; their mean is 19/39. Matthews' coefficient of a constant is 0.
    want = {"accuracy": 0.95, "f1": 19 / 39, "mcc": 0.0}
    assert {name: found.scores[name] for name in want} == pytest.approx(want)
    assert found.score.values == (1.0,) * 19 + (0.0,)
    assert "f1 (macro) 0.487" in found.sentence
    said = worth(found, 0.95, ACCURACY)
    assert said.startswith("accuracy 0.950 is not better than always answering the majority class, 'usual' (0.950); compare by")
    assert "f1 (macro) 0.480 is not better than" in worth(found, 0.48, F1)
    assert worth(found, 0.96, ACCURACY) is None


def test_the_constant_is_the_majority_of_training_not_of_the_test():
    assert constant([1, 1, 1, 0]).scores["accuracy"] == 0.25


def test_a_test_part_of_one_class_says_nothing():
    assert "no score on them says anything" in worth(constant([0, 0, 0]), 1.0, ACCURACY)


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path):
    """Nineteen texts of twenty have one label, which no word tells."""
    rows = [(f"{tiny.PLAIN[i % 15]} {tiny.PLAIN[i * 7 % 13]} film {tiny.PLAIN[i * 3 % 11]} {tiny.PLAIN[i // 15]}",
             "rare" if i % 20 == 0 else "usual") for i in range(200)]  # fmt: skip
    return tiny.write_jsonl(tmp_path / "uneven.jsonl", rows)


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_the_larger_class_alone_is_named_in_record_table_and_page(metric, bert_folder, uneven, tmp_path):
    said = io.StringIO()
    settings = CompareSettings(
        model=str(bert_folder), data=(str(uneven),), methods=("linear-probe",), metric=metric, seeds=1, rates=1, steps=3,
        batch_size=8, max_length=16,
    )  # fmt: skip
    record = compare(settings, tmp_path / "out", console=Console(file=said, width=300))
    (constant,) = (m for m in record["methods"] if m.get("trivial"))
    want = {"accuracy": 0.95, "f1": 19 / 39, "mcc": 0.0}
    assert {name: record["data"]["baseline"]["scores"][name] for name in want} == pytest.approx(want, abs=0.02)
    assert constant["mean"] == record["data"]["baseline"]["scores"][metric]
    assert record["judgement"]["headline"].startswith(
        "No method is shown to be better than always answering the majority class, 'usual'"
    )
    shown = METRICS[metric].title
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (said.getvalue(), page):
        assert "Majority class" in text
        assert shown in text
        assert "always answering" in text


@pytest.mark.parametrize("method", ["lora", "randlora", "full", "galore", "linear-probe", "monarch"])
def test_the_saved_size_is_that_of_the_winners_folder(method, bert_folder, two_classes, tmp_path):
    settings = CompareSettings(
        model=str(bert_folder), data=(str(two_classes),), methods=(method,), seeds=1, rates=1, steps=3, batch_size=8,
        max_length=16,
    )  # fmt: skip
    record = compare(settings, tmp_path / "out", console=Console(file=io.StringIO()))
    files = [file for file in (tmp_path / "out" / "winner").rglob("*") if file.is_file()]
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    assert record["winner"]["file_bytes"] == weights > 0
    assert record["winner"]["folder_bytes"] == sum(file.stat().st_size for file in files)
    assert next(m["file_bytes"] for m in record["methods"] if m["name"] == method) == weights
    forecast = ComparedRun.read(tmp_path / "out" / "runs" / method / "seed-0").file_bytes
    assert 0.98 * weights - 20_000 < forecast <= weights, "what a method that is not chosen shows, without the file's header"
