"""Language models: bits per byte, the unigram baseline, separate files, samples, and a text that must not be forgotten."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch

from lowdim import models
from lowdim.errors import DataError
from lowdim.train.byte_counts import byte_counter
from lowdim.train.keeping import Kept, kept_by
from lowdim.train.metrics import METRICS
from lowdim.train.packing import pretraining
from lowdim.train.recipes import Recipe
from lowdim.train.tasks import language_modelling, load
from lowdim.train.tokenizers import byte_tokenizer, character_tokenizer
from tiny import llama, save_tokenizer

BITS, LOSS = METRICS["bits-per-byte"], METRICS["loss"]
TEXT = "Where the land is flat, the river slows down. "


@pytest.fixture(scope="module")
def stories():
    return models.load_tokenizer("stories260k"), models.load_model("stories260k", "causal-lm")


def wide(tokenizer):
    """A random model with the tokenizer's vocabulary."""
    torch.manual_seed(0)
    model = llama(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model.eval()


def test_bits_per_byte_of_bytes_are_exact(tmp_path):
    tokenizer = byte_tokenizer()
    task = language_modelling(
        tokenizer, [write(tmp_path / "a.jsonl", [f"é, ü and 日本 {i:02}" for i in range(60)])], max_length=16
    )
    model = wide(tokenizer)
    loss, score = task.score(model, task.test, LOSS), task.score(model, task.test, BITS)
    rows = [row["input_ids"] for row in task.test]
    tokens = sum(len(row) - 1 for row in rows)
    of_text = sum(token < 256 for row in rows for token in row[1:])
    assert 0 < tokens - of_text < len(rows), "the ends of documents are no text"
    assert score.value == pytest.approx(loss.value * tokens / of_text / math.log(2), rel=1e-6)
    assert sum(score.values) / len(score.values) == pytest.approx(-score.value, rel=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "characters", "stories260k", "words"])
def test_the_bytes_of_tokens_are_those_of_their_text(kind, stories, tmp_path):
    text = "Ben's café: 日本, 2 × 3 = 6! Then   it ended.\nEnd"
    if kind == "words":
        save_tokenizer(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "was", "good"])
        tokenizer, text = models_tokenizer(tmp_path), "the film was good"
    else:
        made = {"bytes": byte_tokenizer, "characters": lambda: character_tokenizer(text), "stories260k": lambda: stories[0]}
        tokenizer = made[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = len(tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False).encode())
    assert byte_counter(tokenizer)(ids) == len(text.encode()) - first


