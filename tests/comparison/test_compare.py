"""`lowdim compare`, end to end on a tiny model: the same for every method, and repeatable after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from comparing import ACCURACY, METHODS, by_name, finals, interrupted_after, names, numbers, rebuilt, records, run
from lowdim import catalogue
from lowdim.comparison import ladder, runner, runs
from lowdim.comparison.winner import export_winner, restore
from lowdim.errors import CheckpointError
from lowdim.files import read_json
from lowdim.records import MethodRecord
from lowdim.train.tasks import Task


def test_every_method_finishes_and_learns(whole):
    _, result, said = whole
    rows = by_name(result)
    assert tuple(rows) == METHODS
    for row in rows.values():
        assert row["status"] == "ok", row["reason"]
        assert row["reason"] is None
        assert 0.6 < row["mean"] <= 1.0
        assert len(row["scores"]) == len(row["hits"]) == len(row["curves"]) == 2
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 2)
        assert row["difference"] <= 0
        assert row.get("half_width", 1.0) >= 0
        assert row["may_be_best"] is (row["name"] in result["judgement"]["may_be_best"])
        assert row["forecast_peak_bytes"] > 0
        assert row["measured_peak_bytes"] > 0
        assert row["seconds_per_step"] > 0
        assert row["lr"] in [t["lr"] for t in row["trials"]]
        assert all(t["steps"] in (2, 5) for t in row["trials"])
    assert rows["linear-probe"]["trained_parameters"] < rows["lora"]["trained_parameters"] < rows["full"]["trained_parameters"]
    assert result["winner"]["method"] in rows
    assert "rung 1 of 2 (2 steps) [1/10] Linear probe: lr 0.001: validation accuracy" in said
    assert "final, seed 2 of at most 2 [5/5]" in said


def test_every_method_gets_the_same(whole):
    folder, result, _ = whole
    seeds = set()
    for row in finals(result).values():
        chosen = catalogue.variant(row["name"])
        tried = [t["lr"] for t in row["trials"]]
        assert set(chosen.rates[:2]) <= set(tried), "the method's first rates, and those that the search adds at an edge"
        furthest = [t for t in row["trials"] if t["steps"] == max(t["steps"] for t in row["trials"])]
        assert row["lr"] == max(furthest, key=lambda t: t["score"])["lr"], "the rate is chosen by the validation part"
        own = [read_json(folder / "runs" / row["name"] / f"seed-{i}" / "run.json") for i in range(2)]
        assert all((r["lr"], r.get("size")) == (row["lr"], row.get("size")) for r in own)
        seeds.add(tuple(r["seed"] for r in own))
        assert {r["steps"] for r in own} == {5}
    assert len(seeds) == 1
    assert len(set(seeds.pop())) == 2, "and two seeds are two"
    assert {r["seed"] for r in records(folder, "rung-*").values()} == {0}, "the search has one seed and order of the data"


def test_the_search_goes_from_rung_to_rung(whole):
    folder, result, _ = whole
    search = result["search"]
    assert search["kind"] == "halving"
    by_rung = {steps: [v for v in search["visits"] if v["steps"] == steps] for steps in (2, 5)}
    assert [v["rung"] for v in search["visits"]] == [0] * len(by_rung[2]) + [1] * len(by_rung[5])
    key = lambda v: (v["method"], v["lr"], v["size"])  # noqa: E731
    assert {key(v) for v in by_rung[2] if v["goes_on"]} == {key(v) for v in by_rung[5]}
    assert {v["method"] for v in by_rung[5]} == set(METHODS), "every method keeps its best to the second rung"
    assert all(v["reason"] for v in search["visits"] if not v["goes_on"])
    assert search["steps"] == 2 * len(by_rung[2]) + 3 * len(by_rung[5])
    assert search["exhaustive_steps"] == 5 * len(by_rung[2])
    for visit in search["visits"]:
        name = f"{visit['method']}/lr-{visit['lr']:g}" + ("" if visit["size"] is None else f"-size-{visit['size']}")
        record = read_json(folder / "runs" / name / f"rung-{visit['steps']}" / "run.json")
        assert record["validation"] == visit["score"]
        assert record["loss_steps"] == list(range(1, visit["steps"] + 1)), "it went on from its checkpoint"
    assert not list(folder.rglob("checkpoint*")), "no checkpoint is left"


def test_a_candidate_of_the_search_is_a_training_without_pauses(whole, make, tmp_path):
    """The record of its last rung has the losses and the score of a candidate that was trained at once."""
    folder, _, _ = whole
    bench = rebuilt(make(), tmp_path)
    for name in ("lora", "full", "monarch"):
        (end,) = [r for n, r in records(folder, "rung-5").items() if n.startswith(f"{name}/")][:1]
        size = end.get("size")
        chosen = ladder.sized(catalogue.variant(name), size)
        straight = runs.perform(bench, runs.Run(chosen, "trial", 0, end["lr"], end["seed"], 5, size))
        assert straight.losses == end["losses"]
        assert straight.validation_values == end["validation_values"]


def test_methods_have_like_cost_at_one_size(whole):
    _, result, _ = whole
    rows = by_name(result)
    assert rows["lora"]["size"] == 8
    assert rows["lamda"]["size"] not in (None, 32), "its row's rank trains more"
    assert rows["lamda"]["trained_parameters"] == pytest.approx(rows["lora"]["trained_parameters"], rel=0.1)
    assert "size" not in rows["full"]


def test_the_test_part_is_looked_at_once_a_seed(make, tmp_path, monkeypatch):
    looks = {"validation": 0, "test": 0, "train": 0}
    original = Task.score

    def score(self, model, part, metric):
        name = next((n for n in looks if getattr(self, n) is part), "validation")
        looks[name] += 1
        return original(self, model, part, metric)

    monkeypatch.setattr(Task, "score", score)
    result, _ = run(make(methods=("linear-probe", "lora", "full"), rates=3, seeds=2), tmp_path / "out")
    assert looks["test"] == 3 * 2
    # Each visit of the search, the first seed of each method, and the winner: what was kept of it, and its folder loaded again.
    assert looks["validation"] == len(result["search"]["visits"]) + 3 + 2
    assert looks["train"] == 0


def test_the_folder(whole):
    folder, result, _ = whole
    assert sorted(p.name for p in folder.iterdir()) == ["comparison.json", "report.html", "runs", "settings.json", "winner"]
    assert read_json(folder / "comparison.json") == json.loads(json.dumps(result))
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert "LaMDA" in (folder / "report.html").read_text()
    for method in finals(result):
        names = {p.name for p in (folder / "runs" / method).iterdir()}
        assert {"seed-0", "seed-1"} <= names
        assert all(name.startswith(("seed-", "lr-")) for name in names)
        record = read_json(folder / "runs" / method / "seed-1" / "run.json")
        assert record["failure"] is None
        assert record["loss_steps"] == [1, 2, 3, 4, 5]
        assert len(record["losses"]) == 5
        assert record["environment"]["torch"] == torch.__version__
        assert record["environment"]["cpu"]
        assert (record["method"], record["batch_size"]) == (method, 8)
        assert set(record["hits"]) <= {"0", "1"}
        assert record["values"] == [float(hit) for hit in record["hits"]]
        assert sum(record["values"]) / len(record["values"]) == pytest.approx(record["test"])
    assert (folder / "runs" / "full" / "seed-0" / "weights.safetensors").is_file()
    assert not (folder / "runs" / "full" / "seed-1" / "weights.safetensors").exists(), "one copy of a whole model is enough"


@pytest.mark.parametrize("method", METHODS)
def test_whoever_wins_is_exported_and_reloads_with_the_same_logits(method, whole, make, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    settings = make()
    bench = rebuilt(settings, folder)
    best = MethodRecord.from_dict(by_name(whole[1])[method], folder)
    winner = export_winner(bench, best, folder)
    assert winner.format == ("PEFT adapter" if method in ("lora", "lamda") else "merged model")
    assert winner.largest_difference < 1e-5
    model = restore(bench, folder / "runs" / method / "seed-0")
    score = bench.task.evaluate(getattr(model, "model", model), bench.task.test, ACCURACY)
    assert score == by_name(whole[1])[method]["scores"][0], "it is the model that was scored"
    assert "README.md" in os.listdir(folder / "winner")
    stale = {"adapter_config.json", "config.json"} & set(os.listdir(folder / "winner"))
    assert len(stale) == 1, "nothing of an earlier winner is left"


def test_the_settings_that_count(make):
    settings = make()
    assert settings.differs_from(settings.to_dict()) == []
    assert settings.differs_from(json.loads(json.dumps(settings.to_dict()))) == []
    free = make(seeds=9, time_limit=5.0, budget=3, methods=("lora",))
    assert free.differs_from(settings.to_dict()) == []
    assert make(steps=4, metric="f1").differs_from(settings.to_dict()) == ["metric", "steps"]


# --- killed and resumed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ticks",
    [
        pytest.param(2, id="in the first", marks=pytest.mark.slow),
        pytest.param(13, id="in the first rung"),
        pytest.param(28, id="in the second", marks=pytest.mark.slow),
        pytest.param(50, id="in a seed"),
    ],
)
def test_killed_and_resumed_gives_the_same_numbers(ticks, whole, make, tmp_path, monkeypatch):
    interrupted_after(ticks, make(), tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out" / "comparison.json").exists()
    finished = {p: p.read_bytes() for p in (tmp_path / "out" / "runs").rglob("run.json")} if ticks > 2 else {}
    result, said = run(make(), tmp_path / "out", resume=True)
    assert said.count("(finished before)") == len(finished)
    assert all(p.read_bytes() == content for p, content in finished.items()), "what was finished is kept"
    assert numbers(result) == numbers(whole[1])
    assert names(tmp_path / "out") == names(whole[0])


def test_a_damaged_checkpoint_of_the_search_is_refused_and_named(make, tmp_path, monkeypatch):
    interrupted_after(28, make(), tmp_path / "out", monkeypatch)
    tensors = sorted((tmp_path / "out" / "runs").rglob("tensors.pt"))
    assert tensors
    for path in tensors:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"tensors\.pt.*remove that folder"):
        run(make(), tmp_path / "out", resume=True)


@pytest.mark.parametrize("where", ["export_winner", "write_json"])
def test_killed_at_the_end(where, whole, make, tmp_path, monkeypatch):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    for name in ("comparison.json", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "winner")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, where, stop)
        with pytest.raises(KeyboardInterrupt):
            run(make(), folder, resume=True)
    result, said = run(make(), folder, resume=True)
    assert said.count("(finished before)") == len(records(whole[0]))
    assert numbers(result) == numbers(whole[1])
    timed = {row["name"]: row["seconds_per_step"] for row in result["methods"] if not row.get("trivial")}
    assert timed == {name: row["seconds_per_step"] for name, row in by_name(whole[1]).items()}


def test_a_run_that_was_half_written_is_made_again(whole, make, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    (folder / "runs" / "lora" / "seed-0" / "run.json").unlink()  # killed after the adapter, before the record
    (folder / "runs" / "full" / "seed-0" / "run.json").unlink()
    gone = next((folder / "runs" / "lora").glob("lr-*/rung-5/run.json"))
    gone.unlink()  # its checkpoint is gone, so that it begins anew
    adapter = folder / "runs" / "lora" / "seed-0" / "adapter" / "adapter.safetensors"
    weights = folder / "runs" / "full" / "seed-0" / "weights.safetensors"
    adapter.write_bytes(b"half")
    weights.write_bytes(b"half")
    result, said = run(make(), folder, resume=True)
    assert said.count("(finished before)") == len(records(whole[0])) - 3
    assert numbers(result) == numbers(whole[1])
    for file in (adapter, weights):
        assert file.read_bytes() == (whole[0] / file.relative_to(folder)).read_bytes()
    again = numbers(read_json(gone))
    assert again == numbers(read_json(whole[0] / gone.relative_to(folder)))


def test_more_seeds_are_added_to_those_that_are_there(whole, make, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    result, said = run(make(seeds=3), folder, resume=True)
    assert said.count("(finished before)") == len(records(whole[0]))
    scores = by_name(result)["lora"]["scores"]
    assert scores[:2] == by_name(whole[1])["lora"]["scores"]
    assert len(scores) == 3


def test_other_settings_are_refused_and_named(whole, make):
    folder, _, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ValueError, match=r"made with different settings: --steps was 5, --batch-size was 8"):
        run(make(steps=4, batch_size=4), folder, resume=True)
    with pytest.raises(FileExistsError, match="already holds a comparison; continue it with --resume"):
        run(make(), folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_data_that_has_changed_is_not_mixed_with_what_it_was(make, tmp_path):
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sentences(60))
    settings = make(data=(str(file),), methods=("linear-probe",), seeds=1, rates=1, steps=3)
    run(settings, tmp_path / "out")
    assert run(settings, tmp_path / "out", resume=True)[1].count("(finished before)") == 3
    tiny.write_jsonl(file, tiny.sentences(60, seed=5))
    with pytest.raises(CheckpointError, match=r"begun with other content of data \S*a\.jsonl"):
        run(settings, tmp_path / "out", resume=True)


@pytest.mark.slow
def test_killed_by_the_system(whole, make, tmp_path):
    """SIGKILL at arbitrary moments, through the command line, until it comes to its end."""
    settings = make()
    options = [
        "--model", settings.model, "--data", settings.data[0], "--methods", ",".join(METHODS), "--seeds", "2", "--rates", "2",
        "--sizes", "1", "--steps", "5", "--batch-size", "8", "--max-length", "16", "--out", str(tmp_path / "out"), "--resume",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from lowdim.cli import main; main()", "compare", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    records = tmp_path / "out" / "runs"
    for wanted in (1, 6, 13, 20):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(records.rglob("run.json"))) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert all(json.loads(p.read_text()) for p in records.rglob("run.json")), "every record is whole"
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for part in ("methods", "search", "judgement"):
        assert numbers(result[part]) == numbers(json.loads(json.dumps(whole[1][part])))
    assert not list((tmp_path / "out").rglob(".*.tmp"))
