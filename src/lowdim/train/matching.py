"""The part of an answer that counts: all of it, its last number, or what a pattern finds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowdim.errors import DataError, shown

__all__ = ["AnswerPattern"]

#: A number: its digits may stand in groups of three, after a sign and a currency's sign.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-+\u2212])?[$€£]?(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)


class AnswerPattern:
    r"""Takes from an answer what is compared with the expected one.

    Args:
        pattern: None compares whole answers but for spaces; `"number"` the last number (1,234 = 1234.0 = $1,234); otherwise a
            regular expression with one group, whose last match is taken.

    Raises:
        ValueError: not a regular expression, or not one group.

    Example:
        >>> from lowdim.train.matching import AnswerPattern
        >>> number, marked = AnswerPattern("number"), AnswerPattern(r"#### (.+)")
        >>> number.found("48 + 24 = $1,234.50 in all."), marked.found("It is so.\n#### 7")
        ('1234.5', '7')
        >>> AnswerPattern(None).hit("a  b", " a b\n")
        True
    """

    def __init__(self, pattern: str | None):
        self.pattern = pattern
        self._compiled: re.Pattern[str] | None = None
        if pattern is None or pattern == "number":
            return
        try:
            self._compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"--answer-pattern must be number or a regular expression; got {shown(pattern)}, which is none ({error})"
            ) from None
        if self._compiled.groups != 1:
            raise ValueError(
                f"--answer-pattern must have one group, in parentheses, for the part that counts; got {shown(pattern)} with "
                f"{self._compiled.groups} ((?:...) groups without counting)"
            )

    def found(self, answer: str) -> str | None:
        """The part of an answer that counts; None where there is none."""
        if self.pattern is None:
            return _folded(answer)
        if self._compiled is None:
            return _last_number(answer)
        matches = [_folded(match[1] or "") for match in self._compiled.finditer(answer)]
        return next((match for match in reversed(matches) if match), None)

    def hit(self, expected: str, answer: str) -> bool:
        """Whether what counts of an answer is what is expected."""
        wanted = self.found(expected)
        return wanted is not None and wanted == self.found(answer)

    def check(self, expected: Sequence[str]) -> list[str]:
        """A note where some of the expected answers have no part that counts.

        Raises:
            DataError: none has one.
        """
        missing = [answer for answer in expected if self.found(answer) is None]
        if expected and len(missing) == len(expected):
            raise DataError(
                f"--answer-pattern {shown(self.pattern)} matches none of the {len(expected)} expected answers, such as "
                f"{shown(missing[0], 120)}"
            )
        if not missing:
            return []
        return [
            f"{len(missing)} of {len(expected)} expected answers do not match --answer-pattern, such as {shown(missing[0])}; "
            "they count as missed"
        ]


def _folded(text: str) -> str:
    return " ".join(text.split())


def _last_number(text: str) -> str | None:
    """The last number, written in one way."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    whole, _, rest = last["number"].replace(",", "").partition(".")
    whole, rest = whole.lstrip("0") or "0", rest.rstrip("0")
    value = f"{whole}.{rest}" if rest else whole
    return f"-{value}" if last["sign"] in ("-", "\u2212") and value != "0" else value
