"""Pairs of texts as one input: encoded, split, trained, exported with the code that reads them."""

import json
import re

import pytest
import torch

from lowdim import models
from lowdim.comparison import compare
from lowdim.comparison.settings import CompareSettings
from lowdim.errors import DataError
from lowdim.jobs import ExportSettings, export
from lowdim.train.inputs import encode, joint_of
from lowdim.train.recipes import Recipe, load_recipe
from lowdim.train.run import run_recipe
from lowdim.train.tasks import classification
from lowdim.train.tokenizers import byte_tokenizer
from tiny import SPECIAL, save_bert

WORDS = ("the", "film", "was", "a", "plot", "good", "bad", "felt", "story", "one", "two", "three")


def pairs(count):
    """Pairs whose label is whether both end with the same word."""
    rows = []
    for i in range(count):
        first = [WORDS[(i + k) % 12] for k in range(3 + i % 3)] + [("good", "bad")[i % 2]]
        second = [WORDS[(i * 5 + k) % 12] for k in range(2 + i % 7)] + [("good", "bad")[i // 2 % 2]]
        rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": int(first[-1] == second[-1])})
    return rows


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(60)))
    return path


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A tiny sentence encoder whose tokenizer makes pairs as BERT's does."""
    from tokenizers.processors import TemplateProcessing

    folder = save_bert(tmp_path_factory.mktemp("models") / "pooled", pooled=True)
    tokenizer = models.load_tokenizer(str(folder))
    special = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_input_names": names}))
    return folder


@pytest.fixture(scope="module")
def stories():
    return models.load_tokenizer("stories260k")


