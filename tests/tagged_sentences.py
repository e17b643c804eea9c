"""Sentences with entities that several tests share, in the words of the tiny BERT."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny import BAD, GOOD

_FILMS = (("film",), ("story",), ("plot", "two"), ("film", "three"), ("story", "four", "five"))
_PLAIN = ("the", "was", "a", "and", "it", "felt", "one", "six")


def sentences(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """`count` different sentences; a film of one to three words, and a mood, are entities."""
    draw = random.Random(seed)
    found: dict[tuple[str, ...], list[str]] = {}
    while len(found) < count:
        film = draw.choice(_FILMS)
        before, after = (draw.choices(_PLAIN, k=draw.randint(1, 3)) for _ in range(2))
        words = [*before, *film, *after, draw.choice(GOOD + BAD)]
        tags = ["O"] * len(before) + ["B-FILM"] + ["I-FILM"] * (len(film) - 1) + ["O"] * len(after) + ["B-MOOD"]
        found.setdefault(tuple(words), tags)
    return [(list(words), tags) for words, tags in found.items()]


def write_rows(path: Path, pairs) -> Path:
    path.write_text("".join(json.dumps({"words": w, "tags": t}) + "\n" for w, t in pairs), encoding="utf-8")
    return path


def write_conll(path: Path, pairs) -> Path:
    text = "\n".join("".join(f"{word} x {tag}\n" for word, tag in zip(*pair)) for pair in pairs)
    path.write_text("-DOCSTART- -X- O\n\n" + text, encoding="utf-8")
    return path
