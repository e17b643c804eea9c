"""`lowdim compare`, end to end on a tiny model: fair, repeatable after a kill, and honest about what failed."""

import copy
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tiny
from lowdim import catalogue, models
from lowdim.compare import CompareSettings, compare, runner, runs
from lowdim.compare.live import LiveTable
from lowdim.compare.result import mark, sampling_error
from lowdim.compare.runner import _contest, _task
from lowdim.compare.winner import export_winner, restore
from lowdim.errors import BudgetError, CheckpointError, LowdimError
from lowdim.files import read_json
from lowdim.records import ComparedRun, MethodRecord
from lowdim.train.metrics import METRICS
from lowdim.train.tasks import Task, language_modelling
from lowdim.train.tokenizers import byte_tokenizer

METHODS = ("linear-probe", "lora", "full", "lamda", "monarch")
ACCURACY, PERPLEXITY = METRICS["accuracy"], METRICS["perplexity"]
#: What a clock decides, and not the seed.
TIMED = {"seconds_per_step", "created", "seconds", "command"}


@pytest.fixture(scope="module")
def make(pooled_folder, two_classes):
    def settings(**changes):
        keys = {
            "model": str(pooled_folder), "data": (str(two_classes),), "methods": METHODS, "seeds": 2, "trials": 2, "steps": 4,
            "batch_size": 8, "max_length": 16,
        }  # fmt: skip
        return CompareSettings(**{**keys, **changes})

    return settings


def run(settings, folder, **options):
    """Compares; returns the result and what was said."""
    said = io.StringIO()
    result = compare(settings, folder, console=Console(file=said, width=200), **options)
    return result, said.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _forecast_once():
    """The same forecast is not made again for each comparison."""
    import lowdim.plan

    known = {}
    original = lowdim.plan.forecast

    def forecast(config, chosen, *, budget_bytes=None, **keywords):
        key = (config.to_json_string(), chosen.name, tuple(chosen.options.items()), tuple(keywords.items()))
        if key not in known:
            known[key] = original(config, chosen, **keywords)
        return dataclasses.replace(known[key], budget_bytes=budget_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowdim.plan, "forecast", forecast)
        yield


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """A comparison that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return (folder, *run(make(), folder))


def numbers(value):
    """A result without what the clock decides."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in TIMED}
    return [numbers(v) for v in value] if isinstance(value, list) else value


def by_name(result):
    """The methods that were compared; rows of what was never trained are no candidates."""
    return {row["name"]: row for row in result["methods"] if not row.get("trivial")}


# --- one comparison --------------------------------------------------------------------------------------------------------


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
        assert row["interval"][0] <= row["mean"] <= row["interval"][1]
        assert row["forecast_peak_bytes"] > 0
        assert row["measured_peak_bytes"] > 0
        assert row["seconds_per_step"] > 0
        assert row["lr"] in [t["lr"] for t in row["trials"]]
    assert rows["linear-probe"]["trained_parameters"] < rows["lora"]["trained_parameters"] < rows["full"]["trained_parameters"]
    assert result["winner"]["method"] in rows
    assert "[20/20]" in said


def test_every_method_gets_the_same(whole):
    folder, result, _ = whole
    seeds = set()
    for row in by_name(result).values():
        chosen = catalogue.variant(row["name"])
        assert [t["lr"] for t in row["trials"]] == list(chosen.rates[:2])
        best = max(row["trials"], key=lambda t: t["score"])
        assert row["lr"] == best["lr"], "the rate is chosen by the validation part"
        records = [json.loads((folder / "runs" / row["name"] / f"seed-{i}" / "run.json").read_text()) for i in range(2)]
        assert all(r["lr"] == row["lr"] for r in records)
        seeds.add(tuple(r["seed"] for r in records))
        assert {r["steps"] for r in records} == {4}
    assert len(seeds) == 1
    assert len(set(seeds.pop())) == 2, "and two seeds are two"


def test_the_test_part_is_looked_at_once_a_seed(make, tmp_path, monkeypatch):
    looks = {"validation": 0, "test": 0, "train": 0}
    original = Task.score

    def score(self, model, part, metric):
        name = next(n for n in looks if getattr(self, n) is part)
        looks[name] += 1
        return original(self, model, part, metric)

    monkeypatch.setattr(Task, "score", score)
    run(make(methods=("linear-probe", "lora", "full"), trials=3, seeds=2), tmp_path / "out")
    assert looks["test"] == 3 * 2
    assert looks["validation"] == 3 * (3 + 2) + 1, "what is kept of the winner is scored once more, on this part"
    assert looks["train"] == 0


