"""Matryoshka and Starbucks as methods of task embed: in runs, plans and comparisons."""

import json
import random

import pytest
import torch

from lowdim import models
from lowdim.catalogue import methods, variant
from lowdim.errors import UnknownNameError
from lowdim.files import read_json
from lowdim.jobs import PlanSettings, plan
from lowdim.methods.nesting import nested_sizes
from lowdim.represent import StarbucksLoss, shrink_encoder
from lowdim.testing.small_encoder import WORDS, save_small_encoder
from lowdim.train import run_recipe
from lowdim.train.recipes import Recipe
from lowdim.train.tasks.embed import embedding

st = pytest.importorskip("sentence_transformers", reason="the models and losses are sentence-transformers'")
losses = st.sentence_transformer.losses


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("nested"), random.Random(0)
    save_small_encoder(folder / "model")
    rows = []
    for _ in range(60):
        first = draw.choices(WORDS, k=5)
        rows.append({"query": " ".join(first), "passage": " ".join([*first[:3], *draw.choices(WORDS, k=2)])})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def task_of(place, **how):
    return embedding(models.load_tokenizer(str(place / "model")), [place / "pairs.jsonl"], **how)


def recipe(place, out, **changes):
    made = {"model": str(place / "model"), "task": "embed", "data": [str(place / "pairs.jsonl")], "steps": 3, "batch_size": 8}
    return Recipe(**{**made, "out": str(out), **changes})


def test_a_name_is_a_method_and_how_it_is_nested():
    for name, of, label in (
        ("starbucks", "full", "Starbucks"),
        ("full+starbucks", "full", "Starbucks"),
        ("lora+matryoshka", "lora", "LoRA, Matryoshka"),
        ("galore+starbucks", "galore", "GaLore, Starbucks"),
    ):
        found = variant(name)
        assert (found.kind, found.label, found.rates) == (variant(of).kind, label, variant(of).rates)
        assert variant(found.name) == found
        assert found.unfit("embed") is None
        assert "for --task embed" in found.unfit("classify")
    assert [each.name for each in methods("starbucks,full+starbucks,lora+starbucks")] == ["starbucks", "lora+starbucks"]
    with pytest.raises(UnknownNameError, match=r"what follows lora\+ must be one of matryoshka, starbucks, farms; got 'st"):
        variant("lora+starbuks")
    with pytest.raises(UnknownNameError, match="'lorra'"):
        variant("lorra+starbucks")


def test_sizes_of_a_model():
    assert nested_sizes("matryoshka", 3, 16) == ((3, 2), (3, 4), (3, 8), (3, 16))
    assert nested_sizes("starbucks", 3, 16) == ((1, 4), (2, 8), (3, 16))
    assert nested_sizes("starbucks", 3, 16, [(2, 3), (3, 16)]) == ((2, 3), (3, 16))
    with pytest.raises(ValueError, match=r"sizes of matryoshka must have all 3 layers in each; got \[\[1, 4\], \[3, 16\]\]"):
        nested_sizes("matryoshka", 3, 16, [(1, 4), (3, 16)])
    with pytest.raises(ValueError, match=r"sizes of starbucks must have layers that grow"):
        nested_sizes("starbucks", 3, 16, [(3, 4), (3, 16)])


def test_the_loss_is_the_sum_over_the_sizes(place):
    model, task = models.load_model(str(place / "model"), "embed").eval(), task_of(place)
    batch = task.collate(task.train[:6])

    def columns():
        return [{name: batch[name][i * 6 : i * 6 + 6] for name in ("input_ids", "attention_mask")} for i in (0, 1)]

    base = losses.MultipleNegativesRankingLoss(model)
    expected = {
        "starbucks": StarbucksLoss(model, base, [(1, 4), (2, 8), (3, 16)])(columns()),
        "matryoshka": losses.MatryoshkaLoss(model, base, [2, 4, 8, 16])(columns(), batch["labels"]),
        "full": base(columns(), batch["labels"]),
    }
    for name, loss in expected.items():
        assert torch.equal(task.loss_for(variant(name))(model, batch), loss)


def test_scores_at_sizes_are_those_of_the_cut_model(place):
    model, task = models.load_model(str(place / "model"), "embed").eval(), task_of(place)
    sizes = task.smaller(model, methods("starbucks,matryoshka,lora"))
    assert sizes == ((1, 4), (2, 8), (3, 2), (3, 4), (3, 8))
    rows = task.at_sizes(model, sizes, task.metric())
    assert [(row["layers"], row["dimensions"]) for row in rows] == list(sizes)
    for row in rows:
        cut = shrink_encoder(model, row["layers"], row["dimensions"])
        assert row["score"] == task.evaluate(cut, task.test, task.metric())
    assert task.smaller(model, methods("lora,full")) == ()


