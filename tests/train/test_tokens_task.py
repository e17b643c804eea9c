"""Task tokens: sentences of words with tags, their rows, and scores of entities."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lowdim import models
from lowdim.errors import DataError, UnknownNameError
from lowdim.train.entities import score_entities
from lowdim.train.metrics import METRICS
from lowdim.train.tagged import read_tagged, tag_order
from lowdim.train.tasks.tokens import token_classification
from tagged_sentences import sentences, write_conll, write_rows

F1, ACCURACY = METRICS["entity-f1"], METRICS["token-accuracy"]


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return models.load_tokenizer(str(bert_folder))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "sentences.jsonl", sentences(60))


@pytest.fixture(scope="module")
def task(tokenizer, file):
    return token_classification(tokenizer, [file])


def rows_file(path, *pairs):
    return write_rows(path, [(words.split(), tags.split()) for words, tags in pairs])


class Says(torch.nn.Module):
    """Answers each token with the tag that `answer` gives its id."""

    def __init__(self, answer, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answer, self.classes = answer, classes

    def forward(self, input_ids, attention_mask=None, labels=None):
        found = torch.tensor([[self.classes.index(self.answer(token)) for token in row.tolist()] for row in input_ids])
        return SimpleNamespace(logits=torch.eye(len(self.classes))[found])


def test_parts_classes_and_example(task, tokenizer, file):
    assert task.classes == ("O", "B-FILM", "I-FILM", "B-MOOD")
    assert (task.kind, task.num_labels, task.name, task.notes) == ("tokens", 4, "sentences.jsonl", ())
    assert task.sizes() == {"train": 34, "validation": 8, "test": 18}
    texts = [tuple(row["input_ids"]) for part in (task.train, task.validation, task.test) for row in part]
    assert len(set(texts)) == 60
    assert task.example.startswith("[CLS] ")
    assert "/B-" in task.example
    assert task.remarks()[0] == ("data", f"{file}: the words are column 'words' and the tags 'tags'")


def test_only_the_first_piece_of_a_word_counts(tokenizer, tmp_path):
    """`film-plot` is three tokens; the tokenizer knows no hidden word, so `zero` below gives none."""
    rows = [("the film-plot was good", "O B-FILM O B-MOOD"), ("a story", "O B-FILM"), ("it felt bad", "O O B-MOOD")]
    path = rows_file(tmp_path / "a.jsonl", *rows, ("one two good", "O O B-MOOD"))
    task = token_classification(tokenizer, [path])
    every = {tuple(row["input_ids"]): row["labels"] for part in (task.train, task.validation, task.test) for row in part}
    ids = tokenizer(["the", "film-plot", "was", "good"], is_split_into_words=True)["input_ids"]
    assert len(ids) == 8
    film, mood, out = task.classes.index("B-FILM"), task.classes.index("B-MOOD"), task.classes.index("O")
    assert every[tuple(ids)] == [-100, out, film, -100, -100, out, mood, -100]
    batch = task.collate([{"input_ids": [2, 5, 3], "labels": [-100, 1, -100]}, {"input_ids": [2, 3], "labels": [-100, -100]}])
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert task.count_items(batch) == 1


def test_words_without_a_token_are_counted(tokenizer, tmp_path):
    pairs = [(["the", "\u200b \t", "film", word], ["O", "O", "B-FILM", "B-MOOD"]) for word in ("good", "bad", "dull", "warm")]
    task = token_classification(tokenizer, [write_rows(tmp_path / "a.jsonl", pairs)])
    lost = [note for note in task.notes if "give no token" in note]
    words = sum(label != -100 for part in (task.train, task.validation, task.test) for row in part for label in row["labels"])
    assert lost == ([] if words == 16 else [f"{16 - words} words give no token and are neither trained on nor scored"])


def test_long_sentences_are_cut_between_entities(tokenizer, tmp_path):
    words = ["the", "film", "was", "good", "the", "plot", "felt", "bad"]
    tags = ["O", "B-FILM", "I-FILM", "B-MOOD", "O", "B-FILM", "I-FILM", "I-FILM"]
    path = write_rows(tmp_path / "a.jsonl", [(words, tags), *sentences(5)])
    task = token_classification(tokenizer, [path], max_length=6)
    assert re.fullmatch(
        r"[1-6] of 6 sentences are longer than 6 tokens and were cut into \d+ rows \(--max-length\)", task.notes[-1]
    )
    rows = [row for part in (task.train, task.validation, task.test) for row in part]
    assert max(len(row["input_ids"]) for row in rows) <= 6
    assert all(row["labels"][0] == -100 for row in rows)
    begins = {task.classes[next(label for label in row["labels"] if label != -100)][0] for row in rows}
    assert "I" not in begins, "no row begins within an entity"
    total = sum(label != -100 for row in rows for label in row["labels"])
    assert total == 8 + sum(len(own) for own, _ in sentences(5)), "no word is lost"
    short = token_classification(tokenizer, [path], max_length=100, most=6)
    assert any("(the model reads no more)" in note for note in short.notes)


def test_an_entity_longer_than_a_row_is_cut_all_the_same(tokenizer, tmp_path):
    long = (["film"] * 20, ["B-FILM"] + ["I-FILM"] * 19)
    task = token_classification(tokenizer, [write_rows(tmp_path / "a.jsonl", [long, *sentences(5)])], max_length=8)
    rows = [row for part in (task.train, task.validation, task.test) for row in part]
    assert sum(label != -100 for row in rows for label in row["labels"]) == 20 + sum(len(own) for own, _ in sentences(5))


def test_the_score_is_that_of_whole_entities(task):
    """A model that finds each film's first word only."""
    wanted, found = [], []
    for row in task.test:
        own = [task.classes[label] for label in row["labels"] if label != -100]
        wanted.append(own)
        found.append([tag if tag == "B-FILM" else "O" for tag in own])
    outcomes = [tuple([task.classes.index(tag) for tag in tags] for tags in pair) for pair in zip(wanted, found)]
    score = task.score_of(outcomes, F1)
    assert score.value == pytest.approx(score_entities(wanted, found).f1)
    assert 0 < score.value < 1
    n = len(outcomes)
    jack = [
        n * score.value - (n - 1) * score_entities(wanted[:i] + wanted[i + 1 :], found[:i] + found[i + 1 :]).f1
        for i in range(n)
    ]
    assert score.values == pytest.approx(jack)
    table = {row["class"]: row for row in score.details["by_class"]}
    moods = sum(tags.count("B-MOOD") for tags in wanted)
    assert table["MOOD"] == {"class": "MOOD", "precision": 0.0, "recall": 0.0, "f1": 0.0, "count": moods}
    assert table["FILM"]["count"] == sum(tags.count("B-FILM") for tags in wanted)
    accuracy = task.score_of(outcomes, ACCURACY)
    hits = [[a == b for a, b in zip(*pair)] for pair in zip(wanted, found)]
    assert accuracy.value == pytest.approx(np.mean([hit for own in hits for hit in own]))
    assert np.mean(accuracy.values) == pytest.approx(accuracy.value)


