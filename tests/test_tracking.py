"""What a tracker is told of a comparison, through a tracker of the tests that is registered with transformers."""

import os
import warnings

import pytest

from lowdim.comparison.tracking import Tracking
from lowdim.errors import MissingPackageError, UnknownNameError
from lowdim.records import ComparedRun, ComparisonRecord, JudgementRecord, MethodRecord, MetricRecord, ModelRecord

transformers = pytest.importorskip("transformers")


@pytest.fixture
def told(monkeypatch):
    """What the tracker `notebook` was told, a list of runs: (name, rate, entries, ended)."""
    from transformers.integrations import integration_utils

    runs = []

    class Notebook(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.run = {"name": args.run_name, "rate": args.learning_rate, "seed": args.seed, "entries": [], "ended": False}
            self.run["board"] = os.environ["TENSORBOARD_LOGGING_DIR"]
            runs.append(self.run)

        def on_log(self, args, state, control, model=None, logs=None, **kwargs):
            self.run["entries"].append((state.global_step, logs))

        def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
            self.run["ended"] = True

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["notebook"])
    return runs


def compared(**changes):
    usual = {
        "fingerprint": "", "method": "lora", "label": "LoRA", "phase": "seed", "seed": 7, "lr": 0.01, "steps": 3,
        "batch_size": 2, "metric": "accuracy", "environment": {}, "size": 4, "losses": [1.0, 0.5, 0.25],
        "loss_steps": [1, 2, 3], "validation": 0.75, "test": 0.5,
    }  # fmt: skip
    return ComparedRun(**{**usual, **changes})


def comparison(**changes):
    rows = [MethodRecord(name="lora", mean=0.5), MethodRecord(name="full", status="left")]
    return ComparisonRecord(
        title="", created="", lowdim="", command="", environment={}, task="own", metric=MetricRecord("accuracy", True),
        model=ModelRecord("net", 1, "float32"), data={}, settings={}, budget_bytes=None, methods=rows, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("report_to", ["notebook", "all"])
def test_a_run_has_its_method_losses_and_scores(report_to, told, tmp_path):
    Tracking(report_to, tmp_path / "mine").run("lora/seed-0", compared())
    (run,) = told
    assert (run["name"], run["rate"], run["seed"], run["ended"]) == ("mine/lora/seed-0", 0.01, 7, True)
    assert run["entries"] == [
        (0, {"method": "lora", "size": 4, "rate": 0.01, "seed": 7}),
        (1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 0.25}),
        (3, {"eval_accuracy": 0.75, "test_accuracy": 0.5}),
    ]  # fmt: skip
    assert run["board"] == str(tmp_path / "mine" / "tensorboard" / "lora" / "seed-0")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_a_run_that_failed_says_why(told, tmp_path):
    Tracking("notebook", tmp_path).run("lora/seed-0", compared(losses=None, loss_steps=None, test=None, failure="too hot"))
    assert told[0]["entries"][-1] == (0, {"eval_accuracy": 0.75, "failure": "too hot"})


def test_the_verdict_is_a_run_of_its_own(told, tmp_path):
    found = JudgementRecord(
        level=0.95,
        judged="accuracy",
        seeds=2,
        examples=9,
        half_width=None,
        may_be_best=[],
        best=None,
        headline="Nothing shown.",
    )
    Tracking("notebook", tmp_path / "mine").verdict(comparison(judgement=found))
    assert told[0]["name"] == "mine/verdict"
    assert told[0]["entries"] == [(0, {"verdict": "Nothing shown.", "test_lora": 0.5})]


def test_a_place_that_the_user_has_set_stays(told, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    Tracking("notebook", tmp_path).run("a", compared())
    assert told[0]["board"] == os.environ["TENSORBOARD_LOGGING_DIR"] == "elsewhere"


def test_a_tracker_that_fails_is_left_out_and_the_comparison_goes_on(told, tmp_path, monkeypatch):
    tracking = Tracking("notebook", tmp_path)
    monkeypatch.setitem(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK, "notebook", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="notebook failed, and gets no more of this comparison: division by zero"):
        tracking.run("a", compared())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracking.run("b", compared())
    assert told == []


def test_without_a_tracker_nothing_is_told(told, tmp_path):
    Tracking("none", tmp_path).run("a", compared())
    assert told == []


def test_a_tracker_that_is_not_there_is_refused(told, tmp_path):
    with pytest.raises(MissingPackageError, match="report_to: 'wandb' is not installed: pip install wandb"):
        Tracking("wandb", tmp_path)
    with pytest.raises(UnknownNameError, match="'notebok' \\(nearest: notebook"):
        Tracking("notebok", tmp_path)
