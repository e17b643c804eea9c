import json

import pytest

from lowdim.errors import DataError
from lowdim.train.text_pairs import read_pairs

WORDS = ("a cat sat on the mat", "the dog ran very far away", "two birds sang in a tree", "one fish swam in the sea")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(*names, **extra):
    return [
        {**{name: f"{text} {j}" for j, name in enumerate(names)}, **{k: v[i] for k, v in extra.items()}}
        for i, text in enumerate(WORDS)
    ]


@pytest.mark.parametrize(
    ("names", "order", "extra", "kind"),
    [
        (("anchor", "positive"), (0, 1), {}, "pairs"),
        (("positive", "anchor"), (1, 0), {}, "pairs"),
        (("negative", "positive", "query"), (2, 1, 0), {}, "triplets"),
        (("sentence1", "sentence2"), (0, 1), {"score": [0.1, 2, 3, 5]}, "scored pairs"),
        (("english", "french"), (0, 1), {}, "pairs"),
        (("question", "answer"), (0, 1), {"id": [1, 2, 3, 4]}, "pairs"),
    ],
)
def test_columns_are_found(tmp_path, names, order, extra, kind):
    found = read_pairs([write(tmp_path / "x.jsonl", rows(*names, **extra))])
    assert found.kind == kind
    assert [column[0] for column in found.columns] == [f"{WORDS[0]} {j}" for j in order]
    assert len(found) == 4
    assert (found.scores is not None) == ("score" in extra)


def test_columns_that_are_asked_for(tmp_path):
    path = write(tmp_path / "x.jsonl", rows("a", "b", "c", "d", mark=[1, 2, 3, 4]))
    found = read_pairs([path], text="d,b", score="mark")
    assert [column[0] for column in found.columns] == [f"{WORDS[0]} 3", f"{WORDS[0]} 1"]
    assert found.scores == [1.0, 2.0, 3.0, 4.0]
    assert found.used[0].roles.unused == ("a", "c")


def test_rows_without_a_text_or_a_score_are_left_out(tmp_path):
    listed = rows("sentence1", "sentence2", score=[0.1, None, 3, 5])
    listed[3]["sentence2"] = "  "
    found = read_pairs([write(tmp_path / "x.jsonl", listed)])
    assert found.scores == [0.1, 3.0]
    assert "2 rows of" in found.notes[0]


def test_files_are_joined_and_must_be_of_one_kind(tmp_path):
    pairs, scored = (
        write(tmp_path / name, rows("sentence1", "sentence2", **extra))
        for name, extra in (("p.jsonl", {}), ("s.jsonl", {"score": [1, 2, 3, 4]}))
    )
    assert len(read_pairs([pairs, pairs])) == 8
    with pytest.raises(DataError, match="pairs and scored pairs"):
        read_pairs([pairs, scored])


@pytest.mark.parametrize(
    ("names", "options", "word"),
    [
        (("a", "b", "c", "d"), {}, "which columns are the texts"),
        (("text",), {}, "which columns are the texts"),
        (("query", "question", "answer"), {}, "which columns are the texts"),
        (("a", "b"), {"text": "a,z"}, "no column 'z'"),
        (("a", "b"), {"text": "a"}, "two or three columns"),
        (("a", "b"), {"text": "a,a"}, "two or three columns"),
        (("a", "b"), {"score": "z"}, "no column 'z'"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, names, options, word):
    with pytest.raises(ValueError, match=word):
        read_pairs([write(tmp_path / "x.jsonl", rows(*names))], **options)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="at least one file"):
        read_pairs([])
    with pytest.raises(DataError, match="three texts and a score"):
        read_pairs([write(tmp_path / "x.jsonl", rows("anchor", "positive", "negative", score=[1, 2, 3, 4]))])
    with pytest.raises(DataError, match="no row with 2 texts"):
        read_pairs(
            [
                write(
                    tmp_path / "y.jsonl", [{"anchor": "a b c d e f", "positive": ""}, {"anchor": "", "positive": "g h i j k l"}]
                )
            ]
        )
