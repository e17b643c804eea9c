"""A run that was killed and resumed gives the bits and the losses of one that never was."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from killing import Kill
from lowdim.adapters import Adapted
from lowdim.adapters.diffora.search import search_steps
from lowdim.catalogue import entries, variant
from lowdim.errors import CheckpointError, LowdimError, UnknownNameError
from lowdim.train.recipes import Recipe
from lowdim.train.run import fit_settings, load_run, run_recipe
from methods import METHODS, busy, row

#: Language models have no head to probe; for `lamda++` it is LaMDA that is resumed.
RESUMED = [name for name in METHODS if name not in ("linear-probe", "lamda++")]


def recipe(out, method="lora", **changes):
    keys = {
        "model": "stories260k", "task": "causal-lm", "data": [os.environ["LOWDIM_TEST_TEXT"]], "method": method, "steps": 8,
        "options": busy(method) if method in METHODS else {},
        "batch_size": 4, "max_length": 16, "limit": 48, "save_steps": 2, "lr": 5e-3,
    }  # fmt: skip
    return Recipe(**{**keys, **changes}, out=str(out))


@pytest.fixture(scope="module", autouse=True)
def _text(tmp_path_factory):
    """The start of the shipped sample; more of it would only make the scores take longer."""
    from lowdim.models import assets

    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text((assets() / "shakespeare" / "sample.txt").read_text()[:4000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWDIM_TEST_TEXT", str(file))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, made once each."""
    made = {}

    def get(method):
        if method not in made:
            folder = tmp_path_factory.mktemp("whole") / method
            made[method] = (folder, run_recipe(recipe(folder, method)))
        return made[method]

    return get


def trained(folder):
    file = folder / "adapter" / "adapter.safetensors"
    return load_file(file if file.is_file() else folder / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


QUICK = {"lora", "lamda", "diffora", "galore"}
SLOW = set(RESUMED) - QUICK


def test_every_adapter_is_killed_and_resumed():
    trained = {v.name for row in entries() if row.available and row.family == "adapters" for v in row.variants}
    assert trained - {"lamda++"} <= set(RESUMED)


#: Layers that start from an approximation of the model, and not from the model.
APPROXIMATE = {name for name in METHODS if variant(name).kind == "layer" and row(name).start is None}


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in RESUMED])
def test_killed_and_resumed_is_as_if_never_killed(method, whole, tmp_path):
    folder, want = whole(method)
    if method in APPROXIMATE:  # `before` scores the model
        assert want["losses"][-1] < want["losses"][0]
    elif method == "nm-decay":  # it takes half of the weights away while it trains: two of every four are left
        weights = [value for name, value in trained(folder).items() if name.endswith("_proj.weight")]
        assert weights
        assert {int((value.unflatten(1, (-1, 4)) != 0).sum(-1).max()) for value in weights} == {2}
    elif method == "pst":  # 90 % of them
        weights = [value for name, value in trained(folder).items() if name.endswith("_proj.weight")]
        assert weights
        assert all(int((value == 0).sum()) == int(value.numel() * 0.9) for value in weights)
    else:
        assert want["validation"] < want["before"]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, method), callbacks=(Kill(5),))
    assert not (tmp_path / "run.json").exists()
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "model").exists()
    got = run_recipe(recipe(tmp_path, method), resume=True)
    assert got["losses"] == want["losses"]
    spent = search_steps(8) if method == "diffora" else 0
    assert got["loss_steps"] == want["loss_steps"] == list(range(1, 9 - spent))
    assert {k: got[k] for k in ("before", "validation", "test")} == {k: want[k] for k in ("before", "validation", "test")}
    assert same(trained(tmp_path), trained(folder))
    if method == "lora":
        assert (tmp_path / "adapter" / "adapter.safetensors").read_bytes() == (
            folder / "adapter" / "adapter.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("kills", [(1,), (7,), (3, 5)], ids=str)
def test_wherever_lamda_is_killed(kills, whole, tmp_path):
    folder, want = whole("lamda")
    for number, step in enumerate(kills):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tmp_path, "lamda"), resume=number > 0, callbacks=(Kill(step),))
    got = run_recipe(recipe(tmp_path, "lamda"), resume=True)
    assert got["losses"] == want["losses"]
    assert same(trained(tmp_path), trained(folder))
    steps = {int(v) for k, v in trained(tmp_path).items() if k.endswith(".steps")}
    assert steps == {8}


