import copy
import json
import random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from lowdim import models
from lowdim.errors import DataError
from lowdim.files import read_json
from lowdim.jobs import PlanSettings, plan
from lowdim.represent import StarbucksLoss
from lowdim.testing.small_encoder import WORDS, save_small_encoder
from lowdim.train import run_recipe
from lowdim.train.recipes import Recipe
from lowdim.train.tasks.embed import embedding

st = pytest.importorskip("sentence_transformers", reason="the models and losses are sentence-transformers'")
losses = st.sentence_transformer.losses


def texts(count=60):
    draw = random.Random(0)
    for _ in range(count):
        first = draw.choices(WORDS, k=5)
        yield (
            " ".join(first),
            " ".join([*first[:3], *draw.choices(WORDS, k=2)]),
            " ".join(draw.choices(WORDS, k=4)),
            draw.random(),
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    save_small_encoder(folder / "model")
    kinds = {
        "pairs": [{"query": a, "passage": b} for a, b, _, _ in texts()],
        "triplets": [{"anchor": a, "positive": b, "negative": c} for a, b, c, _ in texts()],
        "scored": [{"sentence1": a, "sentence2": b, "score": s} for a, b, _, s in texts()],
    }
    for name, rows in kinds.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(place):
    return models.load_model(str(place / "model"), "embed").eval()


def task_of(place, kind, **how):
    return embedding(models.load_tokenizer(str(place / "model")), [place / f"{kind}.jsonl"], **how)


@pytest.mark.parametrize(("kind", "columns"), [("pairs", 2), ("triplets", 3), ("scored", 2)])
def test_rows_parts_and_loss(place, model, kind, columns):
    task = task_of(place, kind)
    assert task.sizes() == {"train": 34, "validation": 8, "test": 18}
    keys = [{json.dumps(row["texts"]) for row in part} for part in (task.train, task.validation, task.test)]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
    batch = task.collate(task.train[:5])
    assert batch["input_ids"].shape[0] == 5 * columns
    assert task.count_items(batch) == 5
    features = [{name: batch[name][i * 5 : i * 5 + 5] for name in ("input_ids", "attention_mask")} for i in range(columns)]
    base = (losses.CoSENTLoss if kind == "scored" else losses.MultipleNegativesRankingLoss)(model)
    assert torch.equal(task.loss_fn(model, batch), base(features, batch["labels"]))
    rows = [task.processor.decode(task.train[0]["texts"][i], skip_special_tokens=True) for i in range(columns)]
    assert tuple(rows) in [row[:columns] for row in texts()]


def embedded(model, task, column):
    return model.encode([task.processor.decode(row["texts"][column], skip_special_tokens=True) for row in task.test])


def test_spearman_is_that_of_cosines(place, model):
    task = task_of(place, "scored")
    a, b = (embedded(model, task, i) for i in (0, 1))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    score = task.score(model, task.test, task.metric())
    assert score.value == pytest.approx(spearmanr(cosines, [row["label"] for row in task.test])[0], abs=1e-6)
    assert np.mean(score.values) == pytest.approx(score.value, abs=0.2)  # values of the jackknife
    assert [metric.name for metric in task.metrics()] == ["spearman"]
    with pytest.raises(ValueError, match=r"ndcg@10"):
        task.metric("ndcg@10")


def test_ndcg_is_scikit_learns(place, model):
    task = task_of(place, "pairs")
    a, b = (embedded(model, task, i) for i in (0, 1))
    cosines = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    score = task.score(model, task.test, task.metric("ndcg@10"))
    assert score.value == pytest.approx(ndcg_score(np.eye(len(a)), cosines, k=10), abs=1e-6)
    assert np.mean(score.values) == pytest.approx(score.value)


def test_equal_second_texts_are_one_answer(place):
    task = task_of(place, "pairs")
    x = np.eye(2, dtype=np.float32)
    outcomes = [(0.0, b"one", x[1], x[0]), (0.0, b"two", x[1], x[1]), (0.0, b"two", x[1], x[1])]
    second = 1 / np.log2(3)  # two copies of the wrong text before it are one
    assert task.score_of(outcomes, task.metric()).value == pytest.approx((second + 1 + 1) / 3)
    collapsed = [(0.0, bytes([i]), x[0], x[0]) for i in range(20)]
    assert task.score_of(collapsed, task.metric()).value == 0.0


def test_sizes_choose_the_loss(place, model):
    name = str(place / "model")
    batch = task_of(place, "pairs").collate(task_of(place, "pairs").train[:4])
    features = [{key: batch[key][i * 4 : i * 4 + 4] for key in ("input_ids", "attention_mask")} for i in (0, 1)]
    growing = task_of(place, "pairs", pairs=[(1, 4), (2, 8)], model=name)
    assert growing.pairs == ((1, 4), (2, 8), (3, 16))
    base = losses.MultipleNegativesRankingLoss(model)
    assert torch.equal(growing.loss_fn(model, batch), StarbucksLoss(model, base, growing.pairs)(copy.deepcopy(features)))
    nested = task_of(place, "pairs", pairs=[(3, 4), (3, 16)], model=name)
    assert torch.equal(
        nested.loss_fn(model, batch), losses.MatryoshkaLoss(model, base, [4, 16])(copy.deepcopy(features), batch["labels"])
    )
    note = growing.finish(model, ())
    assert note is not None
    assert note.startswith("test ndcg@10 by (layers, dimensions): (1, 4) 0.")
    whole = growing.evaluate(model, growing.test, growing.metric())
    assert f"(3, 16) {whole:.4f}" in note


def recipe(place, tmp_path, kind="pairs", **changes):
    made = {"model": str(place / "model"), "task": "embed", "data": [str(place / f"{kind}.jsonl")], "steps": 3, "batch_size": 8}
    return Recipe(**{**made, "out": str(tmp_path / "run"), **changes})


@pytest.mark.parametrize(("kind", "method", "sizes"), [("scored", "full", [(1, 4), (2, 8)]), ("triplets", "full", None)])
def test_a_run_is_a_folder_of_sentence_transformers(place, tmp_path, kind, method, sizes):
    record = run_recipe(recipe(place, tmp_path, kind, method=method, sizes=sizes))
    loaded = st.SentenceTransformer(str(tmp_path / "run" / "model"), trust_remote_code=False, device="cpu")
    kinds = [module["type"] for module in json.loads((tmp_path / "run" / "model" / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    assert loaded[0].auto_model.pooler is None  # the model has none, and none is drawn at random
    task = task_of(place, kind)
    assert task.evaluate(loaded, task.test, task.metric()) == pytest.approx(record["test"], abs=1e-6)
    assert any("by (layers, dimensions)" in note for note in record.get("notes", [])) == (sizes is not None)
    assert record["metric"] == ("spearman" if kind == "scored" else "ndcg@10")


def test_an_adapter_is_merged_into_a_folder(place, tmp_path):
    from lowdim.jobs import ExportSettings, export

    record = run_recipe(recipe(place, tmp_path, method="lora", save_steps=2))
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
    export(ExportSettings(adapter=tmp_path / "run" / "adapter", out=tmp_path / "merged", format="merged"))
    loaded = st.SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=False, device="cpu")
    task = task_of(place, "pairs")
    assert task.evaluate(loaded, task.test, task.metric()) == pytest.approx(record["test"], abs=1e-6)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(place, tmp_path):
    whole = run_recipe(recipe(place, tmp_path, method="lora", steps=4, save_steps=2))
    again = recipe(place, tmp_path, method="lora", steps=4, save_steps=2, out=str(tmp_path / "again"))

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise Stop

    with pytest.raises(Stop):
        run_recipe(again, callbacks=(Breaks(),))
    assert run_recipe(again, resume=True)["losses"] == whole["losses"]


def test_plan_knows_the_task(place):
    outcome = plan(PlanSettings(model=str(place / "model"), task="embed", methods="lora,full", length=8, batch_size=4))
    assert len(outcome.forecasts) == 2
    assert not outcome.refused


@pytest.mark.slow
def test_a_comparison_hands_over_a_folder(place, tmp_path, monkeypatch):
    from lowdim.cli.main import main

    monkeypatch.chdir(tmp_path)
    command = (
        f"compare --model {place / 'model'} --task embed --data {place / 'pairs.jsonl'} --methods lora,full --steps 3 "
        "--seeds 1 --rates 1 --batch-size 8 --out cmp"
    )
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert not end.value.code
    assert read_json(tmp_path / "cmp" / "comparison.json")["task"] == "embed"
    assert (tmp_path / "cmp" / "winner" / "README.md").is_file()


def test_refusals(place, tmp_path):
    with pytest.raises(DataError, match="pairs and scored pairs"):
        task_of(place, "pairs", evaluation=place / "scored.jsonl")
    with pytest.raises(ValueError, match="sizes is for task embed"):
        Recipe(model="minilm", data=["x"], sizes=[(1, 2)])
    with pytest.raises(ValueError, match="--quantize int8 is not for --task embed"):
        models.load_model(str(place / "model"), "embed", quantize="int8")
    task = task_of(place, "pairs", pairs=[(2, 8), (1, 4)], model=str(place / "model"))
    model = models.load_model(str(place / "model"), "embed")
    batch = task.collate(task.train[:4])
    with pytest.raises(ValueError, match="must grow"):
        task.loss_fn(model, batch)
