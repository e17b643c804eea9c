"""What counts of an answer."""

import pytest

from lowdim.errors import DataError
from lowdim.train.matching import AnswerPattern


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("1,234", "1234"),
        ("1234.0", "1234"),
        ("$1,234", "1234"),
        ("it grew by 50%", "50"),
        ("is 72.", "72"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("-$5", "-5"),
        ("10-5", "5"),
        ("x - 5", "5"),
        ("3,4", "4"),
        ("12,3456", "3456"),
        (".50", "0.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("9" * 40, "9" * 40),
        ("48 / 2 = 24 and 48 + 24 = 72\n#### 72", "72"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(answer, number):
    assert AnswerPattern("number").found(answer) == number


def test_an_answer_without_what_counts_is_never_hit():
    number = AnswerPattern("number")
    assert number.hit("72", "It is 72.0")
    assert not number.hit("72", "It is seventy-two")
    assert not number.hit("none", "none")


def test_a_pattern_takes_its_last_match_and_no_empty_one():
    pattern = AnswerPattern(r"#### ?(.*)")
    assert pattern.found("#### 1\nor\n####  two  three ") == "two three"
    assert pattern.found("#### 1\n####") == "1"
    assert pattern.found("1") is None


def test_expected_answers_that_do_not_match():
    pattern = AnswerPattern("#### (.*)")
    assert pattern.check(["#### 1", "#### 2"]) == []
    (note,) = pattern.check(["#### 1", "two"])
    assert note.startswith("1 of 2 expected answers do not match --answer-pattern, such as 'two'; they count as missed")
    with pytest.raises(
        DataError, match=r"--answer-pattern '#### \(\.\*\)' matches none of the 1 expected answers, such as 'two'"
    ):
        pattern.check(["two"])
