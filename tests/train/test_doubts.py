"""A run says where its scores are no success, and how large what it wrote is."""

import pytest

import tiny
from lowdim import models
from lowdim.plan import forecast
from lowdim.records import RunRecord
from lowdim.report import render_run
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe


def recipe(model, data, out, **changes):
    common = {"model": str(model), "data": str(data), "out": str(out), "steps": 3, "batch_size": 8, "max_length": 16}
    return Recipe(**{**common, **changes})


def test_a_score_that_a_constant_answer_gives_is_named(bert_folder, tmp_path):
    rows = [
        (f"the film was {tiny.PLAIN[i % 15]} {tiny.PLAIN[i // 15]}", "rare" if i % 10 == 0 else "usual") for i in range(120)
    ]
    data, said = tiny.write_jsonl(tmp_path / "rows.jsonl", rows), []
    record = run_recipe(recipe(bert_folder, data, tmp_path / "out", metric="f1", lr=1e-6), say=said.append)
    held = record["data"]["baseline"]
    assert (held["name"], held["scores"]["accuracy"]) == ("majority-class", pytest.approx(0.9, abs=0.03))
    assert record["test"] == pytest.approx(held["scores"]["f1"]), "no word tells the classes apart"
    assert any("always answering 'usual'" in line and "f1 (macro)" in line for line in said)
    (note,) = (note for note in record["notes"] if "not better than" in note)
    assert "is not better than always answering the majority class, 'usual'" in note
    page = render_run(record)
    assert "validation f1 (macro)" in page
    assert "is not better than always answering" in page


def test_a_training_that_makes_the_model_worse_says_so(tmp_path):
    said = []
    options = {"task": "causal-lm", "method": "full", "lr": 1.0, "limit": 16}
    record = run_recipe(recipe("stories260k", "lowdim:shakespeare", tmp_path / "out", **options), say=said.append)
    assert record["validation"] > record["before"]
    (note,) = (note for note in record["notes"] if "made the model worse" in note)
    assert note.endswith("try a smaller learning rate")
    assert f"note: {note}" in said


@pytest.mark.parametrize("method", ["lora", "linear-probe", "full", "monarch"])
def test_the_size_is_that_of_what_was_written(method, bert_folder, two_classes, tmp_path):
    record = run_recipe(recipe(bert_folder, two_classes, tmp_path / "out", method=method))
    files = [file for name in ("adapter", "model") for file in (tmp_path / "out" / name).rglob("*.safetensors")]
    assert record["file_bytes"] == sum(file.stat().st_size for file in files) > 0
    assert RunRecord.read(tmp_path / "out").file_bytes == record["file_bytes"]
    assert "Saved file" in render_run(record)
    planned = forecast(models.load_config(str(bert_folder)), method, batch_size=8, sequence_length=16)
    assert planned.file_bytes == pytest.approx(record["file_bytes"], abs=20_000)  # a file has a header