def test_a_model_is_scored_at_first_pieces_and_in_the_order_of_the_part(task, tokenizer):
    tag_of = {}
    for part in (task.train, task.validation, task.test):
        for row in part:
            for token, label in zip(row["input_ids"], row["labels"]):
                if label != -100:
                    tag_of[token] = task.classes[label]
    perfect = Says(lambda token: tag_of.get(token, "B-MOOD"), task.classes)
    assert task.score(perfect, task.test, F1).value == 1.0
    bad = tokenizer.convert_tokens_to_ids("bad")
    blind = Says(lambda token: "O" if token == bad else tag_of.get(token, "O"), task.classes)
    score = task.score(blind, task.test, ACCURACY)
    words = [sum(label != -100 for label in row["labels"]) for row in task.test]
    right = [count - row["input_ids"].count(bad) for count, row in zip(words, task.test)]
    assert score.values == pytest.approx([r * len(words) / sum(words) for r in right])


def test_all_o_is_the_baseline(task):
    constant = task.baseline(task.test, F1)
    labels = [label for row in task.test for label in row["labels"] if label != -100]
    assert (constant.what, constant.label, constant.score.value) == ("always answering O", "All O", 0.0)
    assert constant.scores["token-accuracy"] == pytest.approx(labels.count(0) / len(labels))
    assert not constant.degenerate


def test_conll_files_and_rows_are_read_alike(tmp_path):
    pairs = sentences(6)
    read = read_tagged(write_rows(tmp_path / "a.jsonl", pairs))
    other = read_tagged(write_conll(tmp_path / "a.conll", pairs))
    assert (read.words, read.tags) == (other.words, other.tags)
    assert [list(own) for own in read.words] == [own for own, _ in pairs]
    text = (
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\n# a comment of its own\n# NN B-NP O\nx NN B-NP O\n"
    )
    (tmp_path / "b.txt").write_text(text)
    found = read_tagged(tmp_path / "b.txt")
    assert found.words == [("EU", "rejects"), ("#", "x")]
    assert found.tags[0] == ("B-ORG", "O")
    (tmp_path / "c.iob2").write_text("New York\tB-LOC\nis\tO\n\nbig\tO\n")
    assert read_tagged(tmp_path / "c.iob2").words == [("New York", "is"), ("big",)]


