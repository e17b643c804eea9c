import json
import random

import numpy as np
import pytest
import torch

from lowdim import models
from lowdim.errors import CheckpointError, DataError
from lowdim.files import read_json, write_tensors
from lowdim.represent import DSimplexClassifier, identification_accuracy, simplex_vertices
from lowdim.testing.small_encoder import WORDS, save_small_encoder
from lowdim.train import run_recipe
from lowdim.train.recipes import Recipe, load_recipe
from lowdim.train.replacing import Replaces
from lowdim.train.tasks.replace import replacing

st = pytest.importorskip("sentence_transformers", reason="the models are sentence-transformers'")

COUNT = 150


def text_rows():
    draw = random.Random(0)
    for i in range(COUNT):
        topic = ("cat", "dog", "bird")[i % 3]
        yield {"text": " ".join([topic, *draw.choices(WORDS[5:], k=3)]), "topic": topic}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replacing")
    save_small_encoder(folder / "old", seed=1)
    save_small_encoder(folder / "new", seed=2)
    save_small_encoder(folder / "wide", width=24)
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows()), encoding="utf-8")
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in list(text_rows())[:9]), encoding="utf-8")
    old = st.SentenceTransformer(str(folder / "old"), device="cpu").encode([row["text"] for row in text_rows()])
    np.save(folder / "old.npy", old)
    noise = np.random.default_rng(0).normal(scale=0.3, size=(COUNT, 16))
    np.save(folder / "classes.npy", np.float32(noise + np.eye(16)[[8 + i % 3 for i in range(COUNT)]]))
    return folder


def task_of(place, replaces, **how):
    tokenizer = models.load_tokenizer(str(place / "new"))
    made = Replaces.model_validate(replaces if isinstance(replaces, dict) else str(replaces))
    return replacing(tokenizer, [place / "texts.jsonl"], made, **{"label": "topic", **how})


def text_of(task, row):
    return task.processor.decode(row["input_ids"], skip_special_tokens=True)


def test_each_row_has_the_old_vector_of_its_text(place):
    old = dict(zip((row["text"] for row in text_rows()), np.load(place / "old.npy")))
    for replaces in (place / "old", place / "old.npy"):
        task = task_of(place, replaces)
        for part in (task.train, task.validation, task.test):
            batch = task.collate([part[i] for i in range(len(part))])
            for i, row in enumerate(part):
                np.testing.assert_allclose(batch["old"][i], old[text_of(task, row)], atol=1e-5)


def test_vectors_follow_the_files_of_the_parts(place):
    vectors = torch.arange(COUNT + 9.0)[:, None].expand(-1, 16)
    write_tensors(place / "both.safetensors", {"old": vectors, "other": vectors})
    task = task_of(place, f"{place / 'both.safetensors'}:old", evaluation=place / "few.jsonl")
    rows = list(text_rows())
    assert [float(task.collate([row])["old"][0, 0]) for row in task.test] == list(range(COUNT, COUNT + 9))
    for row in task.train:
        assert rows[int(task.collate([row])["old"][0, 0])]["text"] == text_of(task, row)


@pytest.mark.parametrize("ce_weight", [0.1, 0.0, 1.0])
def test_the_loss_is_the_formula(place, ce_weight):
    task = task_of(place, {"vectors": str(place / "old.npy"), "mu": 4.0, "ce_weight": ce_weight})
    model = models.load_model(str(place / "new"), "embed").eval()
    batch = task.collate([task.train[i] for i in range(8)])
    f = torch.from_numpy(model.encode([text_of(task, task.train[i]) for i in range(8)])).double()
    g, y = batch["old"].double(), batch["labels"]
    entropy = -(f @ simplex_vertices(17, dtype=torch.float64).T).log_softmax(1)[torch.arange(8), y].mean()
    s = 4.0 * (g / g.norm(dim=1, keepdim=True)) @ (f / f.norm(dim=1, keepdim=True)).T
    hoc = (-s.diagonal() + torch.where(y[:, None] != y[None], s, 0.0).exp().sum(1).log()).mean()
    assert task.loss_fn(model, batch).item() == pytest.approx(float(ce_weight * entropy + (1 - ce_weight) * hoc), abs=1e-5)
    assert DSimplexClassifier(17).feature_dim == 16


