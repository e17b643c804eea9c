"""Spellings of one label are one class; measurements are none."""

import json

import pytest

from lowdim.errors import DataError
from lowdim.train.data import read_examples
from lowdim.train.labels import encode_labels
from lowdim.train.splits import split

INFINITE = float("inf")


def put(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def written(folder, name, marks):
    """A file of the format that its name says, with these labels."""
    if name.endswith(".csv"):
        lines = [f"some text number {i} of {name},{mark}" for i, mark in enumerate(marks)]
        return put(folder / name, "\n".join(["text,label", *lines]) + "\n")
    if name.endswith(".txt"):
        return put(folder / name, "".join(f"__label__{mark} text number {i} of {name}\n" for i, mark in enumerate(marks)))
    rows = [{"text": f"some text number {i} of {name}", "label": mark} for i, mark in enumerate(marks)]
    if name.endswith(".parquet"):
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), folder / name)
        return folder / name
    return put(folder / name, "\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        ({"a.csv": ["1", "0.0", "1.0", "0"]}, ("0", "1")),
        ({"a.csv": ["1.0", "0.0"], "b.jsonl": [1.0, 0], "c.txt": ["1", "0"]}, ("0", "1")),
        ({"a.jsonl": [1, "1", 1.0, "0", 0, "1.00", "+1", "1.000000e+00"]}, ("0", "1")),
        ({"a.parquet": [1.0, 0.0, 2.0], "b.csv": ["2", "0", "1"]}, ("0", "1", "2")),
        ({"a.csv": ["True", "false", "true", "FALSE"]}, ("false", "true")),
        ({"a.jsonl": [True, False], "b.csv": ["True", "False"], "c.txt": ["TRUE", "FALSE"]}, ("false", "true")),
        ({"a.jsonl": [True, False, "true", "False"]}, ("false", "true")),
        ({"a.jsonl": ["gr\u00fcn", "gru\u0308n", "very  rot", "very rot "]}, ("grün", "very rot")),
        ({"a.csv": ["__label__a", "b"], "b.txt": ["a", "b"]}, ("a", "b")),
        ({"a.csv": ["1e+00", "0e+00"], "b.jsonl": [1, 0]}, ("0", "1")),
        ({"a.csv": ["1e5", "2e5"]}, ("1e5", "2e5")),
        ({"a.csv": ["007", "008"]}, ("007", "008")),
        ({"a.jsonl": [10**30, 1]}, ("1", str(10**30))),
    ],
)
def test_spellings_of_one_label_are_one_class(tmp_path, files, classes):
    found = read_examples([written(tmp_path, name, marks) for name, marks in files.items()])
    assert found.classes == classes
    assert found.notes == ()


def test_truth_in_words_and_digits_is_one_class_and_this_is_said(tmp_path):
    files = [written(tmp_path, "a.jsonl", [True, False, 1, 0]), written(tmp_path, "b.csv", ["1.0", "false", "TRUE", "0"])]
    found = read_examples(files)
    assert found.classes == ("false", "true")
    assert found.labels == (1, 0, 1, 0, 1, 0, 1, 0)
    assert found.notes == ("labels 1 and true are one class, and 0 and false",)
    other = read_examples([written(tmp_path, "c.csv", ["1", "true", "2", "0"])])
    assert len(other.classes) == 4
    assert "'1', 'true' are different classes" in " ".join(other.notes)


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        (["1", "0"], [1.0, 0.0, 0], (1, 0, 0)),
        ([1.0, 0.0], ["1", "0", "1.0"], (1, 0, 1)),
        (["True", "False"], [True, False], (1, 0)),
        (["1", "0"], [True, False], (1, 0)),
        ([True, False], ["1", 0], (1, 0)),
    ],
)
def test_a_test_file_may_spell_labels_in_another_way(tmp_path, train, test, labels):
    classes = read_examples([written(tmp_path, "a.jsonl", train)]).classes
    assert read_examples([written(tmp_path, "b.jsonl", test)], classes=classes).labels == labels


def test_an_unknown_label_names_the_one_that_is_meant(tmp_path):
    with pytest.raises(DataError, match=r"label 'Pos' does not occur in the training data \(classes: a, pos\); nearest: 'pos'"):
        read_examples([written(tmp_path, "a.csv", ["Pos"])], classes=("a", "pos"))


@pytest.mark.parametrize(
    ("one", "two"),
    [("pos", "Pos"), ("very good", "very-good"), ("very good", "very_good"), ("7", "07"), ("good", "good."), ("①", "1")],
)
def test_labels_that_look_the_same_are_named(one, two):
    found = encode_labels([one, two, "other"] * 3, "a file")
    assert len(found.classes) == 3
    (note,) = found.notes
    assert f"{one!r} (3 rows)" in note
    assert f"{two!r} (3 rows)" in note


