"""A run whose layers are watched: the same training, the same numbers after a resume, and a page that shows them."""

import json

import pytest

from killing import Kill
from lowdim.models import assets
from lowdim.records import RunRecord, WatchRecord
from lowdim.report import render_run
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe


def recipe(out, **changes):
    text = out.parent / "text.txt"
    text.write_text((assets() / "shakespeare" / "sample.txt").read_text()[:4000])  # more would only make the scores take longer
    keys = {
        "model": "stories260k", "task": "causal-lm", "data": [str(text)], "method": "lora", "steps": 5, "lr": 5e-3,
        "options": {"rank": 2}, "batch_size": 2, "max_length": 16, "limit": 16, "save_steps": 2, "watch": 2,
    }  # fmt: skip
    return Recipe(**{**keys, **changes}, out=str(out))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "whole"
    return folder, run_recipe(recipe(folder))


def test_the_record_holds_the_rows(whole):
    folder, record = whole
    watch = record["watch"]
    assert watch["schema"] == 1
    assert [row["step"] for row in watch["rows"]] == [0, 2, 4, 5]
    assert watch["rows"][0]["overlap"] == 1.0 > watch["rows"][-1]["overlap"]
    assert set(watch["rows"][-1]["layers"]["model.layers.0.mlp.up_proj"]) == {"alpha", "intruders", "overlap"}
    read = RunRecord.read(folder)
    assert isinstance(read.watch, WatchRecord)
    assert read.to_dict()["watch"] == watch == json.loads((folder / "run.json").read_text())["watch"]


def test_watching_changes_no_bit_of_the_training(whole, tmp_path):
    record = whole[1]
    plain = run_recipe(recipe(tmp_path / "plain", watch=0))
    assert "watch" not in plain
    assert plain["losses"] == record["losses"]
    assert plain["files"] == record["files"]


def test_a_killed_run_has_the_same_numbers_after_its_resume(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "out"), callbacks=(Kill(3),))
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2" / "watch.pt").is_file()
    resumed = run_recipe(recipe(tmp_path / "out"), resume=True)
    assert resumed["watch"] == whole[1]["watch"]
    assert resumed["files"] == whole[1]["files"]


def test_the_page_shows_three_charts_a_table_and_what_they_mean(whole):
    record = whole[1]
    page = render_run(record)
    part = page[page.index('<section id="layers"') :]
    part = part[: part.index("</section>")]
    assert part.count("<svg") == 3
    assert "overlap is 1 while the 10 strongest directions are those of the start" in part
    last = record["watch"]["rows"][-1]
    assert f"<td>{last['overlap']:.3f} (" in part
    assert f"<td>{last['alpha']:.3f} (" in part
    assert "model.layers.0.mlp.up_proj" in part
    assert '<section id="layers"' not in render_run({key: value for key, value in record.items() if key != "watch"})


@pytest.mark.parametrize(
    "watch",
    [
        {"rows": [{"step": 0, "alpha": None, "intruders": None, "overlap": "x", "layers": {"a": None, "b": {"alpha": "<b>"}}}]},
        {"rows": [{"step": "4", "alpha": 1.0}, None, 3]},
        {"rows": "none"},
        7,
    ],
)
def test_a_damaged_record_draws_a_page(watch):
    assert "<b>" not in render_run({"method": "lora", "losses": [1.0], "watch": watch})