@pytest.mark.parametrize("method", ["starbucks", "lora+matryoshka"])
def test_a_run_says_what_smaller_sizes_cost(place, tmp_path, method):
    from lowdim.report.single import render_run

    record = run_recipe(recipe(place, tmp_path / "run", method=method))
    sizes = nested_sizes(variant(method).nested, 3, 16)[:-1]
    assert [(row["layers"], row["dimensions"]) for row in record["by_size"]] == list(sizes)
    untrained, task = models.load_model(str(place / "model"), "embed").eval(), task_of(place)
    assert [row["before"] for row in record["by_size"]] == [
        row["score"] for row in task.at_sizes(untrained, sizes, task.metric())
    ]
    page = render_run(read_json(tmp_path / "run" / "run.json"))
    assert "At smaller sizes" in page
    assert f"<td>{record['by_size'][0]['score']:.3f}</td>" in page
    if method == "starbucks":
        loaded = st.SentenceTransformer(str(tmp_path / "run" / "model"), trust_remote_code=False, device="cpu")
        assert [row["score"] for row in task.at_sizes(loaded, sizes, task.metric())] == pytest.approx(
            [row["score"] for row in record["by_size"]], abs=1e-6
        )


def test_sizes_of_a_recipe_stand_in_the_place_of_the_usual_ones(place, tmp_path):
    record = run_recipe(recipe(place, tmp_path / "run", method="starbucks", sizes=[(2, 4)]))
    assert [(row["layers"], row["dimensions"]) for row in record["by_size"]] == [(2, 4)]
    with pytest.raises(ValueError, match="sizes of matryoshka must have all 3 layers"):
        run_recipe(recipe(place, tmp_path / "wrong", method="matryoshka", sizes=[(2, 4)]))


def test_other_tasks_refuse(tmp_path):
    made = {"model": "stories260k", "task": "causal-lm", "data": ["lowdim:shakespeare"], "out": str(tmp_path / "a")}
    with pytest.raises(ValueError, match=r"method starbucks: Starbucks trains embeddings of several sizes.* --task embed"):
        run_recipe(Recipe(**made, method="starbucks"))
    assert not (tmp_path / "a").exists()


def test_plan_counts_the_sizes(place, tmp_path):
    settings = PlanSettings(
        model=str(place / "model"), task="embed", methods="full,starbucks,lora+matryoshka", length=12, batch_size=16
    )
    found = {each.method: each for each in plan(settings).forecasts}
    assert set(found) == {"full", "starbucks", "lora+matryoshka"}
    assert (
        found["starbucks"].trained_parameters == found["full"].trained_parameters > found["lora+matryoshka"].trained_parameters
    )
    assert found["starbucks"].total > found["full"].total
    assert found["starbucks"].flops > found["full"].flops
    other = plan(PlanSettings(model=str(place / "model"), task="classify", methods="full,starbucks", length=12))
    assert [each.method for each in other.forecasts] == ["full"]


@pytest.mark.slow
def test_a_comparison_shows_them_beside_untrained_truncation(place, tmp_path, monkeypatch, capsys):
    from lowdim.cli.main import main

    monkeypatch.chdir(tmp_path)
    command = (
        f"compare --model {place / 'model'} --task embed --data {place / 'pairs.jsonl'} --methods lora,matryoshka,starbucks "
        "--steps 4 --seeds 1 --rates 1 --sizes 1 --batch-size 8 --out cmp"
    )
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert not end.value.code
    said = capsys.readouterr().out
    record = read_json(tmp_path / "cmp" / "comparison.json")
    rows = {row["name"]: row for row in record["methods"]}
    assert set(rows) == {"lora", "matryoshka", "starbucks", "untouched"}
    sizes = [(1, 4), (2, 8), (3, 2), (3, 4), (3, 8)]
    for row in rows.values():
        assert [(cut["layers"], cut["dimensions"]) for cut in row["by_size"]] == sizes
    task, model = task_of(place), models.load_model(str(place / "model"), "embed").eval()
    untrained = task.at_sizes(model, sizes, task.metric())
    assert rows["untouched"]["by_size"] == untrained
    page = (tmp_path / "cmp" / "report.html").read_text()
    assert "At smaller sizes" in page
    assert "2 × 8" in page
    assert f"{untrained[0]['score']:.3f}" in page
    assert "cut to layers × dimensions" in said
    winner = record["winner"]["method"]
    if winner in ("matryoshka", "starbucks"):
        loaded = st.SentenceTransformer(str(tmp_path / "cmp" / "winner"), trust_remote_code=False, device="cpu")
        assert task.evaluate(loaded, task.test, task.metric()) == pytest.approx(rows[winner]["scores"][0], abs=1e-6)
