"""Task tokens: a tag for each word of a sentence."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from lowdim.errors import DataError, cut, listed, nearest, shown
from lowdim.train.answers import IGNORED
from lowdim.train.entities import Entity, entities_of
from lowdim.train.jackknife import pseudo_values
from lowdim.train.metrics import Metric
from lowdim.train.parts import Rows, divide
from lowdim.train.repeats import same_text
from lowdim.train.streams import datasets_module
from lowdim.train.tagged import Tagged, read_tagged, tag_order
from lowdim.train.tasks.base import Baseline, Score, Task, check_finite, data_name
from lowdim.train.tasks.labelled import PadLabels

__all__ = ["TokenClassification", "token_classification"]

_BATCH = 512  # sentences per call of the tokenizer


@dataclass(kw_only=True)
class TokenClassification(Task):
    """A tag for each word; an outcome is `(tags, predicted tags)` of a row's words, as class indices."""

    kind: ClassVar[str] = "tokens"

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Tags and predicted tags at the first piece of each word."""
        logits = model(**batch).logits
        check_finite(logits)
        answers, labels = logits.argmax(-1).cpu(), batch["labels"].cpu()
        return [(own[own != IGNORED].tolist(), found[own != IGNORED].tolist()) for own, found in zip(labels, answers)]

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """F1 of entities, or the share of words with the right tag; and a table by type of entity.

        The values of F1 are jackknife values over rows. Those of the accuracy are weighted by the number of words.
        """
        details = {"by_class": self._by_type(outcomes)}
        if metric.name == "token-accuracy":
            right = np.array([sum(map(int.__eq__, *row)) for row in outcomes], float)
            words = sum(len(labels) for labels, _ in outcomes)
            return Score(float(right.sum() / words), tuple((right * len(outcomes) / words).tolist()), details)
        counts = np.array([self._counts(row) for row in outcomes], float)
        whole = _f1(counts.sum(0))
        values = pseudo_values(float(whole), _f1(counts.sum(0) - counts))
        return Score(float(whole), tuple(values.tolist()), details)

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """Always answering `O`, or the most frequent tag where there is no `O`."""
        if not len(part):
            return None
        wanted = [[tag for tag in own if tag != IGNORED] for own in part["labels"]]
        tags = Counter(tag for own in self.train["labels"] for tag in own if tag != IGNORED)
        constant = self.classes.index("O") if "O" in self.classes else tags.most_common(1)[0][0]
        answers = [(own, [constant] * len(own)) for own in wanted]
        scores = {each.name: self.score_of(answers, each).value for each in self.metrics()}
        name = self.classes[constant]
        said = ", ".join(f"{each.title} {scores[each.name]:.3f}" for each in self.metrics())
        return Baseline(
            "constant-tag",
            f"All {name}",
            f"always answering {name}",
            self.score_of(answers, metric),
            scores,
            f"always answering {name} ({scores['token-accuracy']:.1%} of the words) gives {said}",
        )

    def _entities(self, tags: Sequence[int]) -> set[Entity]:
        return set(entities_of([self.classes[tag] for tag in tags]))

    def _counts(self, row: tuple[Sequence[int], Sequence[int]]) -> tuple[int, int, int]:
        """Entities that are right, found, and wanted."""
        wanted, found = map(self._entities, row)
        return len(wanted & found), len(found), len(wanted)

    def _by_type(self, outcomes: Sequence[Any]) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each type of entity, and how many there are."""
        right, found, held = Counter(), Counter(), Counter()
        for row in outcomes:
            real, guessed = map(self._entities, row)
            held.update(entity.kind for entity in real)
            found.update(entity.kind for entity in guessed)
            right.update(entity.kind for entity in real & guessed)
        return [
            {
                "class": kind,
                "precision": right[kind] / found[kind] if found[kind] else 0.0,
                "recall": right[kind] / held[kind] if held[kind] else 0.0,
                "f1": float(_f1(np.array([right[kind], found[kind], held[kind]], float))),
                "count": held[kind],
            }
            for kind in sorted({*held, *found})
        ]


def load(recipe: Any, processor: Any, **keywords: Any) -> TokenClassification:
    """The task of a recipe."""
    return token_classification(processor, recipe.data, label=recipe.label, **keywords)