@pytest.mark.parametrize(
    ("name", "marks", "kept"),
    [
        ("a.jsonl", [INFINITE, 1, 0], 2),
        ("a.jsonl", [-INFINITE, "1", "0"], 2),
        ("a.jsonl", [INFINITE, "pos", "neg"], 2),
        ("a.jsonl", ["Infinity", 1, 0], 2),
        ("a.csv", ["inf", "-inf", "1.0", "0.0"], 2),
        ("a.csv", ["nan", "NaN", "pos", "neg"], 2),
        ("a.parquet", [INFINITE, 1.0, 0.0], 2),
        ("a.txt", ["inf", "1", "0"], 2),
    ],
)
def test_numbers_that_are_none_are_no_class(tmp_path, name, marks, kept):
    found = read_examples([written(tmp_path, name, marks)])
    assert len(found) == kept == len(found.classes)
    (note,) = found.notes
    assert note.startswith(f"{len(marks) - kept} rows of ")
    assert "were left out" in note


def test_a_word_that_looks_like_infinity_is_a_class_among_words(tmp_path):
    assert read_examples([written(tmp_path, "a.csv", ["inf", "verb"])]).classes == ("inf", "verb")


SCORES = {
    "fractions": [f"{i % 26 / 5:.3f}" for i in range(300)],
    "three fractions": [(0.0, 0.5, 1.0)[i % 3] for i in range(300)],
    "decimal commas": [f"{i % 26 / 5:.1f}".replace(".", ",") for i in range(300)],
    "percentages": [f"{i % 7 * 10}%" for i in range(300)],
    "whole percentages": [i * 37 % 101 for i in range(3000)],
    "0 to 1000": [i * i % 1001 for i in range(300)],
    "-50 to 50": [i * 7 % 101 - 50 for i in range(3000)],
    "prices": [f"${i * i % 97}.50" for i in range(300)],
    "lengths": [f"{i * i % 97} km" for i in range(300)],
    "marks": [f"{i % 11}/10" for i in range(300)],
    "years": [1950 + i * i % 61 for i in range(300)],
    "fractions and words": [*(i / 7 for i in range(300)), *["unknown"] * 20],
    "mixed types": [i / 4 if i % 2 else str(i // 4) for i in range(300)],
    "all different": [i / 8 for i in range(160)],
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_refused_and_the_task_for_them_is_named(name):
    with pytest.raises(DataError, match=r"look like scores .*--task regress") as error:
        encode_labels(SCORES[name], "a.csv")
    assert len(str(error.value)) < 600


def test_the_name_of_the_column_says_that_numbers_are_scores(tmp_path):
    rows = "".join(f"text number {i},{i % 12}\n" for i in range(120))
    with pytest.raises(DataError, match="look like scores"):
        read_examples([put(tmp_path / "a.csv", f"text,rating\n{rows}")], label="rating")
    assert len(read_examples([put(tmp_path / "b.csv", f"text,label\n{rows}")]).classes) == 12


@pytest.mark.parametrize("mark", ["NA", "n/a", "null", "?"])
def test_marks_of_what_is_missing_are_named(mark):
    (note,) = encode_labels(["pos", mark, "neg"], "a file").notes
    assert f"label {mark!r} (1 rows) is trained as a class" in note


@pytest.mark.parametrize("format", [".csv", ".jsonl", ".parquet", ".txt"])
def test_scores_are_refused_in_every_format(tmp_path, format):
    marks = [i % 20 / 8 for i in range(200)]
    with pytest.raises(DataError, match="look like scores"):
        read_examples([written(tmp_path, f"a{format}", marks)])


@pytest.mark.parametrize(
    ("marks", "noted"),
    [
        ([i % 5 + 1 for i in range(100)], False),  # stars
        ([i % 2 / 2 for i in range(100)], False),
        ([i % 10 for i in range(100)], False),
        ([i % 77 for i in range(1000)], True),  # ids of many classes
        ([(0, 25, 50, 75, 100)[i % 5] for i in range(100)], True),
        ([f"intent {i % 40}" for i in range(1000)], False),
        ([f"{i % 5} stars" for i in range(1000)], False),
        (["1a", "2b", "3c", "4d"] * 20, False),
    ],
)
def test_classes_that_are_numbers_stay_classes(marks, noted):
    found = encode_labels(marks, "a.csv")
    assert len(found.classes) == len(set(marks))
    assert ["trained as classes, which have no order" in note for note in found.notes] == [True] * noted


def test_a_rare_class_that_is_a_number_points_to_scores(tmp_path):
    marks = [*[1, 2, 3] * 10, 7]
    with pytest.raises(DataError, match=r"class '7' has 1 examples.*The labels are numbers \(1, 2, 3, 7\): if they"):
        split(read_examples([written(tmp_path, "a.jsonl", marks)]))


def test_messages_are_short_whatever_the_labels_are(tmp_path):
    long = "x" * 100_000
    with pytest.raises(DataError) as one:
        read_examples([written(tmp_path, "a.csv", [long])])
    with pytest.raises(DataError) as many:
        read_examples([written(tmp_path, "b.csv", [f"{long}{i}" for i in range(60)])])
    with pytest.raises(DataError) as strange:
        read_examples([written(tmp_path, "c.csv", [long])], classes=[f"class {i}" for i in range(5000)])
    assert max(len(str(error.value)) for error in (one, many, strange)) < 2000