@pytest.mark.parametrize(
    ("tags", "want", "note"),
    [
        ("I-A I-A O B-B", "B-A I-A O B-B", "1 entities begin with I-"),
        ("I-A B-A I-B O", "B-A B-A B-B O", "2 entities begin with I-"),
        ("B-A I-A O B-B", "B-A I-A O B-B", None),
        ("B-A I-A E-A S-B", "B-A I-A E-A S-B", None),
        ("B-A L-A O U-B", "B-A E-A O S-B", "were rewritten as those of IOBES"),
        ("B-A M-A E-A S-B", "B-A I-A E-A S-B", "were rewritten as those of IOBES"),
        ("NOUN VERB NOUN O", "NOUN VERB NOUN O", None),
    ],
)
def test_schemes(tmp_path, tags, want, note):
    found = read_tagged(rows_file(tmp_path / "a.jsonl", ("a b c d", tags)))
    assert " ".join(found.tags[0]) == want
    assert bool(found.notes) == bool(note)
    if note:
        assert note in found.notes[0]


def test_tags_in_order():
    assert tag_order(["O", "S-B", "E-A", "I-A", "B-A"]) == ("O", "B-A", "I-A", "E-A", "S-B")


def test_bad_lines_and_rows_are_named(tmp_path):
    def refused(name, content, message, kind=DataError, **how):
        (tmp_path / name).write_text(content)
        with pytest.raises(kind, match=message):
            read_tagged(tmp_path / name, **how)

    refused("a.conll", "Anna B-PER\nleft\n", r"a\.conll, line 2: 'left' has no tag")
    refused("a.conll", "Anna NN B-PER\nleft O\n", r"line 1: it has 3 columns, and line 2 of its sentence 2")
    refused("a.conll", "1 Anna B-PER\n2 left O\n\n1 No O\n", "the first column numbers the words")
    refused("a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}', r"a\.jsonl, row 1: 2 words and 1 tags; each word has one tag")
    refused("a.jsonl", '{"words": ["a"], "tags": [3]}', "tag '3' is a number; write the names that the numbers stand for")
    refused(
        "a.jsonl", '{"words": ["a"], "tags": ["O"]}\n{"words": "b", "tags": ["O"]}', "row 2: 'words' must be a list of strings"
    )
    refused("a.jsonl", '{"sent": ["a"], "tags": ["O"]}', "which column holds the words. name it with --text", UnknownNameError)
    refused("a.jsonl", '{"words": ["a"], "tags": ["O"]}', "--label: .* has no column 'x'", UnknownNameError, label="x")
    refused("a.csv", "words,tags\n", "sentences with tags are read from .jsonl")
    refused("a.conll", "Anna B-PER\n", "--text and --label are for tables", text="words")


def test_columns_that_are_named(tmp_path):
    row = {"tokens": ["a"], "lemmas": ["b"], "ner_tags": ["O"], "chunks": ["B-NP"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    found = read_tagged(tmp_path / "a.jsonl")
    assert (found.words, found.tags) == ([("a",)], [("O",)])
    assert found.columns[0].sentence.endswith("(not used: lemmas, chunks); --text and --label choose others")
    found = read_tagged(tmp_path / "a.jsonl", text="lemmas", label="chunks")
    assert (found.words, found.tags) == ([("b",)], [("B-NP",)])


def test_what_cannot_be_trained(tokenizer, tmp_path, file):
    plain = rows_file(tmp_path / "a.jsonl", *[(f"the film {word}", "O O O") for word in ("one", "two", "three", "four")])
    with pytest.raises(DataError, match=r"a\.jsonl: there is only one tag \('O'\); at least two are needed"):
        token_classification(tokenizer, [plain])
    with pytest.raises(DataError, match=r"no sentence of the test part has an entity \(all tags are O\)"):
        token_classification(tokenizer, [file], evaluation=plain)
    strange = rows_file(tmp_path / "b.jsonl", ("the film", "O B-FLIM"))
    with pytest.raises(
        DataError, match=r"tag 'B-FLIM' does not occur in the training data \(tags: O, B-FILM.*nearest: 'B-FILM'"
    ):
        token_classification(tokenizer, [file], evaluation=strange)
    with pytest.raises(DataError, match="there are 2 sentences; at least 3 are needed to split the data"):
        token_classification(tokenizer, [write_rows(tmp_path / "c.jsonl", sentences(2))])
    with pytest.raises(DataError, match=r"does not tell which word a token is from; task tokens needs one with a"):
        token_classification(SimpleNamespace(is_fast=False), [file])


def test_a_sentence_is_in_one_part_only(tokenizer, tmp_path):
    pairs = sentences(12)
    path = write_rows(tmp_path / "a.jsonl", [*pairs, pairs[0], ([word.upper() for word in pairs[1][0]], pairs[1][1])])
    held = write_rows(tmp_path / "b.jsonl", pairs[2:4])
    task = token_classification(tokenizer, [path], evaluation=held)
    assert task.sizes() == {"train": 8, "validation": 2, "test": 2}
    assert task.notes == (
        "2 duplicate sentences were left out, so that none is in two parts (only equal ones are found, not similar ones)",
        "2 training sentences are also in a later part (validation, test) and were left out of training",
    )
    own = token_classification(tokenizer, [path], evaluation=held, validation=write_rows(tmp_path / "c.jsonl", pairs[4:7]))
    assert own.sizes() == {"train": 7, "validation": 3, "test": 2}