@pytest.mark.slow
def test_killed_by_the_system(whole, tmp_path):
    folder, want = whole("lora")
    code = (
        "import os, sys, test_run_resume as t\n"
        "from transformers import TrainerCallback\n"
        "class End(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 5: os._exit(9)\n"
        "t.run_recipe(t.recipe(sys.argv[1]), callbacks=(End(),))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=_environment(), check=False, capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    got = run_recipe(recipe(tmp_path), resume=True)
    assert got["losses"] == want["losses"]
    assert same(trained(tmp_path), trained(folder))


def _environment():
    here = Path(__file__).parent
    folders = os.pathsep.join(filter(None, (str(here), str(here.parent), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_the_record_and_the_folder(whole):
    folder, record = whole("lora")
    assert json.loads((folder / "run.json").read_text())["losses"] == record["losses"]
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "checkpoints", "recipe.yaml", "run.json"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == record["recipe"]
    assert record["validation"] < record["before"]
    assert record["trained_parameters"] == sum(v.numel() for k, v in trained(folder).items())
    assert record["environment"]["torch"] == torch.__version__
    assert record["measured_peak_bytes"] > 0


def test_trained_parameters_are_those_of_the_start(whole):
    # In the end LaMDA trains S only; what it cost is what it trained at first.
    folder, record = whole("lamda")
    sizes = trained(folder)
    assert record["trained_parameters"] == sum(v.numel() for k, v in sizes.items() if k.endswith((".S", ".B")))


@pytest.mark.parametrize("method", ["lora", "lamda"])
def test_load_run_gives_the_trained_model(method, whole):
    folder, record = whole(method)
    state = torch.get_rng_state()
    adapted, loaded, chosen = load_run(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(adapted, Adapted)
    assert (loaded.model, chosen.name) == ("stories260k", method)
    assert _score(adapted.model, loaded) == record["test"]


def _score(model, loaded):
    from lowdim import models
    from lowdim.train.metrics import metric_for
    from lowdim.train.run import load_task

    task = load_task(loaded, models.load_tokenizer(loaded.model))
    return task.evaluate(model, task.test, metric_for(loaded.task))


def test_load_run_of_a_classifier_from_random_weights(tmp_path, bert_folder, two_classes):
    changes = {"model": str(bert_folder), "task": "classify", "data": [str(two_classes)], "pretrained": False, "seed": 3}
    record = run_recipe(recipe(tmp_path / "a", steps=2, save_steps=0, limit=16, **changes))
    adapted, loaded, _ = load_run(tmp_path / "a")
    assert _score(adapted.model, loaded) == record["test"]
    assert record["data"]["labels"] == ["negative", "positive"]


def test_load_run_of_other_folders(whole, tmp_path):
    with pytest.raises(CheckpointError, match=r"run\.json does not exist"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no adapter; its model is in .*model, ready to use"):
        load_run(whole("galore")[0])
    for content in ('{"methods": []}', "[]", '{"recipe": {"model": 3}, "data": {"labels": []}}'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match="is not the record of a recipe run"):
            load_run(tmp_path)
    (tmp_path / "run.json").write_text('{"reci')
    with pytest.raises(CheckpointError, match="is damaged"):
        load_run(tmp_path)


def test_a_folder_is_not_written_over(whole, tmp_path):
    folder, _ = whole("lora")
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        run_recipe(recipe(folder))
    with pytest.raises(CheckpointError, match=r"made with a different recipe: lr was 0\.005 and is 0\.1"):
        run_recipe(recipe(folder, lr=0.1), resume=True)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        run_recipe(recipe(tmp_path))
    with pytest.raises(FileExistsError, match="is a file"):
        run_recipe(recipe(tmp_path / "mine.txt"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recipe.yaml").write_text("model: [")
    with pytest.raises(LowdimError, match="is not YAML"):
        run_recipe(recipe(tmp_path / "b"), resume=True)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "loraa"}, UnknownNameError, "nearest: lora"),
        ({"options": {"rnk": 3}}, UnknownNameError, "method lora has no option 'rnk'; nearest: rank"),
        ({"metric": "accuracy"}, UnknownNameError, "metric for causal-lm"),
        ({"report_to": "tensorbord"}, UnknownNameError, "nearest: tensorboard"),
        ({"model": "./nowhere"}, UnknownNameError, "no such folder"),
        (
            {"method": "s2ft", "options": {"block": 7}},
            ValueError,
            r"S2FT on layer model\.layers\.0\.self_attn\.q_proj .*block must divide",
        ),
        ({"options": {"target_modules": ["q_prj"]}}, ValueError, r"q_prj.*q_proj"),
        ({"method": "galore", "options": {"update_interval": 0}}, ValueError, "update_interval must be an int >= 1; got 0"),
        ({"method": "linear-probe", "options": {}}, ValueError, "linear-probe needs a head"),
        ({"method": "monarch", "options": {"nblocks": 0}}, ValueError, r"nblocks must be an int >= 1; got 0"),
    ],
)
def test_what_cannot_run_leaves_nothing(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run_recipe(recipe(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "galore"])
def test_a_run_that_diverges_writes_no_model(method, tmp_path):
    with pytest.raises(LowdimError, match=r"the loss became .* at step \d; try a smaller learning rate than 1e\+30"):
        run_recipe(recipe(tmp_path / "out", method, lr=1e30, warmup=0.0, schedule="constant", save_steps=0, max_grad_norm=0.0))
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"recipe.yaml", "checkpoints"}


def test_a_run_whose_last_step_diverges_writes_no_model(tmp_path):
    # The loss of a step is that of the weights before it, so nothing in the losses shows what the last step did.
    with pytest.raises(LowdimError, match="the trained model's outputs are not finite; try a smaller"):
        run_recipe(recipe(tmp_path / "out", "full", options={}, steps=1, lr=1e38, warmup=0.0, save_steps=0))
    assert not (tmp_path / "out" / "model").exists()


def test_every_setting_of_the_loop_comes_from_the_recipe(tmp_path):
    changed = {
        "steps": 9, "batch_size": 3, "warmup": 0.3, "schedule": "cosine", "max_grad_norm": 0.5, "gradient_accumulation": 2,
        "gradient_checkpointing": True, "bf16": True, "seed": 11, "save_steps": 4, "report_to": "tensorboard", "eval_steps": 5,
        "group_by_length": True,
    }  # fmt: skip
    settings = fit_settings(recipe(tmp_path, **changed), 0.125)
    assert {key: getattr(settings, key) for key in changed} == changed
    assert settings.lr == 0.125
    assert {f.name for f in dataclasses.fields(settings)} == {*changed, "lr", "log_steps", "clips_itself", "watch", "pause_at"}


def test_rates_that_are_left_out_are_the_methods_own(tmp_path):
    record = run_recipe(recipe(tmp_path / "out", "lamda", steps=1, lr=None, save_steps=0, limit=8))
    assert record["lr"] == variant("lamda").rates[0]
    assert not math.isnan(record["test"])