def test_the_folder(whole):
    folder, result, _ = whole
    assert sorted(p.name for p in folder.iterdir()) == ["comparison.json", "report.html", "runs", "settings.json", "winner"]
    assert read_json(folder / "comparison.json") == json.loads(json.dumps(result))
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert "LaMDA" in (folder / "report.html").read_text()
    for method in METHODS:
        assert sorted(p.name for p in (folder / "runs" / method).iterdir()) == ["seed-0", "seed-1", "trial-0", "trial-1"]
        record = json.loads((folder / "runs" / method / "seed-1" / "run.json").read_text())
        assert record["failure"] is None
        assert record["loss_steps"] == [1, 2, 3, 4]
        assert len(record["losses"]) == 4
        assert record["environment"]["torch"] == torch.__version__
        assert record["environment"]["cpu"]
        assert (record["method"], record["batch_size"]) == (method, 8)
        assert set(record["hits"]) <= {"0", "1"}
        assert record["hits"].count("1") / len(record["hits"]) == pytest.approx(record["test"])
    for method in ("lora", "lamda"):
        file = folder / "runs" / method / "seed-0" / "adapter" / "adapter.safetensors"
        assert file.stat().st_size == by_name(result)[method]["file_bytes"]
    assert (folder / "runs" / "full" / "seed-0" / "weights.safetensors").is_file()
    assert not (folder / "runs" / "full" / "seed-1" / "weights.safetensors").exists(), "one copy of a whole model is enough"


def rebuilt(settings, folder):
    tokenizer = models.load_tokenizer(settings.model)
    task = _task(settings, tokenizer)
    metric = METRICS[settings.metric or ("accuracy" if settings.task == "classify" else "perplexity")]
    return _contest(settings, task, metric, folder, tokenizer, Console(file=io.StringIO())), tokenizer


