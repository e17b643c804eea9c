"""What a run survives: the end of a run reached again, damage, other content, other clocks, and files of other people."""

import json
import os
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from killing import Kill
from lowdim import models
from lowdim.errors import CheckpointError
from lowdim.train.checkpoints import newest_checkpoint
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe

#: What decides a file's bytes besides the seed.
TIMED = {"seconds_per_step", "measured_peak_bytes", "checksum"}


def recipe(out, method="lora", **changes):
    keys = {
        "model": "stories260k", "task": "causal-lm", "data": ["lowdim:shakespeare"], "method": method, "steps": 4, "limit": 12,
        "options": {"rank": 2} if method == "lora" else {}, "batch_size": 2, "max_length": 16, "save_steps": 2, "lr": 5e-3,
    }  # fmt: skip
    return Recipe(**{**keys, **changes}, out=str(out))


def tree(folder):
    """The content of every file; of a record without its times."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("checkpoints/"):
            continue
        if path.name == "run.json":
            record = json.loads(path.read_text())
            record["recipe"].pop("out")
            found[name] = {key: value for key, value in record.items() if key not in TIMED}
        elif path.name != "recipe.yaml":
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Finished runs, made once each."""
    made = {}

    def get(method="lora", **changes):
        key = (method, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "out"
            run_recipe(recipe(made[key], method, **changes))
        return made[key]

    return get


@pytest.fixture
def half(whole, tmp_path):
    """A run that was killed between steps 2 and 4."""
    out = tmp_path / "half"
    shutil.copytree(whole() / "checkpoints", out / "checkpoints")
    shutil.rmtree(out / "checkpoints" / "checkpoint-4")
    shutil.copy(whole() / "recipe.yaml", out)
    return out


@pytest.mark.parametrize("method", ["lora", "full", "galore", "lamda"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_after_the_last_checkpoint(method, accumulation, whole, tmp_path):
    """Killed between the last checkpoint and the record, however often."""
    want = whole(method, gradient_accumulation=accumulation)
    out = shutil.copytree(want, tmp_path / "out")
    for _ in range(2):
        (out / "run.json").unlink()
        for name in ("adapter", "model"):
            shutil.rmtree(out / name, ignore_errors=True)
        record = run_recipe(recipe(out, method, gradient_accumulation=accumulation), resume=True)
        assert record["loss_steps"] == [1, 2, 3, 4]
        assert tree(out) == tree(want)


def test_a_last_step_that_is_no_multiple_of_save_steps(tmp_path):
    run_recipe(recipe(tmp_path / "out", save_steps=3))
    want = tree(tmp_path / "out")
    (tmp_path / "out" / "run.json").unlink()
    shutil.rmtree(tmp_path / "out" / "adapter")
    run_recipe(recipe(tmp_path / "out", save_steps=3), resume=True)
    assert tree(tmp_path / "out") == want


def test_a_finished_run_stays_as_it_is(whole, tmp_path):
    out = shutil.copytree(whole(), tmp_path / "out")
    (out / "adapter" / "notes.txt").write_text("mine")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    said = []
    record = run_recipe(recipe(out), resume=True, say=said.append)
    assert "holds the finished run" in said[-1]
    assert record["losses"] == json.loads((out / "run.json").read_text())["losses"]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["adapter/adapter.safetensors", "adapter/adapter.json", "run.json"])
def test_a_finished_run_with_a_flipped_bit_is_refused(name, whole, tmp_path):
    out = shutil.copytree(whole(), tmp_path / "out")
    flip(out / name, random.Random(1))
    with pytest.raises(CheckpointError, match=rf"{name.replace('.', r'.')} is damaged"):
        run_recipe(recipe(out), resume=True)


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data) // 4, len(data) - 2)] ^= 1 << draw.randrange(1, 5)
    path.write_bytes(data)


def test_a_flipped_bit_of_any_file_of_a_checkpoint_is_refused(half):
    place = half / "checkpoints"
    files = [path for path in (place / "checkpoint-2").iterdir() if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"} <= {p.name for p in files}
    assert newest_checkpoint(place) == str(place / "checkpoint-2")
    for file in files:
        good = file.read_bytes()
        for seed in range(5):
            flip(file, random.Random(seed))
            with pytest.raises(CheckpointError, match=f"{file}.*damaged"):
                newest_checkpoint(place)
            file.write_bytes(good)


def test_the_way_on_after_damage(half, whole):
    flip(half / "checkpoints" / "checkpoint-2" / "optimizer.pt", random.Random(0))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is damaged.*remove that folder, and --resume continues"):
        run_recipe(recipe(half), resume=True)
    shutil.rmtree(half / "checkpoints" / "checkpoint-2")
    run_recipe(recipe(half), resume=True)
    assert tree(half) == tree(whole())


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("change", [{"schema": 1}, {"global_step": "x"}, {"log_history": None}, {"global_step": 1}])
def test_a_trainer_state_of_another_form_is_refused(change, sealed, half):
    file = half / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if not sealed:  # as earlier versions wrote it
        (file.parent / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2.*remove that folder"):
        newest_checkpoint(half / "checkpoints")


def test_a_missing_file_of_a_checkpoint_is_refused(half):
    (half / "checkpoints" / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler\.pt is missing"):
        newest_checkpoint(half / "checkpoints")


def test_a_checkpoint_that_was_never_completed_is_not_used(half, whole):
    later = half / "checkpoints" / "checkpoint-4"
    shutil.copytree(half / "checkpoints" / "checkpoint-2", later)
    (later / "manifest.json").unlink()
    (later / "trainer_state.json").write_text('{"global_st')
    (later / "stale.bin").write_bytes(b"of the killed process")
    run_recipe(recipe(half), resume=True)
    assert tree(half) == tree(whole())
    assert not (later / "stale.bin").exists()
    assert sorted(p.name for p in (half / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("part", ["weights", "configuration", "tokenizer", "data", "test data"])
@pytest.mark.parametrize("finished", [False, True])
def test_what_a_run_builds_on_may_not_change(part, finished, tmp_path):
    model = shutil.copytree(models.assets() / "stories260k", tmp_path / "model")
    text = (models.assets() / "shakespeare" / "sample.txt").read_text()
    data, evaluation = tmp_path / "train.txt", tmp_path / "test.txt"
    data.write_text(text[:3000])
    evaluation.write_text(text[3000:4000])
    keys = {"model": str(model), "data": [str(data)], "eval": str(evaluation), "limit": None}
    if finished:
        run_recipe(recipe(tmp_path / "out", **keys))
    else:
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe(tmp_path / "out", **keys), callbacks=(Kill(3),))
    change(part, model, data, evaluation)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=rf"begun with other content of .*\b{part}"):
        run_recipe(recipe(tmp_path / "out", **keys), resume=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def change(part, model, data, evaluation):
    if part == "weights":
        tensors = load_file(model / "model.safetensors")
        name = next(name for name in tensors if "layers.0" in name)
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    elif part == "configuration":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    elif part == "tokenizer":
        words = json.loads((model / "tokenizer.json").read_text())
        words["model"]["vocab"] = swapped(words["model"]["vocab"])
        (model / "tokenizer.json").write_text(json.dumps(words))
    else:
        file = data if part == "data" else evaluation
        file.write_text(file.read_text().replace("the", "teh", 1))


def swapped(vocabulary):
    """Two words with each other's numbers."""
    if isinstance(vocabulary, dict):
        a, b = list(vocabulary)[300:302]
        return {**vocabulary, a: vocabulary[b], b: vocabulary[a]}
    rows = list(vocabulary)
    rows[300], rows[301] = rows[301], rows[300]
    return rows


def test_remarks_in_the_recipe_are_kept(half, whole):
    text = (half / "recipe.yaml").read_text().replace(str(whole()), str(half))
    (half / "recipe.yaml").write_text(f"# my remark\n{text}")
    run_recipe(recipe(half), resume=True)
    assert (half / "recipe.yaml").read_text().startswith("# my remark\n")
    assert tree(half) == tree(whole())


@pytest.mark.parametrize("days", [-10, 10])
def test_checkpoints_are_kept_by_step(days, tmp_path):
    """Whatever the clock said when the earlier ones were written."""
    keys = {"steps": 6, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, **keys), callbacks=(Kill(3),))
    place = tmp_path / "checkpoints"
    for path in [*place.rglob("*"), *place.iterdir()]:
        os.utime(path, (time.time() + days * 86400,) * 2)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, **keys), resume=True, callbacks=(Kill(6),))
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_spikes_before_the_checkpoint_are_in_the_record(monkeypatch, tmp_path):
    from lowdim.train import monitoring

    class Nervous(monitoring.SpikeAlarm):
        def spike(self, loss):
            return super().spike(loss) or True

        def threshold(self):
            return 0.0

    monkeypatch.setattr(monitoring, "SpikeAlarm", Nervous)
    want = run_recipe(recipe(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "b"), callbacks=(Kill(3),))
    got = run_recipe(recipe(tmp_path / "b"), resume=True)
    assert got["spikes"] == want["spikes"] == [1, 2, 3, 4]


def test_the_state_of_a_companion_is_checked(tmp_path):
    keys = {"method": "sst", "options": {}, "task": "pretrain", "steps": 4}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, **keys), callbacks=(Kill(3),))
    (file,) = (tmp_path / "checkpoints").rglob("companion.pt")
    assert torch.load(file, weights_only=True)
    flip(file, random.Random(0))
    with pytest.raises(CheckpointError, match=r"companion\.pt is damaged"):
        run_recipe(recipe(tmp_path, **keys), resume=True)


def test_what_a_kill_left_of_checkpoints_is_put_in_order(whole, tmp_path):
    """Killed while an older one was removed, and just before the manifest of the newest."""
    out = shutil.copytree(whole(), tmp_path / "out")
    place = out / "checkpoints"
    shutil.copytree(place / "checkpoint-2", place / "checkpoint-1")
    (place / "checkpoint-1" / "trainer_state.json").unlink()
    (place / "checkpoint-1" / "manifest.json").unlink()
    (place / "checkpoint-4" / "manifest.json").unlink()
    (out / "run.json").unlink()
    run_recipe(recipe(out), resume=True)
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    again, before = (folder / "checkpoints" / "checkpoint-4" / "manifest.json" for folder in (out, whole()))
    assert again.read_bytes() == before.read_bytes()