def models_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["causal-lm", "pretrain"])
def test_the_unigram_baseline_is_the_frequency_of_tokens_with_one_more_each(kind, tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text(TEXT * 3 + "Bread needs only flour, water, salt and yeast. " * 20)
    if kind == "causal-lm":
        task = language_modelling(tokenizer, [tmp_path / "a.txt"], max_length=16)
    else:
        task = pretraining(tokenizer, [tmp_path / "a.txt"], length=16, cache=tmp_path / "cache")
    counts = Counter(token for row in task.train for token in row["input_ids"])
    total = sum(counts.values()) + len(tokenizer)
    losses = [-math.log((counts[token] + 1) / total) for row in task.test for token in row["input_ids"][1:]]
    found = task.baseline(task.test, LOSS)
    assert (found.name, found.label) == ("unigram", "Unigram")
    assert found.score.value == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert found.scores["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-9)
    of_text = sum(token < 256 for row in task.test for token in row["input_ids"][1:])
    assert found.scores["bits-per-byte"] == pytest.approx(sum(losses) / of_text / math.log(2), rel=1e-9)
    assert len(found.score.values) == len(task.test)
    assert "perplexity" in found.sentence


def write(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("kind", ["causal-lm", "pretrain"])
def test_a_validation_file(kind, tmp_path):
    def made(**files):
        if kind == "causal-lm":
            return language_modelling(byte_tokenizer(), [train], max_length=16, **files)
        return pretraining(byte_tokenizer(), [train], length=16, cache=tmp_path / "cache", **files)

    train = write(tmp_path / "train.jsonl", [f"training document {i:03}" for i in range(30)])
    choice = write(tmp_path / "choice.jsonl", ["training document 003"] + [f"chosen document {i:03}" for i in range(6)])
    test = write(tmp_path / "test.jsonl", [f"tested document {i:03}" for i in range(6)] + ["chosen document 004"])
    task = made(validation=choice, evaluation=test)
    texts = ["".join(task.processor.decode(row["input_ids"]) for row in part) for part in (task.validation, task.test)]
    assert "chosen document 003" in texts[0]
    assert "training document 003" in texts[0]
    assert "chosen document 004" not in texts[0], "it is in the test file"
    assert "tested document 005" in texts[1]
    learnt = "".join(task.processor.decode(row["input_ids"]) for row in task.train)
    assert "tested" not in learnt
    assert "chosen" not in learnt
    assert any("1 training documents are also in" in note for note in task.notes)
    own = made(validation=choice)
    assert len(own.test) > 0
    assert [row["input_ids"] for row in own.validation][:3] == [row["input_ids"] for row in task.validation][:3]
    short = write(tmp_path / "short.jsonl", ["short"])
    with pytest.raises(DataError, match=r"short.jsonl is shorter than a block of 16 tokens"):
        made(validation=short)


def test_a_stream_with_separate_files_gives_training_alone(tmp_path):
    train = write(tmp_path / "train.jsonl", [f"training document {i:03}" for i in range(30)])
    choice = write(tmp_path / "choice.jsonl", [f"chosen document {i:03}" for i in range(6)])
    test = write(tmp_path / "test.jsonl", [f"tested document {i:03}" for i in range(6)])
    task = pretraining(
        byte_tokenizer(), [train], length=24, cache=tmp_path / "cache", validation=choice, evaluation=test, streaming=True
    )
    rows = [row["input_ids"] for row in itertools.islice(task.train, 500)]
    assert [*b"training document 000", task.processor.eos_token_id, *b"tr"] in rows, "the first block is trained on, too"
    assert "chosen document 000" in "".join(task.processor.decode(row["input_ids"]) for row in task.validation)
    assert "tested document 000" in "".join(task.processor.decode(row["input_ids"]) for row in task.test)


def test_samples_continue_blocks_of_the_test_part(stories):
    tokenizer, model = stories
    task = language_modelling(tokenizer, ["lowdim:shakespeare"], max_length=32)
    found = task.samples(model, 2)
    block = task.test[0]["input_ids"]
    assert found[0]["prompt"] == tokenizer.decode(block[:16])
    assert found[0]["expected"] == tokenizer.decode(block[16:])
    ids = list(block[:16])
    for _ in range(16):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found[0]["answer"] == tokenizer.decode(ids[16:])
    assert len(found) == 2


def test_prompts_and_answers_are_for_the_task_instruct(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": "What is it that flows here?", "answer": "It is a river."}) + "\n")
    with pytest.raises(DataError, match=r"--text question; --task instruct trains on the answers"):
        language_modelling(byte_tokenizer(), [file])
    turns = [{"role": "user", "content": "What is it that flows here?"}, {"role": "assistant", "content": "A river."}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match=r"--task instruct trains on the answers"):
        language_modelling(byte_tokenizer(), [file])


def test_the_loss_on_a_text_that_is_kept(stories, tmp_path):
    tokenizer, model = stories
    (tmp_path / "a.txt").write_text(TEXT * 9)
    kept = Kept.of(tmp_path / "a.txt", tokenizer, 32)
    ids = tokenizer(TEXT * 9, add_special_tokens=False)["input_ids"]
    assert [token for block in kept.blocks for token in block] == ids[: sum(map(len, kept.blocks))]
    assert {len(block) for block in kept.blocks[:-1]} == {32}
    total, count = 0.0, 0
    for block in kept.blocks:
        with torch.no_grad():
            logits = model(torch.tensor([block])).logits[0].log_softmax(-1)
        total -= sum(float(logits[place, token]) for place, token in enumerate(block[1:]))
        count += len(block) - 1
    assert kept.loss(model.train()) == pytest.approx(total / count, rel=1e-5)
    assert model.training
    model.eval()
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(DataError, match=r"--keep .*b.txt has less than two tokens"):
        Kept.of(tmp_path / "b.txt", byte_tokenizer(), 32)


def test_which_recipes_keep_a_text(tmp_path):
    def recipe(**keys):
        return Recipe(**{"model": "stories260k", "task": "causal-lm", "data": ["lowdim:shakespeare"], **keys})

    tokenizer = byte_tokenizer()
    assert kept_by(recipe(), tokenizer, 64).source == "lowdim:plain-english"
    assert kept_by(recipe(keep="lowdim:shakespeare"), tokenizer, 64).source == "lowdim:shakespeare"
    assert kept_by(recipe(task="pretrain"), tokenizer, 64) is None, "it knows nothing yet"
    assert kept_by(recipe(task="classify"), tokenizer, 64) is None
    with pytest.raises(ValueError, match=r"--keep is for language models .* the task is classify"):
        load(recipe(task="classify", keep="lowdim:shakespeare"), tokenizer)
    with pytest.raises(ValueError, match="--answer-pattern is for the task instruct; the task is causal-lm"):
        load(recipe(answer_pattern="number"), tokenizer)
