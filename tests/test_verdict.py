"""The verdict claims what was shown: not against a constant answer, not between methods within noise."""

import io

import pytest
from rich.console import Console

import tiny
from lowdim.compare import CompareSettings, compare
from lowdim.compare.result import equals, mark, remarks
from lowdim.compare.trivial import trivial_rows
from lowdim.compare.verdict import cheapest, verdict
from lowdim.records import MethodRecord, Trial
from lowdim.train.baselines import Majority, majority, worth
from lowdim.train.metrics import METRICS
from lowdim.train.tasks import Score, Task

ACCURACY, F1, PERPLEXITY = METRICS["accuracy"], METRICS["f1"], METRICS["perplexity"]


def row(name, scores, memory=100, seconds=1.0, file=10, hits=None):
    return MethodRecord(
        name=name, label=name.upper(), scores=list(scores), mean=sum(scores) / len(scores), measured_peak_bytes=memory,
        seconds_per_step=seconds, file_bytes=file, hits=list(hits or [""] * len(scores)),
    )  # fmt: skip


def decided(rows, metric):
    best = mark(rows, metric)
    return verdict(best, rows, metric)


# --- between methods -------------------------------------------------------------------------------------------------------


def test_where_all_are_within_noise_it_is_said_first_and_the_cheapest_is_handed_over():
    rows = [row("a", [0.90, 0.92, 0.91], 300), row("b", [0.92, 0.90, 0.905], 100), row("c", [0.89, 0.93, 0.90], 200)]
    pick, why = decided(rows, ACCURACY)
    assert pick.name == "b"
    assert why.startswith("No difference was shown between the 3 methods: all are within noise of A (accuracy 0.910")
    assert (
        "B is handed over as the cheapest (least peak memory, then time per step, then file size), 100 B, accuracy 0.908" in why
    )


def test_what_is_cheapest():
    assert cheapest([row("a", [1], 5), row("b", [1], 4)]).name == "b"
    assert cheapest([row("a", [1], 5, seconds=2.0), row("b", [1], 5, seconds=1.0)]).name == "b"
    assert cheapest([row("a", [1], 5, 1.0, file=3), row("b", [1], 5, 1.0, file=2)]).name == "b"
    assert cheapest([row("a", [1], None), row("b", [1], 10**9)]).name == "b"  # what is not known counts as most


def test_a_difference_that_was_shown():
    rows = [row("a", [0.90, 0.92, 0.91], 300), row("b", [0.50, 0.51, 0.52], 100)]
    pick, why = decided(rows, ACCURACY)
    assert (pick.name, why) == ("a", "A is best: accuracy 0.910 over 3 seeds")
    rows.append(row("c", [0.92, 0.90, 0.905], 50))
    pick, why = decided(rows, ACCURACY)
    assert pick.name == "a"
    assert why.endswith("has the best score; within noise of it: C")
    pick, why = decided(rows[:1], ACCURACY)
    assert why.endswith("is the only method with a score")


def test_one_seed_hands_over_what_the_test_texts_do_not_tell_from_the_best():
    good, equal, bad = "1" * 90 + "0" * 10, "1" * 89 + "0" * 11, "1" * 50 + "0" * 50
    rows = [row("a", [0.9], 300, hits=[good]), row("b", [0.89], 200, hits=[equal]), row("c", [0.5], 100, hits=[bad])]
    pick, why = decided(rows, ACCURACY)
    assert [r.name for r in equals(rows[0], rows)] == ["a", "b"]
    assert pick.name == "b", "the cheapest would be worse by 40 texts of 100"
    assert why.startswith("No difference was shown")
    models = [row("a", [47.0], 300), row("b", [47.3], 200), row("c", [90.0], 100)]
    assert decided(models, PERPLEXITY)[0].name == "b", "and of language models, one within a per cent"


def test_an_edge_needs_three_different_rates():
    def said(rates, chosen):
        one = row("a", [0.9, 0.8])
        one.lr, one.trials = chosen, [Trial(rate, 0.5) for rate in rates]
        return "edge" in " ".join(remarks(one, [one], 3))

    assert said([1e-4, 1e-3, 1e-2], 1e-2)
    assert not said([1e-4, 1e-3, 1e-2], 1e-3)
    assert not said([1e-3, 1e-2], 1e-2)
    assert not said([1e-3, 1e-2, 1e-2], 1e-2)


# --- against what was never trained ----------------------------------------------------------------------------------------


def answers(labels, train=None):
    """A task of these test labels whose training part has mostly class 0."""
    parts = {"labels": list(train or [0, 0, 1])}
    return Task("classify", parts, {"labels": labels}, {"labels": labels}, lambda rows: {}, 8, ("usual", "rare", "odd"))