@pytest.mark.parametrize("method", METHODS)
def test_whoever_wins_is_exported_and_reloads_with_the_same_logits(method, whole, make, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    settings = make()
    bench, tokenizer = rebuilt(settings, folder)
    best = MethodRecord.from_dict(by_name(whole[1])[method], folder)
    winner = export_winner(bench, settings, tokenizer, best, folder)
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
    assert make(steps=5, metric="f1").differs_from(settings.to_dict()) == ["metric", "steps"]


# --- killed and resumed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ticks", [2, 29, 50], ids=["in the first trial", "in a later trial", "in a seed"])
def test_killed_and_resumed_gives_the_same_numbers(ticks, whole, make, tmp_path, monkeypatch):
    left = [ticks]
    original = LiveTable.tick

    def tick(self):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(LiveTable, "tick", tick)
        with pytest.raises(KeyboardInterrupt):
            run(make(), tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.json").exists()
    finished = {p: p.read_bytes() for p in (tmp_path / "out" / "runs").rglob("run.json")} if ticks > 2 else {}
    assert len(finished) == (ticks - 1) // 4
    result, said = run(make(), tmp_path / "out", resume=True)
    assert said.count("(finished before)") == len(finished)
    assert all(p.read_bytes() == content for p, content in finished.items()), "what was finished is kept"
    assert numbers(result) == numbers(whole[1])


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
    assert said.count("(finished before)") == 20
    assert numbers(result) == numbers(whole[1])
    timed = {row["name"]: row["seconds_per_step"] for row in result["methods"]}
    assert timed == {row["name"]: row["seconds_per_step"] for row in whole[1]["methods"]}


def test_a_run_that_was_half_written_is_made_again(whole, make, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    (folder / "runs" / "lora" / "seed-0" / "run.json").unlink()  # killed after the adapter, before the record
    (folder / "runs" / "full" / "seed-0" / "run.json").unlink()
    adapter = folder / "runs" / "lora" / "seed-0" / "adapter" / "adapter.safetensors"
    weights = folder / "runs" / "full" / "seed-0" / "weights.safetensors"
    adapter.write_bytes(b"half")
    weights.write_bytes(b"half")
    result, said = run(make(), folder, resume=True)
    assert said.count("(finished before)") == 18
    assert numbers(result) == numbers(whole[1])
    for file in (adapter, weights):
        assert file.read_bytes() == (whole[0] / file.relative_to(folder)).read_bytes()


def test_more_seeds_are_added_to_those_that_are_there(whole, make, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "out")
    result, said = run(make(seeds=3, methods=("lora",)), folder, resume=True)
    assert said.count("(finished before)") == 4
    scores = by_name(result)["lora"]["scores"]
    assert scores[:2] == by_name(whole[1])["lora"]["scores"]
    assert len(scores) == 3


def test_other_settings_are_refused_and_named(whole, make):
    folder, _, _ = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ValueError, match=r"made with different settings: --steps was 4, --batch-size was 8"):
        run(make(steps=5, batch_size=4), folder, resume=True)
    with pytest.raises(FileExistsError, match="already holds a comparison; continue it with --resume"):
        run(make(), folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_data_that_has_changed_is_not_mixed_with_what_it_was(make, tmp_path):
    file = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sentences(60))
    settings = make(data=(str(file),), methods=("linear-probe",), seeds=1, trials=1, steps=3)
    run(settings, tmp_path / "out")
    assert run(settings, tmp_path / "out", resume=True)[1].count("(finished before)") == 2
    tiny.write_jsonl(file, tiny.sentences(60, seed=5))
    with pytest.raises(CheckpointError, match=r"begun with other content of data \S*a\.jsonl"):
        run(settings, tmp_path / "out", resume=True)


@pytest.mark.slow
def test_killed_by_the_system(whole, make, tmp_path):
    """SIGKILL at arbitrary moments, through the command line, until it comes to its end."""
    settings = make()
    options = [
        "--model", settings.model, "--data", settings.data[0], "--methods", ",".join(METHODS), "--seeds", "2", "--trials", "2",
        "--steps", "4", "--batch-size", "8", "--max-length", "16", "--out", str(tmp_path / "out"), "--resume",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from lowdim.cli import main; main()", "compare", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    records = tmp_path / "out" / "runs"
    for wanted in (1, 6, 13):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(records.rglob("run.json"))) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert all(json.loads(p.read_text()) for p in records.rglob("run.json")), "every record is whole"
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers(result["methods"]) == numbers(json.loads(json.dumps(whole[1]["methods"])))
    assert not list((tmp_path / "out").rglob(".*.tmp"))


# --- what fails ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rates(monkeypatch):
    """Other learning rates for a baseline."""

    def change(**new):
        changed = tuple(dataclasses.replace(v, rates=new.get(v.name, v.rates)) for v in catalogue.BASELINES)
        monkeypatch.setattr("lowdim.catalogue.lookup.BASELINES", changed)

    return change


def test_a_method_that_diverges_is_reported_and_the_others_go_on(make, tmp_path, rates):
    rates(full=(1e38, 1e37), lora=(1e-3, 1e38))
    result, said = run(make(methods=("full", "lora", "linear-probe"), steps=3), tmp_path / "out")
    rows = by_name(result)
    assert rows["full"]["status"] == "failed"
    assert "the loss became nan at step 2" in rows["full"]["reason"]
    assert rows["full"]["mean"] is None
    assert rows["full"]["pareto"] is rows["full"]["within_noise"] is False
    assert rows["linear-probe"]["status"] == rows["lora"]["status"] == "ok"
    assert rows["lora"]["lr"] == 1e-3, "a rate that diverges is never chosen"
    assert rows["lora"]["reason"].startswith("1 of 4 runs failed: the loss became nan")
    assert result["winner"]["method"] in ("lora", "linear-probe")
    assert "the loss became nan" in said
    again, _ = run(make(methods=("full", "lora", "linear-probe"), steps=3), tmp_path / "out", resume=True)
    assert numbers(again) == numbers(result)


def test_when_all_fail_the_record_is_kept_and_the_reasons_are_told(make, tmp_path, rates):
    rates(full=(1e38,))
    with pytest.raises(
        LowdimError, match=r"no method finished \(Full fine-tuning: the loss became nan at step 2\); the runs are in"
    ):
        run(make(methods=("full",), steps=3, trials=1), tmp_path / "out")
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["winner"] is None
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out" / "winner").exists()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), torch.linalg.LinAlgError("did not converge"), ValueError("")])
def test_an_error_in_one_run_does_not_end_the_others(error, make, tmp_path, monkeypatch):
    """The first seed of full fine-tuning fails, so its whole model must be that of the second."""
    original = runs.fit

    def fit(applied, task, settings, *args, **kwargs):
        if applied.kind == "full" and settings.seed == failing[0]:
            raise error
        return original(applied, task, settings, *args, **kwargs)

    from lowdim.linalg import derive_seed

    failing = [derive_seed(0, "run", 0) % 2**31]
    monkeypatch.setattr(runs, "fit", fit)
    result, _ = run(make(methods=("full",), steps=3, trials=1), tmp_path / "out")
    row = by_name(result)["full"]
    assert row["status"] == "ok"
    assert len(row["scores"]) == 1
    again = "; --resume tries it again" if "memory" in str(error) else ""
    assert row["reason"] == f"1 of 3 runs failed: {str(error) or 'ValueError'}{again}"
    assert result["winner"]["exported"] == "seed 2"
    assert result["winner"]["largest_difference"] < 1e-5


def test_a_full_disk_ends_it_and_it_can_be_resumed(make, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    settings = make(methods=("linear-probe",), seeds=1, trials=1, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(settings, tmp_path / "out")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert run(settings, tmp_path / "out")[0]["winner"]


def test_a_budget_leaves_out_what_does_not_fit_and_says_why(whole, make, tmp_path):
    peaks = {row["name"]: row["forecast_peak_bytes"] for row in whole[1]["methods"]}
    budget = (peaks["lora"] + peaks["full"]) // 2
    assert peaks["lora"] < budget < peaks["full"]
    result, said = run(make(methods=("full", "lora"), budget=budget, seeds=1, trials=1, steps=3), tmp_path / "out")
    row = by_name(result)["full"]
    assert row["status"] == "skipped"
    assert "at the peak by forecast; the budget is" in row["reason"]
    assert f"left out Full fine-tuning: {row['reason']}" in said
    assert result["budget_bytes"] == budget
    assert by_name(result)["lora"]["status"] == "ok"
    assert not (tmp_path / "out" / "runs" / "full").exists(), "it was never run"
    with pytest.raises(BudgetError, match=r"nothing fits .*: the smallest need is .* \(LoRA\)"):
        run(make(methods=("full", "lora"), budget=1000), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_time_limit_leaves_every_method_with_as_many_seeds(make, tmp_path):
    result, _ = run(make(methods=("linear-probe", "lora"), seeds=5, trials=1, steps=3, time_limit=1e-3), tmp_path / "out")
    assert [len(row["scores"]) for row in by_name(result).values()] == [1, 1]
    assert any("the time limit of 1.00 ms left room for 1 of 5 seeds" in note for note in result["notes"])
    assert any("the time limit of 1.00 ms was exceeded" in note for note in result["notes"])


def test_a_time_limit_holds_for_trials_too(make, tmp_path):
    settings = make(methods=("linear-probe", "lora"), seeds=2, trials=3, steps=3, time_limit=1e-3)
    result, said = run(settings, tmp_path / "out")
    assert [len(row["trials"]) for row in by_name(result).values()] == [1, 1]
    assert any("left room for 1 of 3 learning rates of each method" in note for note in result["notes"])
    assert "[4/4]" not in said
    more, _ = run(make(methods=("linear-probe", "lora"), seeds=2, trials=3, steps=3), tmp_path / "out", resume=True)
    assert [len(row["trials"]) for row in by_name(more).values()] == [3, 3], "what was left out is made without the limit"
    assert not any("time limit" in note for note in more["notes"])


def test_a_record_is_what_is_on_the_disk(make, tmp_path):
    """What a resumed comparison reads is what the first one saw, numbers that are not finite included."""
    settings = make(steps=3)
    bench, _ = rebuilt(settings, tmp_path)
    for chosen, lr in (("lora", 1e-3), ("full", 1e38)):
        one = runs.Run(catalogue.variant(chosen), "trial", 0, lr, 0)
        record = runs.perform(bench, one)
        assert runs.finished_record(bench, one) == record
        assert not any(isinstance(v, float) and math.isnan(v) for v in vars(record).values())
    other = dataclasses.replace(bench, fingerprint="other")
    assert runs.finished_record(other, one) is None
    assert runs.finished_record(bench, dataclasses.replace(one, lr=1.0)) is None
    file = tmp_path / "runs" / one.name / "run.json"
    for content, part in (("[]", "it holds a list, not an object"), ('{"schema": 1}', "`fingerprint` is missing")):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=rf"run\.json is not the record of a comparison's run: {part}"):
            runs.finished_record(bench, one)


def test_the_shared_model_is_never_trained(make, tmp_path):
    bench, _ = rebuilt(make(steps=3), tmp_path)
    before = copy.deepcopy(bench.model.state_dict())
    for chosen in METHODS:
        runs.perform(bench, runs.Run(catalogue.variant(chosen), "trial", 0, 1e-2, 0))
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())


# --- language models, and classifiers of transformers ----------------------------------------------------------------------


def test_language_models(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:3000])
    settings = CompareSettings(
        model="stories260k", data=(str(text),), task="causal-lm", methods=("linear-probe", "lora", "galore"), seeds=2, trials=1,
        steps=3, batch_size=4, max_length=16,
    )  # fmt: skip
    result, _ = run(settings, tmp_path / "out")
    rows = by_name(result)
    assert rows["linear-probe"]["status"] == "skipped", "it was named, so it is not dropped without a word"
    assert "has no new head to probe" in rows.pop("linear-probe")["reason"]
    (untouched,) = (row for row in result["methods"] if row.get("trivial"))
    base = models.load_model("stories260k", "causal-lm")
    task = language_modelling(models.load_tokenizer("stories260k"), [text], max_length=16)
    assert untouched["mean"] == pytest.approx(task.evaluate(base, task.test, PERPLEXITY), rel=1e-4)
    assert result["metric"] == {"name": "perplexity", "higher_is_better": False}
    best = min(rows.values(), key=lambda row: row["mean"])
    assert result["winner"]["method"] == best["name"]
    assert result["winner"]["largest_difference"] < 1e-4
    assert all(1 < row["mean"] < 1000 for row in rows.values())
    assert rows["lora"]["hits"] == ["", ""]


def test_a_classifier_of_transformers(bert_folder, make, tmp_path):
    result, _ = run(make(model=str(bert_folder), methods=("lora",), seeds=1, trials=1, steps=3, metric="f1"), tmp_path / "out")
    assert result["metric"]["name"] == "f1"
    assert result["winner"]["largest_difference"] < 1e-5
    assert any("1 seeds say little" in note or "1 seed" in note for note in result["notes"])


# --- marks -----------------------------------------------------------------------------------------------------------------


def row(name, scores, memory, hits=(), status="ok", forecast=None):
    mean = sum(scores) / len(scores) if scores else None
    return MethodRecord(
        name=name, status=status, scores=list(scores), mean=mean, hits=list(hits), measured_peak_bytes=memory,
        forecast_peak_bytes=forecast,
    )  # fmt: skip


def test_the_pareto_front():
    rows = [
        row("best", [0.90, 0.92], 100),
        row("dominated", [0.80, 0.82], 100),
        row("lean", [0.70, 0.72], 10),
        row("wasteful", [0.70, 0.72], 20),
        row("forecast only", [0.60, 0.62], None, forecast=5),
        row("unknown memory", [0.91, 0.91], None),
        row("failed", [], 1, status="failed"),
    ]
    best = mark(rows, ACCURACY)
    assert best.name == "best"
    assert {r.name for r in rows if r.pareto} == {"best", "lean", "forecast only"}


def test_equals_are_both_on_the_front():
    rows = [row("a", [0.9, 0.9], 10), row("b", [0.9, 0.9], 10)]
    mark(rows, ACCURACY)
    assert all(r.pareto for r in rows)


def test_lower_is_better_for_perplexity():
    rows = [row("a", [9.0, 9.1], 10), row("b", [5.0, 5.1], 20), row("c", [6.0, 6.1], 30)]
    assert mark(rows, PERPLEXITY).name == "b"
    assert [r.pareto for r in rows] == [True, True, False]


def test_noise_is_of_the_best_only():
    rows = [row("a", [0.90, 0.92, 0.91], 1), row("b", [0.92, 0.90, 0.905], 1), row("c", [0.70, 0.72, 0.71], 1)]
    assert mark(rows, ACCURACY).name == "a"
    assert [r.within_noise for r in rows] == [False, True, False]
    alone = [row("a", [0.9], 1), row("b", [0.1], 1)]
    mark(alone, ACCURACY)
    assert [r.within_noise for r in alone] == [False, True], "one seed says nothing"
    assert mark([row("x", [], 1, status="failed")], ACCURACY) is None


def test_the_error_of_a_finite_test_set():
    # Four texts, differences 1, 0, 0, -1 of the averages over two seeds: their spread over √4.
    best, other = ["1101", "1101"], ["0101", "0111"]
    gaps = [1.0, 0.0, -0.5, 0.0]
    mean = sum(gaps) / 4
    want = math.sqrt(sum((g - mean) ** 2 for g in gaps) / 3) / 2
    assert sampling_error(best, other) == pytest.approx(want)
    assert sampling_error(["1111"], ["1111"]) == 0.0
    assert sampling_error(["", ""], ["", ""]) == 0.0
    assert sampling_error([], []) == 0.0
    assert sampling_error(["101"], ["10"]) == 0.0
    # Two accuracies 0.02 apart with the same spread over seeds: settled on many texts, noise on few.
    few, many = 50, 5000
    for texts, noise in ((few, True), (many, False)):
        gap = texts // 50
        a = "1" * (texts - gap) + "0" * gap
        b = "1" * (texts - 2 * gap) + "0" * 2 * gap
        rows = [row("a", [0.98, 0.98], 1, [a, a]), row("b", [0.96, 0.96], 1, [b, b])]
        mark(rows, ACCURACY)
        assert rows[1].within_noise is noise


def test_the_shipped_default_methods_are_built():
    from lowdim.compare import DEFAULT_METHODS

    names = DEFAULT_METHODS.split(",")
    assert {"linear-probe", "lora", "full"} <= set(names), "the baselines are in"
    assert [v.name for v in catalogue.methods(DEFAULT_METHODS)] == names


def test_the_live_table_shows_brackets_as_they_are():
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=120)
    one = runs.Run(catalogue.variant("lora"), "trial", 0, 1e-3, 0)
    failed = ComparedRun(
        fingerprint="", method="lora", label="LoRA", phase="trial", seed=0, lr=1e-3, steps=3, batch_size=1, metric="accuracy",
        environment={}, failure="rank must be in [/1, 2] of [red]q_proj[/]",
    )  # fmt: skip
    with LiveTable(console, ACCURACY, [one.variant], 3) as live:
        live.start(one)
        live.finish(one, failed)
        console.print(live._view())
    assert "[/1, 2] of [red]q_proj[/]" in said.getvalue()


def test_a_folder_that_cannot_be_a_comparison(make, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="is a file"):
        run(make(), tmp_path / "file")
    with pytest.raises(FileExistsError, match="is not empty and holds no comparison"):
        run(make(), Path(tmp_path))
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"settings\.json is not the settings of a comparison"):
        run(make(), tmp_path, resume=True)