def test_the_score_is_that_of_queries_in_the_old_index(place):
    task = task_of(place, place / "old.npy")
    model = models.load_model(str(place / "new"), "embed").eval()
    new = model.encode([text_of(task, row) for row in task.test])
    gallery = task.collate([task.train[i] for i in range(len(task.train))])
    expected = identification_accuracy(gallery["old"], gallery["labels"], new, [row["labels"] for row in task.test])
    score = task.score(model, task.test, task.metric())
    assert score.value == pytest.approx(expected)
    assert np.mean(score.values) == pytest.approx(expected)
    assert set(score.values) <= {0.0, 1.0}


def recipe(place, out, **changes):
    made = {
        "model": str(place / "new"),
        "task": "embed",
        "data": [str(place / "texts.jsonl")],
        "label": "topic",
        "method": "full",
    }
    return Recipe(**{**made, "replaces": str(place / "old.npy"), "steps": 3, "batch_size": 8, "out": str(out), **changes})


def test_a_run_ends_in_what_index_check_says(place, tmp_path):
    from lowdim.jobs import IndexCheckSettings, index_check
    from lowdim.report.single import render_run

    record = run_recipe(recipe(place, tmp_path / "run"))
    index = tmp_path / "run" / "index"
    vectors, items = index / "vectors.safetensors", index / "items.jsonl"
    said = index_check(
        IndexCheckSettings(old=f"{vectors}:old", new=f"{vectors}:new", labels=f"{items}:label", query=f"{items}:asks")
    ).to_dict()
    assert json.loads(json.dumps(said)) == {key: value for key, value in record["replacement"].items() if key != "old"}
    assert record["test"] == pytest.approx(said["matrix"][1][0])
    assert record["replacement"]["old"] == str(place / "old.npy")
    loaded = st.SentenceTransformer(str(tmp_path / "run" / "model"), trust_remote_code=False, device="cpu")
    task = task_of(place, place / "old.npy")
    assert task.evaluate(loaded, task.test, task.metric()) == pytest.approx(record["test"])
    page = render_run(read_json(tmp_path / "run" / "run.json"))
    for part in ("May the old index stay?", "Cross-test matrix", "new model asks", f"{said['matrix'][1][0]:.3f}"):
        assert part in page


def test_a_model_that_is_drawn_to_the_old_one_keeps_the_index(place, tmp_path):
    """The old vectors stand near a point for each class; without them, the new ones learn the classes elsewhere."""
    old, how = str(place / "classes.npy"), {"steps": 60, "batch_size": 32, "lr": 1e-2}
    kept = run_recipe(recipe(place, tmp_path / "kept", replaces=old, **how))
    free = run_recipe(recipe(place, tmp_path / "free", replaces={"vectors": old, "ce_weight": 1.0}, **how))
    assert free["replacement"]["matrix"][1][1] > 0.9
    assert kept["replacement"]["verdict"] == "stay"
    assert free["replacement"]["verdict"] == "rebuild"


def test_random_weights_are_drawn_from_the_seed(place, tmp_path):
    first, same, other = (
        run_recipe(recipe(place, tmp_path / name, pretrained=False, seed=seed))
        for name, seed in (("first", 0), ("same", 0), ("other", 1))
    )
    assert first["losses"] == same["losses"] != other["losses"]
    assert first["fingerprint"]["the base model's weights"] != other["fingerprint"]["the base model's weights"]
    with pytest.raises(ValueError, match="leave out ffn, mixer and tokenizer"):
        run_recipe(recipe(place, tmp_path / "blocks", pretrained=False, ffn="lowrank"))


def test_an_adapter_replaces_a_model_too(place, tmp_path):
    record = run_recipe(recipe(place, tmp_path / "run", method="lora", replaces=str(place / "old")))
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
    assert record["replacement"]["items"] > 0


