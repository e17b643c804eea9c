import math

import pytest
import torch

from lowdim import models
from lowdim.errors import DataError
from lowdim.train.metrics import METRICS
from lowdim.train.tasks import classification, language_modelling
from tiny import sentences, write_jsonl

ACCURACY, PERPLEXITY, LOSS = METRICS["accuracy"], METRICS["perplexity"], METRICS["loss"]


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return models.load_tokenizer(str(bert_folder))


@pytest.fixture(scope="module")
def task(tokenizer, two_classes):
    return classification(tokenizer, [two_classes], max_length=16)


class Says(torch.nn.Module):
    """Answers with what `answer` makes of the token ids, and remembers the batches."""

    def __init__(self, answer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answer, self.seen = answer, []

    def forward(self, input_ids, attention_mask=None, labels=None):
        from types import SimpleNamespace

        self.seen.append((input_ids, attention_mask, self.training))
        return SimpleNamespace(logits=self.answer(input_ids))


def test_classification_parts_and_names(task, two_classes):
    assert task.sizes() == {"train": 54, "validation": 14, "test": 28}
    assert (task.classes, task.num_labels, task.name, task.kind) == (("negative", "positive"), 2, "two.jsonl", "classify")
    assert task.notes == ()


def test_over_long_texts_are_cut_and_counted(tokenizer, two_classes):
    task = classification(tokenizer, [two_classes], max_length=8)
    lengths = [len(ids) for part in (task.train, task.validation, task.test) for ids in part["input_ids"]]
    whole = [len(ids) for ids in tokenizer([t for t, _ in sentences(96)])["input_ids"]]
    long = sum(n > 8 for n in whole)
    assert 0 < long < 96
    assert max(lengths) == 8
    assert task.notes == (f"{long} of 96 texts are longer than 8 tokens and were cut (--max-length)",)
    ends = {ids[-1] for ids in task.train["input_ids"]}
    assert ends == {tokenizer.sep_token_id}, "a cut text still ends as the tokenizer ends it"


def test_texts_are_cut_to_what_the_model_reads(tokenizer, two_classes):
    task = classification(tokenizer, [two_classes], max_length=100, most=8)
    assert task.max_length == 8
    assert task.notes[0].endswith("texts are longer than 8 tokens and were cut (the model reads no more)")


def test_a_limit_keeps_every_class(tokenizer, tmp_path):
    rows = [(f"the film {i} {j}", "common") for i in ("one", "two") for j in range(40)] + [
        (f"a plot {i}", "rare") for i in range(5)
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    whole = classification(tokenizer, [file])
    for limit in (2, 5, 30):
        part = classification(tokenizer, [file], limit=limit)
        assert len(part.train) == limit
        assert set(part.train["labels"]) == {0, 1}
        assert part.sizes()["test"] == whole.sizes()["test"]
    assert classification(tokenizer, [file], limit=1000).sizes() == whole.sizes()
    with pytest.raises(DataError, match="limit must be at least 2, one example of each class; got 1"):
        classification(tokenizer, [file], limit=1)


def test_a_test_file_of_its_own(tokenizer, two_classes, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [*sentences(4), ("never seen before", "positive")])
    task = classification(tokenizer, [two_classes], evaluation=held)
    assert task.sizes() == {"train": 74, "validation": 18, "test": 5}
    assert "4 training texts are also in the test file" in task.notes[0]
    strange = write_jsonl(tmp_path / "strange.jsonl", [("x", "neutral")])
    with pytest.raises(DataError, match=r"label 'neutral' does not occur in the training data \(classes: negative, positive\)"):
        classification(tokenizer, [two_classes], evaluation=strange)


def test_batches_are_padded_on_the_tokenizers_side(task, tokenizer):
    rows = [{"input_ids": [2, 5, 3], "labels": 1}, {"input_ids": [2, 3], "labels": 0}]
    batch = task.collate(rows)
    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]
    left = type(task.collate)(7, "left")(rows)
    assert left["input_ids"].tolist() == [[2, 5, 3], [7, 2, 3]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_sample_batches_are_the_first_rows_and_never_more_than_there_are(task):
    batches = list(task.sample_batches(2, 16, torch.device("cpu")))
    assert [len(b["labels"]) for b in batches] == [16, 16]
    assert batches[0]["labels"].tolist() == task.train["labels"][:16]
    assert [len(b["labels"]) for b in task.sample_batches(9, 16, torch.device("cpu"))] == [16, 16, 16, 6]


def test_evaluate_scores_each_row_once_in_evaluation_mode(task, tokenizer):
    good = {tokenizer.convert_tokens_to_ids(w) for w in ("good", "great", "fine", "lovely", "warm")}
    model = Says(lambda ids: torch.tensor([[0.0, 1.0] if good & set(row.tolist()) else [1.0, 0.0] for row in ids])).train()
    assert task.score(model, task.test, ACCURACY)[:2] == (1.0, (1.0,) * 28)
    assert model.training
    assert not any(training for *_, training in model.seen)
    assert sum(len(ids) for ids, *_ in model.seen) == 28
    always = Says(lambda ids: torch.tensor([[0.0, 1.0]]).expand(len(ids), 2))
    score = task.score(always, task.test, ACCURACY)
    assert score.value == task.evaluate(always, task.test, ACCURACY) == 0.5
    assert score.values == tuple(map(float, task.test["labels"])), "in the order of the part, not that of the batches"


def test_an_output_that_is_not_finite_scores_nan(task):
    model = Says(lambda ids: torch.full((len(ids), 2), math.nan)).train()
    assert math.isnan(task.evaluate(model, task.test, ACCURACY))
    assert model.training


@pytest.fixture(scope="module")
def stories():
    return models.load_tokenizer("stories260k"), models.load_model("stories260k", "causal-lm")


def test_language_modelling_blocks_do_not_overlap(stories):
    tokenizer, _ = stories
    task = language_modelling(tokenizer, ["lowdim:shakespeare"], max_length=32)
    parts = {name: [tuple(row) for row in getattr(task, name)["input_ids"]] for name in ("train", "validation", "test")}
    blocks = [b for part in parts.values() for b in part]
    assert {len(b) for b in blocks} == {32}
    assert len(parts["test"]) == len(blocks) // 5
    assert len(parts["validation"]) == len(blocks) // 8
    text = models.assets().joinpath("shakespeare/sample.txt").read_text()
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream.append(tokenizer.eos_token_id)
    want = [tuple(stream[i : i + 32]) for i in range(0, len(stream) - 31, 32)]
    assert parts["test"] == want[-len(parts["test"]) :], "the end of the text"
    assert sorted(blocks) == sorted(want)


def test_language_modelling_scores_are_the_mean_over_tokens(stories):
    tokenizer, model = stories
    task = language_modelling(tokenizer, ["lowdim:shakespeare"], max_length=32, limit=8)
    assert len(task.train) == 8
    ids = torch.tensor(task.validation["input_ids"])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).item()
    assert task.evaluate(model, task.validation, LOSS) == pytest.approx(want, rel=1e-5)
    assert task.evaluate(model, task.validation, PERPLEXITY) == pytest.approx(math.exp(want), rel=1e-5)


def test_language_modelling_needs_three_blocks(stories, tmp_path):
    tokenizer, _ = stories
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a cat. " * 4)
    with pytest.raises(DataError, match=r"short\.txt gives \d blocks of 64 tokens; at least 3 are needed \(--max-length\)"):
        language_modelling(tokenizer, [short], max_length=64)
    with pytest.raises(DataError, match=r"--eval .*short\.txt is shorter than a block of 64 tokens \(--max-length\)"):
        language_modelling(tokenizer, ["lowdim:shakespeare"], evaluation=short, max_length=64)
    task = language_modelling(tokenizer, ["lowdim:shakespeare"], evaluation=short, max_length=64, most=8)
    assert task.max_length == 8
    assert task.notes == ("blocks have 8 tokens, not 64: the model reads no more",)