def token_classification(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    validation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> TokenClassification:
    """A tagging task from files of sentences (`lowdim.train.tagged`).

    The first piece of each word has the word's tag; the others do not count. A sentence that is too long is cut between words
    into several rows, where possible between entities. Equal sentences are in one part only.

    Args: see `lowdim.train.tasks.classify.classification`; `text` and `label` are the columns of words and of tags.

    Raises:
        DataError: one tag only, a tag that training does not have, no entity to find, a tokenizer that does not tell words.
        UnknownNameError: see `lowdim.train.tagged`.
    """
    length = max_length if most is None else min(max_length, most)
    _check_tokenizer(tokenizer)
    parts = {
        "train": [read_tagged(name, text=text, label=label) for name in files],
        "validation": [] if validation is None else [read_tagged(validation, text=text, label=label)],
        "test": [] if evaluation is None else [read_tagged(evaluation, text=text, label=label)],
    }
    classes = tag_order(tag for each in parts["train"] for own in each.tags for tag in own)
    if len(classes) < 2:
        raise DataError(f"{data_name(files)}: there is only one tag ({listed(map(shown, classes))}); at least two are needed")
    for part, name in (("validation", validation), ("test", evaluation)):
        _check_known(parts[part], classes, name)
    found = list(itertools.chain.from_iterable(parts.values()))
    words = [own for each in found for own in each.words]
    tags = [own for each in found for own in each.tags]
    ends = list(itertools.accumulate(sum(map(len, each)) for each in parts.values()))
    divided = divide(
        Rows([same_text(" ".join(own)) for own in words], [0] * len(words), noun="sentences"),
        validation=None if validation is None else range(ends[0], ends[1]),
        test=None if evaluation is None else range(ends[1], ends[2]),
        seed=seed,
    )
    encoder = _Encoder(tokenizer, length, classes)
    where = {"train": divided.train[:limit], "validation": divided.validation, "test": divided.test}
    rows = {part: encoder.rows([(words[i], tags[i]) for i in places]) for part, places in where.items()}
    for part in ("train", "validation", "test"):
        if not any(classes[tag] != "O" for row in rows[part] for tag in row["labels"] if tag != IGNORED):
            raise DataError(f"no sentence of the {part} part has an entity (all tags are O), so there is nothing to find")
    notes = [note for each in found for note in each.notes] + list(divided.notes)
    notes += encoder.notes("--max-length" if length == max_length else "the model reads no more")
    return TokenClassification(
        **{part: datasets_module().Dataset.from_list(each) for part, each in rows.items()},
        collate=PadLabels.of(tokenizer),
        max_length=length,
        classes=classes,
        notes=tuple(notes),
        name=data_name(files),
        columns=tuple(used for each in found for used in each.columns),
        example=_example(tokenizer, rows["train"][0], classes),
        processor=tokenizer,
    )


class _Encoder:
    """Sentences as rows of token ids and labels; counts what was cut, and words that give no token."""

    def __init__(self, tokenizer: Any, length: int, classes: Sequence[str]):
        self.tokenizer, self.length = tokenizer, length
        self.room = max(1, length - tokenizer.num_special_tokens_to_add(pair=False))
        self.index = {name: i for i, name in enumerate(classes)}
        self.sentences = self.long = self.pieces = self.lost = 0

    def rows(self, sentences: Iterable[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, Any]]:
        """`input_ids` and `labels` of each sentence, or of the parts of a long one."""
        found: list[dict[str, Any]] = []
        waiting = iter(sentences)
        while batch := list(itertools.islice(waiting, _BATCH)):
            self.sentences += len(batch)
            short = [part for words, tags in batch for part in self._cut(words, tags)]
            encoded = self._call([words for words, _ in short], truncation=True, max_length=self.length)
            for i, (words, tags) in enumerate(short):
                labels, seen = [], set()
                own: list[int | None] = encoded.word_ids(i)
                for word in own:
                    labels.append(IGNORED if word is None or word in seen else self.index[tags[word]])
                    seen.add(word)
                self.lost += len(set(range(len(words))) - seen)
                if any(label != IGNORED for label in labels):
                    found.append({"input_ids": encoded["input_ids"][i], "labels": labels})
        return found

    def notes(self, why: str) -> list[str]:
        """What the user should know."""
        notes = []
        if self.long:
            whole = f"{self.long} of {self.sentences} sentences are longer than {self.length} tokens"
            notes.append(f"{whole} and were cut into {self.pieces} rows ({why})")
        if self.lost:
            notes.append(f"{self.lost} words give no token and are neither trained on nor scored")
        return notes

    def _call(self, sentences: list[Sequence[str]], **how: Any) -> Any:
        return self.tokenizer([list(words) for words in sentences], is_split_into_words=True, verbose=False, **how)

    def _cut(self, words: Sequence[str], tags: Sequence[str]) -> list[tuple[Sequence[str], Sequence[str]]]:
        """The sentence, or parts of it that are short enough, which end between entities where possible."""
        encoded = self._call([words], add_special_tokens=False, truncation=False)
        counts = Counter(encoded.word_ids(0))
        if sum(counts.values()) <= self.room:
            return [(words, tags)]
        starts = {entity.start for entity in entities_of(tags)}
        found, begin, size, place = [], 0, 0, 0
        while place < len(words):
            if size + counts[place] > self.room and place > begin:
                free = [i for i in range(begin + 1, place + 1) if i in starts or tags[i] == "O"]
                end = free[-1] if free else place
                found.append((words[begin:end], tags[begin:end]))
                begin = place = end
                size = 0
            else:
                size, place = size + counts[place], place + 1
        found.append((words[begin:], tags[begin:]))
        self.long, self.pieces = self.long + 1, self.pieces + len(found)
        return found


def _check_tokenizer(tokenizer: Any) -> None:
    """Raise unless the tokenizer tells which word each token is from."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the model's tokenizer ({type(tokenizer).__name__}) does not tell which word a token is from; task tokens needs "
            "one with a tokenizer.json"
        )


def _check_known(held: Sequence[Tagged], classes: Sequence[str], name: Any) -> None:
    known = set(classes)
    strange = sorted({tag for each in held for own in each.tags for tag in own} - known)
    if strange:
        raise DataError(
            f"{name}: tag {shown(strange[0])} does not occur in the training data (tags: {listed(classes)}); nearest: "
            f"{shown(nearest(strange[0], classes, 1)[0])}"
        )


def _f1(counts: Any) -> Any:
    """`2 right / (found + wanted)`, 0 where there is nothing; `counts` has right, found and wanted in its last dimension."""
    right, total = counts[..., 0], counts[..., 1] + counts[..., 2]
    return np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0)


def _example(tokenizer: Any, row: dict[str, Any], classes: Sequence[str]) -> str:
    """The tokens of a row, those that count with their tags."""
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    marked = (token if label == IGNORED else f"{token}/{classes[label]}" for token, label in zip(tokens, row["labels"]))
    return cut(" ".join(marked), 160)
