"""Texts that stand more than once: equal but for case, spaces and Unicode form, or with equal token ids."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Sequence

__all__ = ["Repeats", "first_of_each", "fold", "same_text", "same_tokens"]

#: Characters that are not seen: zero-width, direction marks, soft hyphens, variation selectors, tags.
_UNSEEN = dict.fromkeys([
    0x00AD, 0x034F, 0x061C, 0x180E, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070),
    *range(0xFE00, 0xFE10), *range(0xE0000, 0xE0080),
])  # fmt: skip
_SPACES = re.compile(r"\s+")
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
#: A space that separates no two words: at the ends, around signs, within a script without spaces.
_EMPTY = re.compile(rf"(?<!\w) | (?!\w)|(?<=[{_UNSPACED}]) (?=[{_UNSPACED}])")


def fold(text: str) -> str:
    """The text without case, width, composition, invisible characters, and spaces that separate no words.

    Example:
        >>> from lowdim.train.repeats import fold
        >>> fold("Ａ  Cafe\u0301 \u200b, too .") == fold("a caf\u00e9, too.")
        True
        >>> fold("1 12") == fold("11 2")
        False
    """
    if text.isascii():
        plain = text.lower()
    else:
        plain = unicodedata.normalize("NFKC", text.translate(_UNSEEN)).casefold()
        plain = unicodedata.normalize("NFKC", plain)
    return _EMPTY.sub("", _SPACES.sub(" ", plain).strip())


def same_text(*texts: str) -> bytes:
    """A key that texts, or pairs of texts, share if they are equal when folded."""
    digest = hashlib.blake2b(digest_size=12, person=b"text")
    for text in texts:
        digest.update(fold(text).encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def same_tokens(ids: Sequence[int], unknown: int | None = None) -> bytes:
    """A key that texts share if their token ids are equal; empty where the tokenizer did not know a word, which may differ."""
    if unknown is not None and unknown in ids:
        return b""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=12, person=b"tokens").digest()


class Repeats:
    """The keys that were met so far.

    Args:
        most: how many keys are remembered; later ones are only looked up.

    Attributes:
        left_out: how many were met again.

    Example:
        >>> from lowdim.train.repeats import Repeats, same_text
        >>> repeats = Repeats()
        >>> [repeats.add(same_text(text)) for text in ("A film", "a film", "a book")], repeats.left_out
        ([True, False, True], 1)
    """

    def __init__(self, most: int | None = None):
        self._seen: set[bytes] = set()
        self._most = most
        self.left_out = 0

    def has(self, *keys: bytes) -> bool:
        """Whether one of these keys was met."""
        return not self._seen.isdisjoint(keys)

    def add(self, *keys: bytes) -> bool:
        """Remember the keys of a text; whether none was met before."""
        new = not self.has(*keys)
        if self._most is None or len(self._seen) < self._most:
            self._seen.update(keys)
        self.left_out += not new
        return new


def first_of_each(keys: Sequence[Sequence[bytes]]) -> list[int]:
    """For each text the first one that shares a key with it, itself if it is the first.

    Texts that are linked by others share a first one, too.
    """
    owner: dict[bytes, int] = {}
    firsts: list[int] = []
    for index, own in enumerate(keys):
        first = min((owner[key] for key in own if key in owner), default=index)
        firsts.append(first)
        for key in own:
            owner.setdefault(key, first)
    return firsts
