"""What fails in a comparison is reported, bounded by budget and time, and ends nothing else."""

import copy
import dataclasses
import json
import math
import os

import pytest
import torch

from comparing import METHODS, by_name, numbers, rebuilt, run
from lowdim import catalogue
from lowdim.comparison import runner, runs
from lowdim.comparison.clock import Clock
from lowdim.errors import BudgetError, CheckpointError, LowdimError


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
    assert rows["full"]["pareto"] is False
    assert rows["full"]["name"] not in result["judgement"]["may_be_best"]
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
        run(make(methods=("full",), steps=3, rates=1), tmp_path / "out")
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
    result, _ = run(make(methods=("full",), steps=3, rates=1), tmp_path / "out")
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

    settings = make(methods=("linear-probe",), seeds=1, rates=1, steps=3)
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
    result, said = run(make(methods=("full", "lora"), budget=budget, seeds=1, rates=1, steps=3), tmp_path / "out")
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


class Late(Clock):
    """A clock that has time for what must be, and for no more."""

    def has_room(self, runs, **how):
        return False


def test_a_time_limit_bounds_the_search_and_the_final(make, tmp_path, monkeypatch):
    settings = make(methods=("linear-probe", "lora"), seeds=5, rates=2, time_limit=1000.0)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "Clock", Late)
        result, _ = run(settings, tmp_path / "out")
    rows = by_name(result)
    assert [len(row["trials"]) for row in rows.values()] == [1, 1], "every method is tried once"
    assert {visit["steps"] for visit in result["search"]["visits"]} == {2}, "and goes no further"
    (ended,) = [row for row in rows.values() if row["status"] == "ok"]
    (left,) = [row for row in rows.values() if row["status"] == "left"]
    assert len(ended["scores"]) == 1
    assert left["reason"] == "the time limit left no room for its final; it was searched after 2 of 5 steps"
    assert any("left 2 candidates untried beside 2 that were" in note for note in result["notes"])
    assert any("ended the search after 2 of 5 steps" in note for note in result["notes"])
    assert any(f"left no room for the final of {left['label']}" in note for note in result["notes"])
    more, _ = run(make(methods=("linear-probe", "lora"), seeds=2, rates=2), tmp_path / "out", resume=True)
    assert all(len(row["trials"]) >= 2 for row in by_name(more).values()), "what was left out is made without the limit"
    assert not any("time limit" in note for note in more["notes"])


def test_a_time_limit_that_is_too_short(make, tmp_path, monkeypatch):
    settings = make(methods=("linear-probe", "lora"), time_limit=1e-6)
    with pytest.raises(ValueError, match=r"--time-limit \S+ \S+ is too short for one rung of the search: 2 steps of 2 methods"):
        run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "it is known before anything is trained"
    monkeypatch.setattr(Clock, "check_forecast", lambda *args: None)
    with pytest.raises(LowdimError, match=r"--time-limit \S+ \S+ is over, and not every method has been tried once"):
        run(settings, tmp_path / "out")
    again, _ = run(make(methods=("linear-probe", "lora")), tmp_path / "out", resume=True)
    assert all(row["status"] == "ok" for row in by_name(again).values())


def test_a_record_is_what_is_on_the_disk(make, tmp_path):
    """What a resumed comparison reads is what the first one saw, numbers that are not finite included."""
    settings = make(steps=3)
    bench = rebuilt(settings, tmp_path)
    for chosen, lr in (("lora", 1e-3), ("full", 1e38)):
        one = runs.Run(catalogue.variant(chosen), "trial", 0, lr, 0, 3)
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
    bench = rebuilt(make(steps=3), tmp_path)
    before = copy.deepcopy(bench.model.state_dict())
    for chosen in METHODS:
        runs.perform(bench, runs.Run(catalogue.variant(chosen), "trial", 0, 1e-2, 0, 3))
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
