"""Entities and their score, against cases worked out by hand and the rule of seqeval."""

import random

import pytest

from lowdim.train.entities import Entity, entities_of, score_entities


@pytest.mark.parametrize(
    ("tags", "want"),
    [
        ("", []),
        ("O O", []),
        ("B-A I-A I-A", [("A", 0, 3)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),  # an entity may begin with I
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),
        ("S-A S-A", [("A", 0, 1), ("A", 1, 2)]),
        ("B-A E-A I-A", [("A", 0, 2), ("A", 2, 3)]),
        ("B-A I-A E-A O S-B", [("A", 0, 3), ("B", 4, 5)]),
        ("NAME NAME O PLACE", [("NAME", 0, 2), ("PLACE", 3, 4)]),
        ("B-first-name I-first-name", [("first-name", 0, 2)]),
        ("O B-A", [("A", 1, 2)]),
    ],
)
def test_entities(tags, want):
    assert entities_of(tags.split()) == [Entity(*entity) for entity in want]


def test_the_score_counts_whole_entities():
    wanted = [["B-A", "I-A", "O", "B-B"], ["B-A", "O"]]
    found = [["B-A", "O", "O", "B-B"], ["B-A", "B-C"]]
    # Found: A(0,1) wrong, B right, A right, C wrong; wanted: A(0,2), B, A.
    assert score_entities(wanted, found) == pytest.approx((2 / 4, 2 / 3, 4 / 7))


def test_nothing_found_or_nothing_to_find():
    assert score_entities([["O", "O"]], [["O", "B-A"]]) == (0.0, 0.0, 0.0)
    assert score_entities([["B-A"]], [["O"]]) == (0.0, 0.0, 0.0)
    assert score_entities([], []) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="for the same words"):
        score_entities([["O"]], [["O", "O"]])


def test_random_tags_are_read_as_the_conll_script_reads_them():
    """Starts and ends by the table of conlleval, tag by tag."""

    def starts(before, kind_before, prefix, kind):
        if prefix == "O":
            return False
        return prefix in ("B", "S") or before in ("O", "E", "S") or kind != kind_before

    def ends(before, kind_before, prefix, kind):
        if before == "O":
            return False
        return before in ("E", "S") or prefix in ("B", "S", "O") or kind != kind_before

    draw = random.Random(0)
    for _ in range(300):
        tags = [draw.choice(["O", "O", *(f"{p}-{k}" for p in "BIES" for k in "XY")]) for _ in range(12)]
        want, begin, before, kind_before = [], 0, "O", ""
        for place, tag in enumerate([*tags, "O"]):
            prefix, _, kind = tag.partition("-")
            if ends(before, kind_before, prefix, kind):
                want.append(Entity(kind_before, begin, place))
            if starts(before, kind_before, prefix, kind):
                begin = place
            before, kind_before = prefix, kind
        assert entities_of(tags) == want
