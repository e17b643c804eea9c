"""Task instruct: a language model learns the answers of conversations."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lowdim.errors import DataError, shown
from lowdim.train.answers import (
    IGNORED,
    Encoded,
    NoAnswerLeftError,
    encode_conversation,
    ending_of,
    prompt_of,
    token_ids,
    use_template,
)
from lowdim.train.conversations import Turn
from lowdim.train.dialogues import Dialogues, read_dialogues
from lowdim.train.generating import generate
from lowdim.train.matching import AnswerPattern
from lowdim.train.metrics import Metric
from lowdim.train.repeats import first_of_each, same_text, same_tokens
from lowdim.train.streams import datasets_module
from lowdim.train.tasks.base import Baseline, Score, data_name
from lowdim.train.tasks.causal_lm import LanguageModelling
from lowdim.train.tasks.labelled import PadLabels

__all__ = ["Instruction", "instruction"]

#: Tokens that a model may write for an answer at most, and for a sample.
_MOST_WRITTEN, _SAMPLE = 512, 128


@dataclass(kw_only=True)
class Instruction(LanguageModelling):
    """Conversations of which the answers are predicted; an outcome is `(summed loss, predicted tokens)` of a row.

    A row has `input_ids`, `labels`, and of its last turn `prompt` (ids after which the answer is to be written), `asked` (the
    user's words) and `answer`.

    Attributes:
        pattern: what counts of an answer for the exact match.
        written: tokens that the model may write for an answer.
        ending: what the chat template writes after an answer.
        most: tokens that the model can read; None: any number.
    """

    kind: ClassVar[str] = "instruct"

    pattern: AnswerPattern
    written: int
    ending: str
    most: int | None = None

    def score(self, model: nn.Module, part: Any, metric: Metric) -> Score:
        """As for other tasks; for the exact match the model writes an answer to each row, and a hit is 1."""
        if metric.name != "exact-match":
            return super().score(model, part, metric)
        try:
            answers = self.answers(model, part)
        except FloatingPointError:
            return Score(float("nan"))
        hits = tuple(float(self.pattern.hit(row["answer"], answer)) for row, answer in zip(part, answers, strict=True))
        return Score(sum(hits) / len(hits), hits)

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """None: the untouched model is what training must not fall short of."""
        return None

    def answers(self, model: nn.Module, rows: Iterable[Any], most: int | None = None) -> list[str]:
        """What the model writes for each row's last question.

        Args:
            most: tokens of an answer; None: as long as the longest expected one may be.
        """
        length = min(most or self.written, self.written)
        room = None if self.most is None else max(1, self.most - length)
        prompts = [row["prompt"] if room is None else row["prompt"][-room:] for row in rows]
        tokenizer = self.processor
        marks = token_ids(tokenizer, self.ending) if self.ending.strip() else []
        stop = {*(marks if len(marks) == 1 else ()), tokenizer.eos_token_id} - {None}
        pad = tokenizer.pad_token_id or 0
        found = generate(model, prompts, most=length, stop=sorted(stop), pad=pad, batch_size=self.evaluation_batch)
        texts = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in found]
        return [text.split(self.ending)[0] if len(marks) > 1 else text for text in texts]

    def samples(self, model: nn.Module, count: int = 5) -> list[dict[str, str]]:
        """What the model answers to the first rows of the test part."""
        rows = [self.test[place] for place in range(min(count, len(self.test)))]
        answers = self.answers(model, rows, _SAMPLE)
        return [
            {"prompt": row["asked"], "answer": answer.strip(), "expected": row["answer"].strip()}
            for row, answer in zip(rows, answers)
        ]


def load(recipe: Any, processor: Any, **keywords: Any) -> Instruction:
    """The task of a recipe."""
    exact = recipe.metric == "exact-match"
    if recipe.answer_pattern is not None and not exact:
        raise ValueError("--answer-pattern says what counts for the exact match: add --metric exact-match")
    return instruction(processor, recipe.data, pattern=recipe.answer_pattern, exact=exact, **keywords)


def instruction(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    validation: str | Path | None = None,
    text: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    pattern: str | None = None,
    exact: bool = False,
) -> Instruction:
    """Instruction tuning on conversations (`lowdim.train.conversations`), of which the answers are trained on.

    A tokenizer without a chat template gets the plain one of `lowdim.train.answers`. Rows with the same prompt, or of which one
    continues the other, are in one part.

    Args: see `classification`.
        text: columns of the prompt and, last, of the answer, with commas between them; or the column of turns.
        max_length: tokens of a conversation; a longer one loses its start.
        pattern: see `lowdim.train.matching.AnswerPattern`.
        exact: whether the score is the exact match, for which expected answers must fit the pattern.

    Raises:
        DataError: see `read_dialogues`; no answer fits into the length; too few conversations; the pattern matches none.
        ValueError: the pattern is none.
    """
    chosen = AnswerPattern(pattern)
    plain = use_template(tokenizer)
    sources = [read_dialogues(files, text=text)]
    sources += [read_dialogues([file], text=text) for file in (validation, evaluation) if file is not None]
    length = max_length if most is None else min(max_length, most)
    encoded = [_encoded(tokenizer, source, length) for source in sources]
    notes = [*dict.fromkeys(note for source in sources for note in source.notes)]
    if plain:
        notes.append("the tokenizer has no chat template and gets a plain one (### User, ### Assistant), saved with it")
    notes += _shortened(encoded, length, "--max-length" if length == max_length else "the model reads no more")
    kinds = ["train", *(["validation"] if validation is not None else []), *(["test"] if evaluation is not None else [])]
    rows = [row for part in encoded for row in part.rows]
    origins = [kind for kind, part in zip(kinds, encoded) for _ in part.rows]
    parts, remarks = _parts(rows, origins, seed, data_name(files))
    notes += remarks
    held = [*parts["validation"], *parts["test"]]
    if exact:
        notes += chosen.check([row.answer for row in held])
    longest = max(row.answer_tokens for row in held)
    written = min(longest + max(8, longest // 4), _MOST_WRITTEN, *([] if most is None else [max(1, most // 2)]))
    if exact:
        short = " (some expected answers are longer)" if written < longest else ""
        notes.append(f"for the exact match at most {written} tokens are written; the longest answer has {longest}{short}")
    learn, choose, report = (_dataset(part) for part in (parts["train"][:limit], parts["validation"], parts["test"]))
    return Instruction(
        train=learn,
        validation=choose,
        test=report,
        collate=PadLabels(tokenizer.pad_token_id or 0, "right"),
        max_length=length,
        notes=tuple(notes),
        name=data_name(files),
        columns=tuple(used for source in sources for used in source.columns),
        example=_example(tokenizer, learn[0]),
        processor=tokenizer,
        pattern=chosen,
        written=written,
        ending=ending_of(tokenizer),
        most=most,
    )


@dataclass(frozen=True)
class _Row:
    """A conversation that is ready for training."""

    turns: list[Turn]
    encoded: Encoded
    prompt: list[int]
    unknown: int | None

    @property
    def answer(self) -> str:
        """The last one."""
        return self.turns[-1].content

    @property
    def answer_tokens(self) -> int:
        """Tokens of the last answer, with the one that ends it."""
        return max(1, len(self.encoded.input_ids) + self.encoded.cut - len(self.prompt))

    @property
    def whole(self) -> bytes:
        """A key of all turns."""
        return _key(self.turns)

    def keys(self, wholes: set[bytes]) -> list[bytes]:
        """Rows that share one belong together: the same prompt, as text or as tokens, or one continues the other."""
        ids = [same_tokens(ids, self.unknown) for ids in (self.prompt, self.encoded.input_ids)]
        begun = (_key(self.turns[: place + 1]) for place, turn in enumerate(self.turns) if turn.role == "assistant")
        return [_key(self.turns[:-1]), *filter(None, ids), *(key for key in begun if key in wholes)]


@dataclass(frozen=True)
class _Part:
    """The rows of some files, and how many had no answer left."""

    rows: list[_Row]
    dropped: int
    total: int


def _key(turns: Sequence[Turn]) -> bytes:
    return same_text(*(part for turn in turns for part in (turn.role, turn.content)))


def _encoded(tokenizer: Any, source: Dialogues, length: int) -> _Part:
    rows, dropped = [], None
    for turns, place in zip(source.turns, source.places):
        try:
            found = encode_conversation(tokenizer, turns, length, place)
        except NoAnswerLeftError as error:
            dropped = dropped or error
            continue
        rows.append(_Row(turns, found, token_ids(tokenizer, prompt_of(tokenizer, turns[:-1])), tokenizer.unk_token_id))
    if dropped is not None and not rows:
        raise DataError(f"{dropped}, and in no other row") from None
    return _Part(rows, len(source.turns) - len(rows), len(source.turns))


def _shortened(parts: Sequence[_Part], length: int, why: str) -> list[str]:
    """Notes on rows that are too long."""
    total, dropped = sum(part.total for part in parts), sum(part.dropped for part in parts)
    cut = sum(row.encoded.cut > 0 for part in parts for row in part.rows)
    notes = []
    if cut:
        notes.append(f"{cut} of {total} conversations are longer than {length} tokens and lost their start ({why})")
    if dropped:
        notes.append(f"{dropped} of {total} conversations have no whole answer in {length} tokens and were left out ({why})")
    return notes


def _parts(rows: Sequence[_Row], origins: Sequence[str], seed: int, name: str) -> tuple[dict[str, list[_Row]], list[str]]:
    """The three parts, and notes; what a separate file does not give is held out, in groups of rows that belong together."""
    wholes = {row.whole for row in rows}
    firsts = first_of_each([row.keys(wholes) for row in rows])
    parts: dict[str, list[_Row]] = {"train": [], "validation": [], "test": []}
    held: dict[int, str] = {}
    for origin in ("validation", "test"):
        held.update({first: origin for first, own in zip(firsts, origins) if own == origin})
    groups: dict[int, list[_Row]] = {}
    seen: set[tuple[str, bytes]] = set()
    repeated = shared = 0
    for row, first, origin in zip(rows, firsts, origins):
        if held.get(first, origin) != origin:
            shared += 1
        elif (origin, row.whole) in seen:
            repeated += 1
        else:
            seen.add((origin, row.whole))
            if origin == "train":
                groups.setdefault(first, []).append(row)
            else:
                parts[origin].append(row)
    notes = []
    if repeated:
        notes.append(f"{repeated} duplicate conversations were left out (they may differ in case, spaces or Unicode form)")
    if shared:
        notes.append(f"{shared} conversations have the prompt of one in a separate file and were left out of the other parts")
    order = sorted(groups)
    random.Random(f"{seed}/instruct").shuffle(order)
    for part, share in (("test", 5), ("validation", 8)):
        if part in origins:
            if not parts[part]:
                raise DataError(f"nothing is left of the {part} file: all of its prompts are in the test file")
            continue
        count = max(1, len(groups) // share)
        parts[part] = [row for first in order[:count] for row in groups[first]]
        order = order[count:]
    parts["train"] = [row for first in order for row in groups[first]]
    if not parts["train"] or not parts["validation"]:
        need = 3 - len({"validation", "test"} & set(origins))
        raise DataError(f"{name} has {len(groups)} different prompts that are in no separate file; at least {need} are needed")
    return parts, notes


def _dataset(rows: Sequence[_Row]) -> Any:
    return datasets_module().Dataset.from_dict(
        {
            "input_ids": [row.encoded.input_ids for row in rows],
            "labels": [row.encoded.labels for row in rows],
            "prompt": [row.prompt for row in rows],
            "asked": [row.turns[-2].content for row in rows],
            "answer": [row.answer for row in rows],
        }
    )


def _example(tokenizer: Any, row: dict[str, Any]) -> str:
    """The first row in one line; what is not trained on stands in « »."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"]):
        if not runs or runs[-1][0] != (label == IGNORED):
            runs.append((label == IGNORED, []))
        runs[-1][1].append(token)
    texts = [(masked, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for masked, ids in runs[:6]]
    texts = [(masked, text) for masked, text in texts if text.strip()]
    parts = [f"«{shown(text, 160)[1:-1]}»" if masked else shown(text, 160)[1:-1] for masked, text in texts]
    return f"{' '.join(parts)}{' ...' if len(runs) > 6 else ''} (what stands in « » is read, not trained on)"
