"""Texts with any number of classes: read, split, trained, scored."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lowdim import models
from lowdim.errors import DataError, UnknownNameError
from lowdim.train.data import read_examples
from lowdim.train.metrics import METRICS
from lowdim.train.recipes import Recipe
from lowdim.train.run import load_run, run_recipe
from lowdim.train.splits import split
from lowdim.train.tasks import classification
from tiny import PLAIN

WORDS = {"good": "praise", "bad": "blame", "plot": "story"}


def rows(count=150, seed=0):
    """Texts whose labels are those of the words in them; some have none."""
    draw = random.Random(seed)
    found = {}
    while len(found) < count:
        own = [word for word in WORDS if draw.random() < 0.4]
        words = draw.choices([w for w in PLAIN if w not in WORDS], k=6) + own
        draw.shuffle(words)
        found[" ".join(words)] = [WORDS[word] for word in own]
    return [{"text": text, "labels": labels} for text, labels in found.items()]


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("several") / "several.jsonl", rows())


@pytest.fixture(scope="module")
def task(bert_folder, file):
    return classification(models.load_tokenizer(str(bert_folder)), [file], max_length=16)


def test_lists_are_read_whatever_holds_them(file, tmp_path):
    found = read_examples([file])
    assert (found.several, found.classes) == (True, ("blame", "praise", "story"))
    assert [[found.classes[i] for i in own] for own in found.labels] == [sorted(row["labels"]) for row in rows()]
    assert () in found.labels, "an empty list is a label: no class fits"
    joined = [f"{row['text']},{'; '.join(row['labels'])}" for row in rows() if row["labels"]]
    table = tmp_path / "joined.csv"
    table.write_text("\n".join(["text,labels", *joined]) + "\n")
    named = read_examples([table], separator=";")
    assert list(named.labels) == [own for own in found.labels if own]
    (note,) = read_examples([table]).notes
    assert "each is trained as one class" in note
    assert "--label-separator ';'" in note
    marked = tmp_path / "marked.txt"
    marked.write_text("".join(f"{' '.join(f'__label__{m}' for m in row['labels'])} {row['text']}\n" for row in rows()))
    assert read_examples([marked]).labels == found.labels
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pa.Table.from_pylist(rows()), tmp_path / "several.parquet")
    assert read_examples([tmp_path / "several.parquet"]).labels == found.labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "praise"}, r"holds lists of labels and single ones, such as \[.*\] and 'praise'; write a list in each row"),
        ({"labels": [["praise"]]}, r"\[\['praise'\]\] is no list of labels"),
        ({"label": "praise"}, r"'label' holds one label in each row, and 'labels' a list of them: --label label trains on one"),
        ({"tokens": ["a", "b"], "tags": ["x", "y"]}, r"look like words with a tag each, which --task tokens learns"),
    ],
)
def test_two_readings_are_refused(change, message, tmp_path):
    lines = [{**row, **change} if set(change) - {"labels"} or i == 5 else row for i, row in enumerate(rows())]
    with pytest.raises(DataError, match=message):
        read_examples([written(tmp_path / "a.jsonl", lines)])


def test_a_zero_or_one_for_each_class_is_not_guessed(tmp_path):
    lines = [{"text": row["text"], "labels": [i % 2, 1, 0]} for i, row in enumerate(rows())]
    with pytest.raises(DataError, match=r"holds 3 zeros and ones in each row, .* write the names of the classes"):
        read_examples([written(tmp_path / "a.jsonl", lines)])


def test_files_must_agree_and_separators_exist(bert_folder, file, tmp_path):
    single = written(tmp_path / "single.jsonl", [{"text": "a film", "labels": "praise"}, {"text": "b", "labels": "blame"}])
    with pytest.raises(DataError, match=r"several\.jsonl has lists of labels .*, .*single\.jsonl has single ones"):
        read_examples([file, single])
    tokenizer = models.load_tokenizer(str(bert_folder))
    with pytest.raises(DataError, match=r"several\.jsonl has lists of labels, single\.jsonl single labels"):
        classification(tokenizer, [file], evaluation=single)
    with pytest.raises(DataError, match=r"no label in column 'labels' holds --label-separator '\|'"):
        read_examples([single], separator="|")
    with pytest.raises(DataError, match="holds lists; leave --label-separator ';' out"):
        read_examples([file], separator=";")


def test_every_part_holds_every_class(tmp_path):
    lines = rows(60)
    for i, name in enumerate(["rare", "rare", "rare", "odd", "odd", "odd"]):
        lines[i * 7]["labels"].append(name)
    for seed in range(20):
        parts = split(read_examples([written(tmp_path / "a.jsonl", lines)]), seed=seed)
        for part in (parts.train, parts.validation, parts.test):
            assert set(itertools.chain.from_iterable(part.labels)) == set(range(5))
        assert sorted([*parts.train.texts, *parts.validation.texts, *parts.test.texts]) == sorted(r["text"] for r in lines)


def test_the_loss_is_binary_cross_entropy(task, bert_folder):
    model = models.load_model(str(bert_folder), "classify", num_labels=3, problem=task.problem)
    batch = task.collate([task.train[i] for i in range(4)])
    assert batch["labels"].tolist() == [[float(k in task.train[i]["labels"]) for k in range(3)] for i in range(4)]
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        want = F.binary_cross_entropy_with_logits(logits, batch["labels"])
        assert task.loss_fn(model, batch).item() == pytest.approx(want.item())
        assert model(**batch).loss.item() == pytest.approx(want.item()), "the model knows its problem"
    assert (task.problem, task.num_labels, task.count_items(batch)) == ("multi_label_classification", 3, 4)


def test_accuracy_is_of_whole_rows_and_this_is_said(task):
    truth = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    outcomes = list(zip(truth, np.array([[2.0, -1.0, 3.0], [-1.0, -1.0, -1.0], [1.0, -1.0, -1.0]])))
    score = task.score_of(outcomes, METRICS["accuracy"])
    assert (score.value, score.values) == (pytest.approx(2 / 3), (1.0, 1.0, 0.0))
    assert score.details["by_class"][1] == {"class": "praise", "precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 1}
    assert task.score_of(outcomes, METRICS["f1-micro"]).value == pytest.approx(2 * 3 / (3 + 4))
    assert any("accuracy counts it as right only if all of them" in note for note in task.notes)
    assert [metric.name for metric in task.metrics()] == ["accuracy", "f1", "f1-micro", "f1-weighted", "auc"]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "f1-micro", "f1-weighted"])
def test_no_constant_answer_is_better_than_the_baseline_in_training(task, metric):
    constant = task.baseline(task.train, METRICS[metric])
    truth = [np.isin(np.arange(3), own) * 1.0 for own in task.train["labels"]]
    scores = {
        answer: task.score_of([(row, 2 * np.array(answer) - 1) for row in truth], METRICS[metric]).value
        for answer in itertools.product((0.0, 1.0), repeat=3)
    }
    assert constant.scores[metric] == pytest.approx(max(scores.values()))
    assert constant.sentence.startswith("always answering ")


def test_a_metric_of_single_classes_is_refused(bert_folder, file):
    task = classification(models.load_tokenizer(str(bert_folder)), [file])
    with pytest.raises(UnknownNameError, match=r"metric for classify with several classes .* must be one of accuracy, f1"):
        task.metric("mcc")


def test_a_run_learns_and_loads_again(bert_folder, file, tmp_path):
    recipe = Recipe(
        model=str(bert_folder), data=[str(file)], metric="f1-micro", method="full", lr=3e-3, steps=80, max_length=16,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    record = run_recipe(recipe)
    assert record["test"] > record["data"]["baseline"]["scores"]["f1-micro"] + 0.1
    assert (record["data"]["labels"], record["data"]["problem"]) == (["blame", "praise", "story"], "multi_label_classification")
    lora = run_recipe(recipe.model_copy(update={"method": "lora", "steps": 2, "out": str(tmp_path / "lora")}))
    adapted, _, _ = load_run(tmp_path / "lora")
    assert adapted.model.config.problem_type == lora["data"]["problem"]