def test_what_a_constant_answer_scores_by_hand():
    labels = [0] * 19 + [1]
    found = majority(answers(labels), {"labels": labels})
    assert (found.name, found.share, found.classes) == ("usual", 0.95, 2)
    # F1 of class 0: 2·19/(2·19 + 1) = 38/39; of class 1: 0; their mean is 19/39. Matthews' coefficient of a constant is 0.
    assert found.scores == pytest.approx({"accuracy": 0.95, "f1": 19 / 39, "mcc": 0.0})
    assert found.hits == (1,) * 19 + (0,)
    assert "f1 (macro) 0.487" in found.sentence
    said = worth(found, 0.95, ACCURACY)
    assert said.startswith("accuracy 0.950 is not better than always answering 'usual' (0.950); compare by --metric f1 or mcc")
    assert "f1 (macro) 0.480 is not better than always answering 'usual' (0.487)" in worth(found, 0.48, F1)
    assert worth(found, 0.96, ACCURACY) is None


def test_the_constant_is_the_majority_of_training_not_of_the_test():
    labels = [1, 1, 1, 0]
    assert majority(answers(labels), {"labels": labels}).scores["accuracy"] == 0.25


def test_a_test_part_of_one_class_says_nothing():
    found = majority(answers([0, 0, 0]), {"labels": [0, 0, 0]})
    assert worth(found, 1.0, ACCURACY) == "all texts have the class 'usual': no score on them says anything"
    assert majority(Task("causal-lm", [], [], [], len, 8), [1]) is None


@pytest.mark.parametrize(
    ("metric", "constant", "score"),
    [
        (ACCURACY, 0.95, [0.95]),
        (ACCURACY, 0.95, [0.95, 0.95, 0.95]),
        (ACCURACY, 0.95, [0.94, 0.93, 0.95]),
        (F1, 0.487, [0.487]),
    ],
)
def test_a_best_that_is_no_better_than_a_constant_is_not_praised(metric, constant, score):
    hits = (1,) * 19 + (0,)
    trivial = trivial_rows(metric, Majority("usual", 0.95, {metric.name: constant}, hits, 2), None)
    rows = [row("a", score, hits=["1" * 19 + "0"] * len(score)), *trivial]
    pick, why = decided(rows, metric)
    assert pick.name == "a"
    assert why.startswith(
        f"No method is clearly better than always answering the majority class, 'usual' ({metric.title} {constant:.3f})"
    )
    assert ("--metric f1 or mcc" in why) == (metric is ACCURACY)
    assert "is best" not in why


def test_a_best_that_is_better_than_a_constant_and_the_untouched_model():
    trivial = trivial_rows(ACCURACY, Majority("usual", 0.5, {"accuracy": 0.5}, (1, 0) * 50, 2), None)
    rows = [row("a", [0.9], hits=["1" * 90 + "0" * 10]), *trivial]
    assert decided(rows, ACCURACY)[1].startswith("A (accuracy 0.900 over 1 seed) is the only method")
    assert not trivial[0].pareto
    for score, praised in (([60.0], True), ([99.5], False), ([130.0], False), ([99.0, 101.0], False), ([60.0, 61.0], True)):
        rows = [row("a", score), *trivial_rows(PERPLEXITY, None, Score(100.0))]
        _, why = decided(rows, PERPLEXITY)
        assert why.startswith("No method is clearly better than the untouched model (perplexity 100.000)") != praised
        assert ("Train longer" in why) != praised


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
        model=str(bert_folder), data=(str(uneven),), methods=("linear-probe",), metric=metric, seeds=1, trials=1, steps=3,
        batch_size=8, max_length=16,
    )  # fmt: skip
    record = compare(settings, tmp_path / "out", console=Console(file=said, width=300))
    (constant,) = (m for m in record["methods"] if m.get("trivial"))
    want = {"accuracy": 0.95, "f1": 19 / 39, "mcc": 0.0}
    assert record["data"]["majority"]["scores"] == pytest.approx(want, abs=0.02)
    assert constant["mean"] == record["data"]["majority"]["scores"][metric]
    assert record["winner"]["why"].startswith("No method is clearly better than always answering the majority class, 'usual'")
    shown = METRICS[metric].title
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (said.getvalue(), page):
        assert "Majority class" in text
        assert shown in text
        assert "always answering" in text
    assert "No method is clearly better than majority class" in page


@pytest.mark.parametrize("method", ["lora", "randlora", "full", "galore", "linear-probe", "monarch"])
def test_the_saved_size_is_that_of_the_winners_folder(method, bert_folder, two_classes, tmp_path):
    settings = CompareSettings(
        model=str(bert_folder), data=(str(two_classes),), methods=(method,), seeds=1, trials=1, steps=3, batch_size=8,
        max_length=16,
    )  # fmt: skip
    record = compare(settings, tmp_path / "out", console=Console(file=io.StringIO()))
    files = [file for file in (tmp_path / "out" / "winner").rglob("*") if file.is_file()]
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    assert record["winner"]["file_bytes"] == weights > 0
    assert record["winner"]["folder_bytes"] == sum(file.stat().st_size for file in files)
    assert next(m["file_bytes"] for m in record["methods"] if m["name"] == method) == weights
