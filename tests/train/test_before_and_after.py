"""A run is measured before and after training: both held-out parts, classes, samples, and the text to keep."""

import math

import pytest
import torch

from lowdim import models
from lowdim.records import RunRecord
from lowdim.train.keeping import Kept
from lowdim.train.loading import load_task, recipe_processor
from lowdim.train.measuring import Measured, doubts, measure, samples
from lowdim.train.recipes import Recipe
from lowdim.train.run import load_run, run_recipe
from lowdim.train.tasks.base import Score


def recipe(model, data, out, **changes):
    common = {"model": str(model), "data": str(data), "out": str(out), "steps": 3, "batch_size": 8, "max_length": 16}
    return Recipe(**{**common, **changes})


def test_the_scores_of_a_run_are_those_of_its_models(tmp_path):
    made = recipe("stories260k", "lowdim:shakespeare", tmp_path / "out", task="causal-lm", limit=16, lr=0.01)
    record = run_recipe(made)
    processor = recipe_processor(made)
    task = load_task(made, processor)
    metric, kept = task.metric(), Kept.of(None, processor, 16)
    for when, model in (
        ("before", models.load_model("stories260k", "causal-lm")),
        ("after", load_run(tmp_path / "out")[0].model),
    ):
        test = record["before_test"] if when == "before" else record["test"]
        validation = record["before"] if when == "before" else record["validation"]
        assert test == pytest.approx(task.evaluate(model, task.test, metric))
        assert validation == pytest.approx(task.evaluate(model, task.validation, metric))
        assert record["kept"][when == "after"] == pytest.approx(kept.loss(model))
        assert [row[when] for row in record["samples"]] == [row["answer"] for row in task.samples(model)]
    assert len(record["samples"]) == 5
    assert RunRecord.read(tmp_path / "out").samples == record["samples"]


def test_a_classifier_has_a_table_by_class_and_no_samples(bert_folder, two_classes, tmp_path):
    record = run_recipe(recipe(bert_folder, two_classes, tmp_path / "out"))
    assert [row["class"] for row in record["by_class"]] == record["data"]["labels"]
    assert sum(row["count"] for row in record["by_class"]) == record["data"]["test"]
    assert "samples" not in record
    assert "kept" not in record
    assert 0 <= record["before_test"] <= 1  # its head was fitted to the frozen features


def test_a_model_that_cannot_answer_yet_has_a_validation_score_only(bert_folder, two_classes, tmp_path):
    made = recipe(bert_folder, two_classes, tmp_path)
    task = load_task(made, recipe_processor(made))
    model = models.load_model(str(bert_folder), "classify")
    found = measure(model, task, task.metric(), answers=False)
    assert (found.test, found.by_class) == (None, [])
    assert found.validation == task.evaluate(model, task.validation, task.metric())
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    assert measure(model, task, task.metric()).test is None


def test_samples_are_joined_by_their_prompt():
    rows = [{"prompt": p, "answer": f"{p} old", "expected": p.upper()} for p in "ab"]
    later = [{**row, "answer": f"{row['prompt']} new"} for row in reversed(rows)]
    assert samples(Measured(0.0, samples=rows), Measured(0.0, samples=later)) == [
        {"prompt": p, "expected": p.upper(), "before": f"{p} old", "after": f"{p} new"} for p in "ba"
    ]


def test_a_score_that_fell_is_named(bert_folder, two_classes, tmp_path):
    made = recipe(bert_folder, two_classes, tmp_path)
    metric = load_task(made, recipe_processor(made)).metric()
    (doubt,) = doubts(metric, Measured(0.9), Measured(0.8, Score(0.8)), None)
    assert doubt == (
        "the training made the model worse: validation accuracy 0.9 before, 0.8 after; try a smaller learning rate"
    )
    assert doubts(metric, Measured(0.8), Measured(0.9, Score(0.9)), None) == []
