"""Entities of tagged words, and their score: an entity counts if its type, first and last word are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Entity", "EntityScore", "entities_of", "score_entities"]


class Entity(NamedTuple):
    """Words `start` to `end` (exclusive) are an entity of this type."""

    kind: str
    start: int
    end: int


class EntityScore(NamedTuple):
    """Micro-averaged over all entities; 0 where there is none to find or none was found."""

    precision: float
    recall: float
    f1: float


def entities_of(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, from tags such as `B-PER I-PER O`, or `S-` and `E-` in addition.

    A tag begins an entity if it is `B-` or `S-`, follows `O`, `E-` or `S-`, or has another type than the tag before it: a
    model's tags need not be well formed. A tag without a prefix is a type of its own.

    Example:
        >>> from lowdim.train.entities import entities_of
        >>> entities_of(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
        [Entity(kind='PER', start=0, end=2), Entity(kind='LOC', start=3, end=4), Entity(kind='LOC', start=4, end=5)]

    Source: the default rule of seqeval and of the CoNLL-2000 script conlleval.
    """
    found: list[Entity] = []
    before, kind, start = "O", "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, own = _parts(tag)
        ended = before != "O" and (prefix in ("B", "S", "O") or before in ("E", "S") or own != kind)
        if ended:
            found.append(Entity(kind, start, place))
        if prefix != "O" and (before == "O" or ended):
            start = place
        before, kind = prefix, own
    return found


def score_entities(wanted: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> EntityScore:
    """Precision, recall and F1 of the entities in tagged sentences.

        F1 = 2 P R / (P + R),  P = right / found,  R = right / wanted

    Raises:
        ValueError: the numbers of sentences, or of the words in one, differ.
    """
    if [len(tags) for tags in wanted] != [len(tags) for tags in found]:
        raise ValueError("the tags to score must be for the same words")
    real = [set(entities_of(tags)) for tags in wanted]
    guessed = [set(entities_of(tags)) for tags in found]
    right = sum(len(a & b) for a, b in zip(real, guessed, strict=True))
    total_found, total_real = sum(map(len, guessed)), sum(map(len, real))
    precision = right / total_found if total_found else 0.0
    recall = right / total_real if total_real else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return EntityScore(precision, recall, f1)


def _parts(tag: str) -> tuple[str, str]:
    """The prefix and the type."""
    if tag == "O":
        return "O", ""
    prefix, dash, kind = tag.partition("-")
    if dash and prefix in ("B", "I", "E", "S"):
        return prefix, kind
    return "I", tag
