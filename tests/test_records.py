"""What is written of a run, a comparison and a compression is read by the type that wrote it."""

import dataclasses
import json
import re

import pytest

from golden import bases, runs
from lowdim.errors import CheckpointError
from lowdim.files import read_json, write_json
from lowdim.records import RUN, ComparedRun, ComparisonRecord, CompressionRecord, LossCurve, RunRecord, claim


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = RunRecord.read(runs.FOLDER / "lora")
    record.write(tmp_path)
    assert read_json(tmp_path / RUN) == read_json(runs.FOLDER / "lora" / RUN)
    assert RunRecord.read(tmp_path) == record


def test_what_a_method_has_not_is_left_out(tmp_path):
    record = RunRecord.read(runs.FOLDER / "lora")
    assert "ranks" not in record.to_dict()
    assert "penalties" not in record.to_dict()
    full = dataclasses.replace(record, ranks={"layer": 3}, penalties=[0.5])
    full.write(tmp_path)
    assert RunRecord.read(tmp_path) == full


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": {}}', "{"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(CheckpointError):
        RunRecord.read(tmp_path)


#: Type, and the folder of a file of an earlier version.
STORED = [
    *((ComparedRun, file.parent) for file in sorted((runs.COMPARISON / "runs").rglob(RUN))),
    (ComparisonRecord, runs.COMPARISON),
    *((CompressionRecord, file.parent) for file in sorted((bases.FILES / "exports" / "compressed").rglob("compression.json"))),
]


@pytest.mark.parametrize(("kind", "folder"), STORED, ids=lambda value: getattr(value, "name", None))
def test_a_stored_file_is_read_and_written_as_it_was(kind, folder, tmp_path):
    record = kind.read(folder)
    record.write(tmp_path)
    was, now = (json.dumps(read_json(place / kind.file)) for place in (folder, tmp_path))
    assert now == was, "the order of the keys stays, too"
    assert kind.read(tmp_path) == record


def compared_run(**values):
    return ComparedRun(
        fingerprint="f", method="lora", label="LoRA", phase="seed", seed=0, lr=0.1, steps=3, batch_size=2, metric="accuracy",
        environment={}, **values,
    )  # fmt: skip


def test_a_run_that_failed_early_has_no_numbers():
    begun = {"schema", "fingerprint", "method", "label", "phase", "seed", "lr", "steps", "batch_size", "metric", "environment"}
    assert compared_run(failure="no").to_dict().keys() == begun | {"failure"}
    trained = compared_run(config={}, trained_parameters=4, losses=[1.0], loss_steps=[1])
    also = {"config", "trained_parameters", "losses", "loss_steps", "seconds_per_step", "measured_peak_bytes", "failure"}
    assert trained.to_dict().keys() == begun | also


def test_a_number_that_is_not_finite_is_none(tmp_path):
    record = compared_run(losses=[1.0, float("nan")], loss_steps=[1, 2], validation=float("inf"), failure="no")
    record.write(tmp_path)
    read = ComparedRun.read(tmp_path)
    assert read.losses == [1.0, None]
    assert (read.validation, read.seconds_per_step) == (None, None)


def test_the_settings_of_a_compression_are_keys_of_the_file(tmp_path):
    record = CompressionRecord(
        method="m", settings={"target": 0.5, "pattern": [2, 4]}, ranks={"a": 3, "b": None}, tune_steps=2, lr=0.1, trained=8,
        losses=[1.0], parameters=[10, 5], perplexity=[3.0, 4.0, 3.5], data=["text.txt"],
    )  # fmt: skip
    record.write(tmp_path)
    held = read_json(tmp_path / "compression.json")
    assert list(held)[:4] == ["method", "target", "pattern", "ranks"]
    fields = {f.name for f in dataclasses.fields(record)}
    assert held.keys() - {"target", "pattern"} == fields - {"settings", "stage_steps"}  # it was tuned, and had no stage
    assert CompressionRecord.read(tmp_path) == record


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda held: held.pop("metric"), "`metric` is missing"),
        (lambda held: held["metric"].pop("name"), "`metric.name` is missing"),
        (lambda held: held.update(methods=3), "`methods` is 3, not a list"),
        (lambda held: held["methods"].append([]), "`methods[2]` is a list, not an object"),
        (lambda held: held["methods"][0].update(lr="fast"), '`methods[0].lr` is "fast", not a number or null'),
        (lambda held: held["methods"][1]["scores"].append(None), "`methods[1].scores[2]` is null, not a number"),
        (lambda held: held["methods"][1].update(baseline=1), "`methods[1].baseline` is 1, not true or false"),
        (lambda held: held.update(schema=True), "`schema` is true, not an integer"),
        (
            lambda held: held["methods"][0]["curves"][0].update(loss=["x"]),
            '`methods[0].curves[0].loss[0]` is "x", not a number',
        ),
    ],
)
def test_a_damaged_record_is_refused_by_file_and_key(change, part, tmp_path):
    held = read_json(runs.COMPARISON / "comparison.json")
    change(held)
    write_json(tmp_path / "comparison.json", held)
    with pytest.raises(CheckpointError, match=re.escape(f"comparison.json is not the record of a comparison: {part}")):
        ComparisonRecord.read(tmp_path)


def test_another_version_is_read():
    """Keys that came later may be missing, and keys that are not known here are ignored."""
    held = {"seed": 0, "step": [1], "loss": [0.5], "colour": "red"}
    assert LossCurve.from_dict(held, "file") == LossCurve(0, [1], [0.5])
    whole = read_json(runs.FOLDER / "lora" / RUN)
    older = {name: value for name, value in whole.items() if name not in ("penalties", "ranks", "schema")}
    assert RunRecord.from_dict(older, "file") == RunRecord.from_dict(whole, "file")


def test_a_record_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match=r"run\.json is not the record of a recipe run: `recipe` is missing"):
        RunRecord.read(runs.COMPARISON / "runs" / "svfit" / "seed-0")


def test_a_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "out"
    assert claim(folder, "recipe.yaml", "run", False) is None
    folder.mkdir()
    assert claim(folder, "recipe.yaml", "run", True) is None
    (folder / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="out is not empty and holds no run; name another folder"):
        claim(folder, "recipe.yaml", "run", True)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file"):
        claim(folder / "thesis.txt", "recipe.yaml", "run", True)
    (folder / "recipe.yaml").write_text("")
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        claim(folder, "recipe.yaml", "run", False)
    assert claim(folder, "recipe.yaml", "run", True) == folder / "recipe.yaml"