def test_a_resumed_run_is_the_uninterrupted_one(place, tmp_path):
    from transformers import TrainerCallback

    class Stop(Exception):
        pass

    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise Stop

    whole = run_recipe(recipe(place, tmp_path / "whole", steps=4, save_steps=2))
    again = recipe(place, tmp_path / "again", steps=4, save_steps=2)
    with pytest.raises(Stop):
        run_recipe(again, callbacks=(Breaks(),))
    old = np.load(place / "old.npy")
    np.save(place / "old.npy", old + 1)
    try:
        with pytest.raises(CheckpointError, match=r"other content of the old vectors of .*old\.npy"):
            run_recipe(again, resume=True)
    finally:
        np.save(place / "old.npy", old)
    resumed = run_recipe(again, resume=True)
    assert resumed["losses"] == whole["losses"]
    assert resumed["replacement"] == whole["replacement"]
    name = "model/model.safetensors"
    assert resumed["files"][name] == whole["files"][name]


def test_a_name_is_a_file_or_a_model(tmp_path):
    written = "model: minilm\ntask: embed\ndata: x.jsonl\nreplaces: {}\n"
    for value, vectors, model in (
        ("old.npy", "old.npy", None),
        ("old.npz:vectors", "old.npz:vectors", None),
        ("minilm", None, "minilm"),
        ("{model: a/b, ce_weight: 0}", None, "a/b"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(written.replace("{}", value), encoding="utf-8")
        found = load_recipe(path).replaces
        assert (found.vectors, found.model) == (vectors, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replaces": {"mu": 3.0}}, "name either the file of the old model's vectors or the old model"),
        ({"replaces": {"model": "a", "vectors": "b.npy"}}, "name either"),
        ({"replaces": {"model": "a", "mu": 0}}, r"replaces\.mu: .*greater than 0 \(got 0\)"),
        ({"replaces": {"model": "a", "ce_weight": 1.5}}, r"replaces\.ce_weight: .*less than or equal to 1 \(got 1\.5\)"),
        ({"replaces": {"modell": "a"}}, r"replaces\.modell"),
        ({"replaces": "a", "task": "classify"}, "replaces is for task embed; the task is classify"),
        ({"replaces": "a", "sizes": [[1, 2]]}, "leave out sizes"),
    ],
)
def test_a_key_that_is_wrong(changes, message):
    from lowdim.train.recipes import new_recipe

    with pytest.raises(ValueError, match=message):
        new_recipe(**{"model": "minilm", "task": "embed", "data": ["x"], **changes})


def test_data_that_do_not_fit(place, tmp_path):
    np.save(tmp_path / "short.npy", np.ones((5, 16), dtype=np.float32))
    with pytest.raises(DataError, match=r"short\.npy has 5 rows, and the data 150 texts"):
        task_of(place, tmp_path / "short.npy")
    broken = np.ones((COUNT, 16), dtype=np.float32)
    broken[7, 3] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(DataError, match=r"broken\.npy gives row 7 NaN"):
        task_of(place, tmp_path / "broken.npy")
    np.save(tmp_path / "flat.npy", np.ones((COUNT, 1), dtype=np.float32))
    with pytest.raises(ValueError, match=r"room for 2 classes; texts\.jsonl has 3"):
        task_of(place, tmp_path / "flat.npy")
    with pytest.raises(ValueError, match=r"one class for each \(got ';'\)"):
        task_of(place, place / "old.npy", separator=";")
    rows = [{"one": row["text"], "two": row["text"], "topic": row["topic"]} for row in text_rows()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs\.jsonl has pairs of texts"):
        run_recipe(recipe(place, tmp_path / "a", data=[str(tmp_path / "pairs.jsonl")], text=["one", "two"]))
    with pytest.raises(ValueError, match="dimensions, and the model's 24"):
        run_recipe(recipe(place, tmp_path / "b", model=str(place / "wide")))
    assert not list((tmp_path / "b").glob("*.*"))
