"""Comparisons of other models and from random weights; the front, and what is shown meanwhile."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from comparing import ACCURACY, PERPLEXITY, by_name, rebuilt, run
from lowdim import catalogue, models
from lowdim.comparison import CompareSettings, runs
from lowdim.comparison.live import LiveTable
from lowdim.comparison.verdict import conclude
from lowdim.comparison.winner import restore
from lowdim.errors import CheckpointError
from lowdim.records import ComparedRun, MethodRecord
from lowdim.train.metrics import METRICS
from lowdim.train.tasks import language_modelling
from lowdim.train.tasks.classify import Classification


def test_language_models(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:3000])
    settings = CompareSettings(
        model="stories260k", data=(str(text),), task="causal-lm", methods=("linear-probe", "lora", "galore"), seeds=2, rates=1,
        steps=3, batch_size=4, max_length=16,
    )  # fmt: skip
    result, _ = run(settings, tmp_path / "out")
    rows = by_name(result)
    assert rows["linear-probe"]["status"] == "skipped", "it was named, so it is not dropped without a word"
    assert "has no new head to probe" in rows.pop("linear-probe")["reason"]
    (untouched,) = (row for row in result["methods"] if row["name"] == "untouched")
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
    result, _ = run(make(model=str(bert_folder), methods=("lora",), seeds=1, rates=1, steps=3, metric="f1"), tmp_path / "out")
    assert result["metric"]["name"] == "f1"
    assert result["winner"]["largest_difference"] < 1e-5
    assert any("not known from one seed" in reason for reason in result["judgement"]["reasons"])


def test_in_bfloat16_and_grouped_by_length(make, whole, tmp_path, monkeypatch):
    """The search ranks by scores in bfloat16, and the final's are those of the model that is handed over."""
    trained, scored, fit, score = [], [], runs.fit, Classification.score

    def watched_fit(applied, task, settings, *args, **how):
        trained.append((settings.bf16, settings.group_by_length))
        return fit(applied, task, settings, *args, **how)

    def watched_score(self, model, part, metric):
        scored.append((part is self.test, "forward" in vars(model)))
        return score(self, model, part, metric)

    monkeypatch.setattr(runs, "fit", watched_fit)
    monkeypatch.setattr(Classification, "score", watched_score)
    settings = make(methods=("lora",), bf16=True, group_by_length=True)
    result, _ = run(settings, tmp_path / "out")
    assert set(trained) == {(True, True)}
    assert (False, True) in scored, "the search"
    assert (True, False) in scored
    assert (True, True) not in scored
    assert result["settings"]["bf16"]
    assert result["settings"]["group_by_length"]
    assert result["winner"]["largest_difference"] < 1e-5
    forecast, plain = (by_name(each)["lora"]["forecast_peak_bytes"] for each in (result, whole[1]))
    assert forecast != plain, "autocast takes other memory"
    with pytest.raises(ValueError, match=r"--resume: .* --bf16 was True"):
        run(make(methods=("lora",)), tmp_path / "out", resume=True)


def test_texts_of_one_length_are_not_grouped(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:3000])
    settings = CompareSettings(
        model="stories260k", data=(str(text),), task="causal-lm", methods=("lora",), max_length=16, group_by_length=True
    )
    with pytest.raises(ValueError, match="rows of causal-lm are all of one size"):
        run(settings, tmp_path / "out")
    assert not (tmp_path / "out" / "settings.json").exists()


def row(name, scores, memory, hits=(), status="ok", forecast=None):
    mean = sum(scores) / len(scores) if scores else None
    return MethodRecord(
        name=name, status=status, scores=list(scores), mean=mean, hits=list(hits), measured_peak_bytes=memory,
        forecast_peak_bytes=forecast,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "want"), [("exact-match", "loss"), ("perplexity", "perplexity")])
def test_the_search_ranks_by_loss_where_all_are_wrong_at_first(name, want, make, tmp_path):
    bench = rebuilt(make(), tmp_path)
    bench.metric, bench.task = METRICS[name], SimpleNamespace(metrics=lambda: [PERPLEXITY, METRICS["loss"]])
    assert bench.search_metric.name == want


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
    conclude(rows, None, ACCURACY)
    assert {r.name for r in rows if r.pareto} == {"best", "lean", "forecast only"}


def test_equals_are_both_on_the_front():
    rows = [row("a", [0.9, 0.9], 10), row("b", [0.9, 0.9], 10)]
    conclude(rows, None, ACCURACY)
    assert all(r.pareto for r in rows)


def test_lower_is_better_for_perplexity():
    rows = [row("a", [9.0, 9.1], 10), row("b", [5.0, 5.1], 20), row("c", [6.0, 6.1], 30)]
    assert conclude(rows, None, PERPLEXITY).pick.name == "b"
    assert [r.pareto for r in rows] == [True, True, False]


def test_the_shipped_default_methods_are_built():
    from lowdim.comparison import DEFAULT_METHODS

    names = DEFAULT_METHODS.split(",")
    assert {"linear-probe", "lora", "full"} <= set(names), "the baselines are in"
    assert [v.name for v in catalogue.methods(DEFAULT_METHODS)] == names


def test_the_live_table_shows_brackets_as_they_are():
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=120)
    one = runs.Run(catalogue.variant("lora"), "trial", 0, 1e-3, 0, 3)
    failed = ComparedRun(
        fingerprint="", method="lora", label="LoRA", phase="trial", seed=0, lr=1e-3, steps=3, batch_size=1, metric="accuracy",
        environment={}, failure="rank must be in [/1, 2] of [red]q_proj[/]",
    )  # fmt: skip
    with LiveTable(console, ACCURACY, {"lora": "LoRA"}, (3,)) as live:
        live.rung(0, 3, 1)
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


@pytest.mark.slow
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
        model=str(shape), task="pretrain", tokenizer="bytes", data=(str(text),), methods=chosen, seeds=1, rates=1, steps=4,
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
        bench = rebuilt(settings, tmp_path / "out")
        folder = tmp_path / "out" / "runs" / name / "seed-0"
        model = restore(bench, folder)
        score = bench.task.evaluate(model, bench.task.test, PERPLEXITY)
        assert score == pytest.approx(rows[name]["mean"], rel=1e-6), name


def test_what_pretraining_refuses(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text " * 500)
    usual = {"model": "llama-tiny", "task": "pretrain", "tokenizer": "bytes", "data": (str(text),), "steps": 3}
    with pytest.raises(ValueError, match="an adapter needs a trained model"):
        run(CompareSettings(**usual, methods=("lora",)), tmp_path / "out")
    with pytest.raises(ValueError, match="--tokenizer is for --task pretrain"):
        CompareSettings(**{**usual, "task": "causal-lm"})
