"""How much of the held-out text stands in the training text, too: what no comparison of whole documents finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy

__all__ = ["overlap_note", "repeated_blocks"]

_WORDS, _LETTERS = 12, 40  # tokens of a run that two texts seldom share by chance
_SMALL = 1000  # tokens of a vocabulary of letters
_AT_ONCE = 2**20  # tokens
_MOST = 2**26  # tokens of training text that are looked at
_FACTOR = numpy.uint64(0x9E3779B97F4A7C15)


def overlap_note(train: Iterable[Sequence[int]], held: Sequence[Sequence[int]], vocabulary: int) -> list[str]:
    """A note if held-out blocks repeat training text.

    Args:
        train: blocks in the order of the text.
        vocabulary: number of tokens, which tells words from letters.
    """
    run = _LETTERS if vocabulary < _SMALL else _WORDS
    count = repeated_blocks(train, held, run)
    if not count:
        return []
    return [
        f"at least half of the text of {count} of {len(held)} held-out blocks is in the training text, too: the data repeats "
        "itself, and scores look better than they are"
    ]


def repeated_blocks(train: Iterable[Sequence[int]], held: Sequence[Sequence[int]], run: int) -> int:
    """How many of the held-out blocks have at least half of their runs of `run` tokens in the training text.

    One pass over the training text, of which the first 67 million tokens are looked at.

    Example:
        >>> from lowdim.train.overlap import repeated_blocks
        >>> repeated_blocks([[1, 2, 3, 4], [5, 6, 7, 8]], [[3, 4, 5, 6], [8, 7, 6, 5]], run=2)
        1
    """
    held = [block for block in held if len(block) >= run]
    if not held:
        return 0
    own = [_runs(numpy.asarray(block, numpy.uint64), run) for block in held]
    known, places = numpy.unique(numpy.concatenate(own), return_inverse=True)
    found = numpy.zeros(len(known), bool)
    for tokens in _pieces(train, run):
        found |= numpy.isin(known, _runs(tokens, run))
    ends = numpy.cumsum([len(runs) for runs in own])[:-1]
    return sum(bool(part.mean() >= 0.5) for part in numpy.split(found[places], ends))


def _runs(tokens: Any, run: int) -> Any:
    """A number for each run of tokens: `Σ (token + 1) · factor^k`, modulo 2^64."""
    count = len(tokens) - run + 1
    total = numpy.zeros(max(0, count), numpy.uint64)
    for k in range(run if count > 0 else 0):
        total = total * _FACTOR + (tokens[k : k + count] + numpy.uint64(1))
    return total


def _pieces(blocks: Iterable[Sequence[int]], run: int) -> Iterator[Any]:
    """The text in pieces that share the tokens of a run, so that none is lost between them."""
    waiting: list[Any] = []
    size = seen = 0
    for block in blocks:
        waiting.append(numpy.asarray(block, numpy.uint64))
        size, seen = size + len(block), seen + len(block)
        if size >= _AT_ONCE:
            piece = numpy.concatenate(waiting)
            yield piece
            waiting = [piece[len(piece) - run + 1 :]]
            size = run - 1
        if seen >= _MOST:
            return
    if waiting:
        yield numpy.concatenate(waiting)
