"""`lowdim.compare(...)`: the command as a function, with modules and tasks that are Python objects."""

import dataclasses
import inspect
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import lowdim
from lowdim.comparison import CompareSettings
from lowdim.comparison.workbench import recipe_of
from lowdim.errors import CheckpointError, UnknownNameError
from lowdim.train import own_task

pytest.importorskip("transformers")


def network():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def quadrants(weight=1.0):
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    return own_task(
        TensorDataset(x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()),
        loss=lambda model, batch: weight * cross_entropy(model(batch[0]), batch[1]),
        values=lambda model, batch: (model(batch[0]).argmax(-1) == batch[1]).float(),
        metric="accuracy",
        head="4",
        name="quadrants",
    )


def call(out, **changes):
    usual = {
        "task": quadrants(), "model": network, "methods": "full,lora", "steps": 8, "rates": 1, "sizes": 1, "seeds": 2,
        "pretrained": False, "out": out,
    }  # fmt: skip
    return lowdim.compare(**{**usual, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return call(tmp_path_factory.mktemp("call") / "out")


def test_the_result_is_what_the_folder_holds(found):
    written = json.loads((found.folder / "comparison.json").read_text())
    assert found.to_dict() == {key: value for key, value in written.items() if key != "checksum"}
    assert found.page.is_file()
    assert (written["title"], written["task"], written["settings"]["given"]) == ("quadrants: network", "own", ["model", "task"])
    rows = found.rows()
    assert [row["method"] for row in rows][:2] == ["Full fine-tuning", "LoRA"]
    assert rows[0]["accuracy"] == written["methods"][0]["mean"]
    assert found.summary == written["judgement"]["headline"]
    in_a_notebook = found._repr_html_()
    assert in_a_notebook.index(found.summary.split(";")[0]) < in_a_notebook.index("<table>"), "the verdict comes first"


def test_the_winner_has_the_score_that_was_measured(found):
    trained = found.load_winner()
    model = trained.model if hasattr(trained, "layers") else trained
    runs = found.folder / "runs" / found.record.winner.method
    record = json.loads((runs / "seed-0" / "run.json").read_text())
    task = quadrants()
    assert task.evaluate(model, task.test, task.metric()) == pytest.approx(record["test"])
    assert any(found.winner.iterdir())


def test_it_prints_nothing_and_leaves_the_model_as_it_is(tmp_path, capsys):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call(tmp_path / "out", model=model, methods=["lora"], seeds=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert capsys.readouterr().out == ""


def test_a_finished_comparison_is_read_again(found):
    again = call(found.folder, resume=True)
    assert again.to_dict() == found.to_dict()
    with pytest.raises(FileExistsError):
        call(found.folder)


def test_another_model_or_task_is_not_mixed_with_it(found):
    with pytest.raises(CheckpointError, match="the task's functions"):
        call(found.folder, resume=True, task=other_task())
    wider = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    with pytest.raises(CheckpointError, match="the base model's weights"):
        call(found.folder, resume=True, model=named(lambda: wider))


def other_task():
    task = quadrants()
    return dataclasses.replace(task, values=lambda model, batch: (model(batch[0]).argmin(-1) == batch[1]).float())


def named(build):
    build.__name__ = "network"
    return build


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "classify"}, ValueError, "task must be a Task for a model that is a module"),
        ({"model": "stories260k", "pretrained": True}, ValueError, "model must be a module, or a function that builds one"),
        ({"data": "rows.csv"}, ValueError, "data must be left out where task is a OwnTask"),
        ({"model": lambda: "no model"}, TypeError, "model must be a name, a module or a function that builds one"),
        ({"model": lambda: nn.Sequential(nn.Linear(2, 4))}, UnknownNameError, "head must be one of 0; got '4'"),
        ({"metric": "f1"}, UnknownNameError, "metric for own must be one of accuracy; got 'f1'"),
        ({"budget": "much"}, ValueError, "a size must be a number and a unit"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "settings.json").exists()


def test_every_setting_is_a_keyword():
    names = {field.name for field in dataclasses.fields(CompareSettings)} - {"given", "threads"}
    assert names <= set(inspect.signature(lowdim.compare).parameters)


def test_a_separator_of_labels_reaches_the_recipe_and_is_for_classes():
    settings = CompareSettings(model="minilm", data=("a.csv",), label_separator=";")
    assert recipe_of(settings).label_separator == ";"
    with pytest.raises(ValueError, match="--label-separator is for --task classify; got ';' for regress"):
        CompareSettings(model="minilm", data=("a.csv",), task="regress", label_separator=";")