def test_pretraining_from_random_weights(tmp_path):
    """Weights of every kind: plain, factors with a companion, a basis in buffers, bytes; the winner loads as a plain model."""
    from transformers import LlamaConfig

    shape = tmp_path / "shape"
    LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ).save_pretrained(shape)
    text = tmp_path / "text.txt"
    text.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:6000])
    chosen = ("full", "galore", "q-galore", "sltrain", "sst", "maestro", "low-rank-restart")
    settings = CompareSettings(
        model=str(shape), task="pretrain", tokenizer="bytes", data=(str(text),), methods=chosen, seeds=1, trials=1, steps=4,
        batch_size=4, max_length=16, limit=32,
    )  # fmt: skip
    result, said = run(settings, tmp_path / "out")
    rows = by_name(result)
    assert [row["status"] for row in rows.values()] == ["ok"] * len(chosen), said
    assert result["metric"]["name"] == "perplexity"
    assert all(1 < row["mean"] < 400 for row in rows.values())
    assert all(row["measured_peak_bytes"] > 0 for row in rows.values())
    assert result["winner"]["largest_difference"] < 2e-3
    again, _ = run(settings, tmp_path / "out", resume=True)
    assert [row["mean"] for row in again["methods"]] == [row["mean"] for row in result["methods"]]
    for name in chosen[1:]:  # whatever wins must come back from its files
        bench = _contest(
            settings,
            _task(settings, byte_tokenizer()),
            PERPLEXITY,
            tmp_path / "out",
            byte_tokenizer(),
            Console(file=io.StringIO()),
        )
        folder = tmp_path / "out" / "runs" / name / "seed-0"
        model = restore(bench, folder)
        score = bench.task.evaluate(model, bench.task.test, PERPLEXITY)
        assert score == pytest.approx(rows[name]["mean"], rel=1e-6), name


def test_what_pretraining_refuses(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text " * 500)
    usual = {"model": "llama-tiny", "task": "pretrain", "tokenizer": "bytes", "data": (str(text),), "steps": 3}
    with pytest.raises(ValueError, match="adapters need a trained model"):
        run(CompareSettings(**usual, methods=("lora",)), tmp_path / "out")
    with pytest.raises(ValueError, match="--tokenizer is for --task pretrain"):
        CompareSettings(**{**usual, "task": "causal-lm"})