def test_a_pair_is_what_the_tokenizer_makes_of_it(pooled):
    tokenizer = models.load_tokenizer(str(pooled))
    assert joint_of(tokenizer) == ""
    found = encode(tokenizer, ["a film"], ["the plot was good"], length=20)
    want = tokenizer("a film", "the plot was good")
    assert list(found.ids()) == [want["input_ids"]]
    assert found.columns["token_type_ids"].to_pylist() == [want["token_type_ids"]] == [[0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert (found.cut, found.joint) == (0, "")
    assert list(encode(tokenizer, ["a film"], ["a plot"], length=20, segments=False).columns) == ["input_ids"]
    assert list(encode(tokenizer, ["a film"], length=20).columns) == ["input_ids"]
    cut = encode(tokenizer, ["a film"], ["the plot was good " * 5], length=10)
    assert tokenizer.decode(next(cut.ids())) == "[CLS] a film [SEP] the plot was good the [SEP]"
    assert cut.columns["token_type_ids"].to_pylist() == [[0] * 4 + [1] * 6]
    assert cut.cut == 1


def test_where_the_tokenizer_puts_nothing_between(stories):
    assert joint_of(stories) == joint_of(byte_tokenizer()) == "\n"
    found = encode(stories, ["a cat sat"], ["it was a dog"], length=40)
    assert stories.decode(next(found.ids()), skip_special_tokens=True) == "a cat sat\nit was a dog"
    assert found.joint == "\n"


@pytest.mark.parametrize(("first", "second"), [(30, 4), (4, 30), (30, 30), (20, 12)])
def test_the_longer_text_of_a_pair_is_cut_first(first, second):
    found = encode(byte_tokenizer(), ["a" * first], ["b" * second], length=21)
    (ids,) = found.ids()
    kept = bytes(ids).decode()
    assert len(kept) == 21
    a, b = kept.split("\n")
    assert a == "a" * min(first, max(10, 20 - second))
    assert b == "b" * min(second, max(10, 20 - first))
    assert found.cut == 1


def test_a_tokenizer_that_sees_no_line_breaks(bert_folder):
    tokenizer = models.load_tokenizer(str(bert_folder))
    assert joint_of(tokenizer) == " [SEP] "
    found = encode(tokenizer, ["a film"], ["the plot"], length=20)
    assert tokenizer.decode(next(found.ids())) == "[CLS] a film [SEP] the plot [SEP]"


def test_parts_hold_pairs(pooled, file):
    tokenizer = models.load_tokenizer(str(pooled))
    task = classification(tokenizer, [file], max_length=32)
    assert task.sizes()["train"] + task.sizes()["validation"] + task.sizes()["test"] == 60
    assert task.joint == ""
    batch = task.collate([task.train[i] for i in range(4)])
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    known = {f"{row['sentence1']} {row['sentence2']}": row["label"] for row in pairs(60)}
    assert [known[text] for text in texts] == batch["labels"].tolist()
    seconds = [tokenizer.decode(ids[types == 1], skip_special_tokens=True) for ids, types in
               zip(batch["input_ids"], batch["token_type_ids"])]  # fmt: skip
    assert set(seconds) <= {row["sentence2"] for row in pairs(60)}
    assert not (batch["token_type_ids"] * (1 - batch["attention_mask"])).any()
    assert task.example.startswith("'[CLS] ")
    assert task.example.count("[SEP]") == 2
    assert "a pair are columns 'sentence1' and 'sentence2' and the label 'label'" in dict(task.remarks())["data"]


def test_pairs_that_are_cut_are_counted_as_pairs(pooled, file):
    tokenizer = models.load_tokenizer(str(pooled))
    task = classification(tokenizer, [file], max_length=6)
    assert any(re.fullmatch(r"\d+ of \d+ pairs are longer than 6 tokens and were cut \(--max-length\)", n) for n in task.notes)


def test_a_pooled_encoder_reads_the_segments(pooled):
    model = models.load_model(str(pooled), "classify").eval()
    batch = {"input_ids": torch.tensor([[2, 5, 3, 6, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    types = torch.tensor([[0, 0, 0, 1, 1]])
    plain, told = model(**batch).logits, model(**batch, token_type_ids=types).logits
    assert torch.equal(plain, model(**batch, token_type_ids=torch.zeros_like(types)).logits)
    assert not torch.allclose(plain, told)
    assert models.reads_segments(str(pooled))
    assert not models.reads_segments("stories260k")


def test_training_and_test_file_are_alike(stories, file, tmp_path):
    (tmp_path / "held.csv").write_text("text,label\nfine,0\ngood,1\n")
    with pytest.raises(DataError, match=r"pairs.jsonl has pairs of texts, .*held.csv single texts"):
        classification(stories, [file], evaluation=tmp_path / "held.csv")


def test_a_recipe_names_two_columns(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: stories260k\ntask: classify\ndata: pairs.csv\ntext: [a, b]\n")
    assert load_recipe(path).text == "a,b"
    path.write_text("model: stories260k\ntask: classify\ndata: pairs.csv\ntext: [1, b]\n")
    with pytest.raises(ValueError, match="text"):
        load_recipe(path)


def test_a_run_records_its_columns(file, tmp_path):
    said = []
    record = run_recipe(
        Recipe(model="stories260k", task="classify", method="lora", data=[str(file)], text="sentence2,sentence1", max_length=48,
               steps=2, batch_size=4, out=str(tmp_path / "run")),
        say=said.append,
    )  # fmt: skip
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert data == record["data"]
    assert data["columns"] == [{"source": str(file), "text": ["sentence2", "sentence1"], "label": "label", "unused": []}]
    assert data["joint"] == "\n"
    assert any(line.startswith("data: ") and "columns 'sentence2' and 'sentence1'" in line for line in said)
    assert f"example: {data['example']}" in said
    assert "\\n" in data["example"]
    done = export(ExportSettings(adapter=tmp_path / "run", out=tmp_path / "peft"))
    assert "tokenizer(['a text\\nits partner']" in done.how_to_load
    assert done.how_to_load in (tmp_path / "peft" / "README.md").read_text()


@pytest.mark.parametrize("model", ["pooled", "stories260k"])
@pytest.mark.parametrize("method", ["linear-probe", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_code_of_a_winner_reads_a_pair(pooled, file, tmp_path, monkeypatch, model, method):
    name = str(pooled) if model == "pooled" else model
    settings = CompareSettings(
        model=name, data=(str(file),), methods=(method,), steps=3, seeds=1, rates=1, max_length=40, batch_size=8
    )
    record = compare(settings, tmp_path / "out")
    assert record["winner"]["largest_difference"] < 1e-4
    task = classification(models.load_tokenizer(name), [file], max_length=40)
    code = record["winner"]["how_to_load"]
    row = next(row for row in pairs(60) if 3 < len(row["sentence2"].split()) < 6)
    between = '"], ["' if model == "pooled" else "\\n"
    assert between.join(("a text", "its partner")) in code
    code = code.replace("a text", row["sentence1"]).replace("its partner", row["sentence2"])
    monkeypatch.chdir(tmp_path / "out")
    found: dict = {}
    exec(code, found)
    everything = [ids for part in (task.train, task.validation, task.test) for ids in part["input_ids"]]
    assert found["batch"]["input_ids"].tolist()[0] in everything, "the very tokens that the model was trained on"
    assert found["logits"].shape == (1, 2)
