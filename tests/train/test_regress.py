"""Numbers for texts and pairs: read, standardised, trained, written in their own unit."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from lowdim import models
from lowdim.errors import DataError, UnknownNameError
from lowdim.files import read_json, read_tensors
from lowdim.jobs import ExportSettings, export
from lowdim.train.data import read_examples
from lowdim.train.head import fit_head, head_sentence
from lowdim.train.metrics import METRICS
from lowdim.train.recipes import Recipe
from lowdim.train.run import load_run, run_recipe
from lowdim.train.tasks import regression
from tiny import PLAIN

SPEARMAN, RMSE = METRICS["spearman"], METRICS["rmse"]


def rows(count=120, seed=0):
    """Texts whose number is 1000, and 50 for each good word less 50 for each bad one."""
    draw = random.Random(seed)
    found = {}
    while len(found) < count:
        good, bad = draw.randint(0, 3), draw.randint(0, 3)
        words = draw.choices(PLAIN, k=5) + ["good"] * good + ["bad"] * bad
        draw.shuffle(words)
        found[" ".join(words)] = 1000 + 50 * (good - bad)
    return list(found.items())


def table(path, lines, header="text,price"):
    path.write_text("\n".join([header, *(",".join(map(str, line)) for line in lines)]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return table(tmp_path_factory.mktemp("regress") / "prices.csv", rows())


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return models.load_tokenizer(str(bert_folder))


@pytest.fixture(scope="module")
def task(tokenizer, file):
    return regression(tokenizer, [file], max_length=16)


class Says(nn.Module):
    """Answers with the standardised number of a text, from its words."""

    def __init__(self, tokenizer, task):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.good, self.bad = tokenizer.convert_tokens_to_ids(["good", "bad"])
        self.task = task

    def forward(self, input_ids, attention_mask=None):
        from types import SimpleNamespace

        number = 1000 + 50.0 * ((input_ids == self.good).sum(1) - (input_ids == self.bad).sum(1))
        return SimpleNamespace(logits=((number - self.task.mean) / self.task.deviation)[:, None])


def test_labels_are_standardised_by_the_training_part(task):
    known = dict(rows())
    train = np.array(task.train["labels"])
    assert (train.mean(), train.std()) == pytest.approx((0, 1), abs=1e-9)
    numbers = [task.mean + task.deviation * y for part in (task.train, task.validation, task.test) for y in part["labels"]]
    assert sorted(numbers) == pytest.approx(sorted(known.values()))
    assert (task.num_labels, task.problem, task.classes) == (1, "regression", ())
    assert {"mean": task.mean, "deviation": task.deviation, "outputs": 1}.items() <= task.data_record().items()
    assert task.example.rsplit(" -> ", 1)[1] == f"{task.mean + task.deviation * task.train[0]['labels']:.6g}"


def test_scores_are_in_the_numbers_unit(task, tokenizer):
    model = Says(tokenizer, task)
    assert task.score(model, task.test, SPEARMAN).value == pytest.approx(1.0)
    model.task = type("Off", (), {"mean": task.mean - 10, "deviation": task.deviation})  # every answer is 10 too high
    score = task.score(model, task.test, RMSE)
    assert score.value == pytest.approx(10, rel=1e-4)
    assert score.values == pytest.approx([-100.0] * len(task.test), rel=1e-3)


def test_the_loss_is_the_squared_error_of_standardised_numbers(task, bert_folder):
    model = models.load_model(str(bert_folder), "regress", num_labels=1)
    batch = task.collate([task.train[i] for i in range(4)])
    with torch.no_grad():
        answers = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        want = ((answers - torch.tensor([task.train[i]["labels"] for i in range(4)])) ** 2).mean().item()
        assert task.loss_fn(model, batch).item() == pytest.approx(want, rel=1e-5)
        assert model(**batch).loss.item() == pytest.approx(want, rel=1e-5), "the model knows its problem"


def test_the_mean_is_the_constant_answer(task):
    constant = task.baseline(task.test, RMSE)
    truth = task.mean + task.deviation * np.array(task.test["labels"])
    assert constant.scores == pytest.approx(
        {"spearman": 0.0, "pearson": 0.0, "rmse": np.sqrt(((truth - task.mean) ** 2).mean())}
    )
    assert constant.score.values == pytest.approx(-((truth - task.mean) ** 2))
    assert constant.sentence.startswith(f"always answering the mean, {task.mean:.4g}, gives spearman 0.000")


def test_the_head_is_the_ridge_regression_that_it_says(tokenizer, file, pooled_folder):
    from sklearn.linear_model import Ridge

    task = regression(tokenizer, [file], max_length=16)
    model = models.load_model(str(pooled_folder), "regress", num_labels=1)
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(**task.collate([task.train[i] for i in range(len(task.train))]))
    hook.remove()
    score = fit_head(model, ("classifier",), task)
    assert score == pytest.approx(task.evaluate(model, task.validation, SPEARMAN), abs=1e-4)
    assert head_sentence(task, score).startswith("starts as a ridge regression")
    x, y = seen[0].double().numpy(), np.array(task.train["labels"])
    answers = (seen[0] @ model.classifier.weight.T + model.classifier.bias).detach()[:, 0].numpy()
    scaled = (x - x.mean(0)) / x.std(0, ddof=1).mean()
    gaps = [
        np.abs(Ridge(alpha=penalty * len(x)).fit(scaled, y).predict(scaled) - answers).max()
        for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    assert min(gaps) < 1e-3


@pytest.mark.parametrize("method", ["lora", "full", "linear-probe"])
@pytest.mark.parametrize("folder", ["bert_folder", "pooled_folder"])
def test_what_is_written_answers_in_the_numbers_unit(method, folder, file, task, tmp_path, request):
    recipe = Recipe(
        model=str(request.getfixturevalue(folder)), task="regress", data=[str(file)], method=method, steps=10, lr=1e-5,
        metric="rmse", max_length=16, out=str(tmp_path / "run"),
    )  # fmt: skip
    record = run_recipe(recipe)
    out = tmp_path / "run"
    if method == "lora":
        export(ExportSettings(adapter=out, out=tmp_path / "model", format="merged"))
    else:
        (out / "model").rename(tmp_path / "model")
    code = (tmp_path / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "from_pretrained" in code
    from transformers import AutoModel, AutoModelForSequenceClassification

    pooled = folder == "pooled_folder"
    kind = AutoModel if pooled else AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "model", **({"add_pooling_layer": False} if pooled else {})).eval()
    answers = []
    for row in task.test:
        ids, mask = torch.tensor([row["input_ids"]]), torch.ones(1, len(row["input_ids"]), dtype=torch.long)
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask)
        if pooled:
            head = read_tensors(tmp_path / "model" / "head.safetensors")[0]
            answers.append((found.last_hidden_state.mean(1) @ head["weight"].T + head["bias"]).item())
        else:
            answers.append(found.logits.item())
    truth = task.mean + task.deviation * np.array(task.test["labels"])
    assert np.sqrt(((truth - answers) ** 2).mean()) == pytest.approx(record["test"], rel=1e-3)
    assert record["test"] < 600, "the numbers are about 1000"
    if not pooled:
        assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_head_without_a_bias_is_named(task):
    model = nn.Module()
    model.score = nn.Linear(4, 1, bias=False)
    before = model.score.weight.clone()
    note = task.finish(model, ("score",))
    assert torch.equal(model.score.weight, before)
    assert f"the number is {task.mean:.6g} + {task.deviation:.6g} x the answer" in note


def test_numbers_in_many_spellings(tmp_path):
    lines = [("one film", "2.5"), ("two plots", "1.0e2"), ("a story", "-3"), ("it felt", "")]
    found = read_examples([table(tmp_path / "a.csv", lines, "text,score")], numbers=True)
    assert found.labels == (2.5, 100.0, -3.0)
    assert found.notes == (f"1 rows of {tmp_path / 'a.csv'} have no label and were left out",)
    comma = tmp_path / "b.tsv"
    comma.write_text("text\tscore\none film\t2,5\ntwo plots\t1,250\n")
    assert read_examples([comma], numbers=True).labels == (2.5, 1.25)
    comma.write_text("text\tprice\none film\t$2,500\ntwo plots\t$900\n")
    assert read_examples([comma], numbers=True, label="price").labels == (2500.0, 900.0)


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        (
            "text,label",
            [("a film", "good"), ("a plot", "bad")],
            "'label' holds words, and --task regress learns numbers",
        ),
        ("text,score,rating", [("a film", 1, 2), ("a plot", 3, 4)], "which column holds the number? Columns score, rating do"),
        ("text,score", [("a film", 1), ("a plot", "high")], "1 of 2 values of column 'score' are not numbers, such as 'high'"),
        (
            "text,a,b",
            [("a film here too", 1, 2), ("a plot of some", 3, 4)],
            "which column holds the number? name it",
        ),
    ],
)
def test_what_is_no_regression_says_what_would_be(header, lines, message, tmp_path):
    label = "score" if header == "text,score" else None
    with pytest.raises((DataError, UnknownNameError)) as error:
        read_examples([table(tmp_path / "a.csv", lines, header)], numbers=True, label=label)
    assert message in str(error.value)


def test_classes_and_constants_are_named(tokenizer, tmp_path):
    lines = [(text, int(number > 1000)) for text, number in rows()]
    task = regression(tokenizer, [table(tmp_path / "a.csv", lines, "text,label")])
    assert task.notes[-1] == "column 'label' holds the numbers 0, 1 only; if they are classes, --task classify trains on them"
    with pytest.raises(DataError, match=r"same\.csv: all numbers to train on are 3; there is nothing to learn"):
        regression(tokenizer, [table(tmp_path / "same.csv", [(text, 3) for text, _ in rows()], "text,label")])


def test_pairs_and_files_of_their_own(tokenizer, tmp_path):
    def pairs(name, where):
        lines = [json.dumps({"sentence1": a, "sentence2": f"{b} plot", "score": n / 7}) for (a, n), (b, _) in where]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    every = rows(90)
    both = list(zip(every[:45], every[45:]))
    train, chosen, test = pairs("train.jsonl", both), pairs("valid.jsonl", both[:8]), pairs("test.jsonl", both[6:12])
    task = regression(tokenizer, [train], validation=chosen, evaluation=test)
    assert task.sizes() == {"train": 33, "validation": 6, "test": 6}
    assert task.notes == (
        "2 validation texts are also in the test file and were left out of validation",
        "6 training texts are also in the test file and were left out of training",
        "6 training texts are also in the validation file and were left out of training",
    )
    parts = [{tuple(ids) for ids in part["input_ids"]} for part in (task.train, task.validation, task.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 45
    assert task.columns[0].roles.text == ("sentence1", "sentence2")
    alone = regression(tokenizer, [train], validation=chosen)
    assert alone.sizes()["validation"] == 8
    assert alone.sizes()["train"] + alone.sizes()["test"] == 37


def test_a_run_that_goes_on_gives_the_same_numbers(bert_folder, file, tmp_path):
    recipe = Recipe(
        model=str(bert_folder), task="regress", data=[str(file)], steps=4, save_steps=2, max_length=16, out=str(tmp_path / "a")
    )
    whole = run_recipe(recipe)
    for name in ("run.json", "adapter"):
        place = tmp_path / "a" / name
        place.unlink() if place.is_file() else [part.unlink() for part in place.iterdir()]
    again = run_recipe(recipe, resume=True)
    assert (again["test"], again["validation"]) == (whole["test"], whole["validation"])
    assert read_json(tmp_path / "a" / "run.json")["data"]["deviation"] == whole["data"]["deviation"]
    load_run(tmp_path / "a")
