"""Documents as token ids, each once: none is in training that is also held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from lowdim.errors import DataError
from lowdim.train.repeats import Repeats, same_text, same_tokens

__all__ = ["Piece", "Unseen", "left_out"]

#: A text, and whether a document ends with it.
Piece = tuple[str, bool]

_BATCH = 64  # pieces per call of the tokenizer


class Unseen:
    """Tokenizes documents that were not met before; each ends with the end token.

    Documents are the same if they differ only in case, spaces or Unicode form, or if their token ids are equal. Documents in
    several pieces are not compared.

    Args:
        most: how many keys of documents are remembered, for streams without end.

    Attributes:
        kept, held_out: how many documents are new, and how many were left out as they are in the test file.

    Example:
        >>> from lowdim.train.tokenizers import byte_tokenizer
        >>> from lowdim.train.unseen import Unseen
        >>> unseen = Unseen(byte_tokenizer())
        >>> list(unseen.ids([("ab", True), ("AB ", True), ("c", True)])), unseen.repeated
        ([[97, 98, 256], [99, 256]], 1)
    """

    def __init__(self, tokenizer: Any, most: int | None = None):
        self._tokenizer = tokenizer
        self._test = Repeats()
        self._known = Repeats(most)
        self.kept = self.held_out = 0

    @property
    def repeated(self) -> int:
        """How many documents were met again."""
        return self._known.left_out

    def apart(self, pieces: Iterable[Piece]) -> Iterator[list[int]]:
        """The documents of the test file, which training must not see."""
        for keys, ids in self._rows(pieces):
            self._test.add(*keys)
            yield ids

    def ids(self, pieces: Iterable[Piece]) -> Iterator[list[int]]:
        """The pieces of documents that are new."""
        for keys, ids in self._rows(pieces):
            if keys and not self._known.add(*keys):
                continue
            if keys and self._test.has(*keys):
                self.held_out += 1
                continue
            self.kept += 1
            yield ids

    def _rows(self, pieces: Iterable[Piece]) -> Iterator[tuple[tuple[bytes, ...], list[int]]]:
        """The keys of each document that is whole, and its tokens."""
        mark = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        walk, whole = iter(pieces), True
        while batch := list(itertools.islice(walk, _BATCH)):
            texts = [text for text, _ in batch]
            rows = self._tokenizer(texts, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
            for (text, ends), ids in zip(batch, rows):
                tokens = same_tokens(ids, self._tokenizer.unk_token_id) if ids else b""
                keys = (same_text(text), *([tokens] if tokens else [])) if whole and ends else ()
                whole = ends
                yield keys, [*ids, *mark] if ends else ids

    def check(self, separate: object, what: str = "training") -> None:
        """Raise if nothing is left to train on.

        Raises:
            DataError: every document is in the separate file.
        """
        if self.held_out and not self.kept:
            purpose = "train on" if what == "training" else "choose by"
            raise DataError(f"every {what} document is also in {separate}, so nothing is left to {purpose}")


def left_out(repeated: int, held_out: int, where: str = "the test file", what: str = "training") -> list[str]:
    """Notes on documents that were left out."""
    notes = []
    if repeated:
        notes.append(
            f"{repeated} duplicate documents were left out, so that no document is in two parts (they may differ in case, "
            "spaces or Unicode form)"
        )
    if held_out:
        notes.append(f"{held_out} {what} documents are also in {where} and were left out of {what}")
    return notes
