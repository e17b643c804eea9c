"""Tasks causal-lm: a language model on documents that are joined and cut into blocks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.errors import DataError
from lowdim.train.byte_counts import byte_counter
from lowdim.train.data import Documents, read_documents
from lowdim.train.generating import generate
from lowdim.train.metrics import METRICS, Metric
from lowdim.train.overlap import overlap_note
from lowdim.train.streams import datasets_module
from lowdim.train.tasks.base import Baseline, Score, Task, check_finite, data_name, example_text
from lowdim.train.unseen import Piece, Unseen, left_out

__all__ = ["LanguageModelling", "block_losses", "language_modelling", "perplexity", "stack_blocks"]

_LARGEST = 50.0  # a loss above this is printed as exp(50)
_COUNTED = 2**22  # training tokens whose frequencies are counted
_STREAMED = 8192  # blocks of a stream that are, which may be short and many
_BEGINNING, _CONTINUED = 24, 48  # tokens of a sample's prompt, and after it


@dataclass(kw_only=True)
class LanguageModelling(Task):
    """Blocks of text, of which every token is predicted; an outcome is `(summed loss, predicted tokens)` of a block."""

    kind: ClassVar[str] = "causal-lm"
    evaluation_batch: int = 16
    _frequencies: Any = field(default=None, init=False, repr=False)
    _bytes: Any = field(default=None, init=False, repr=False)

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """The tokens that are predicted and count."""
        return int(batch["labels"][:, 1:].ne(-100).sum())

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Loss of each block, and its number of tokens, or of bytes, that are predicted."""
        found = block_losses(model, batch)
        return self._by_bytes(found, batch["labels"]) if metric.name == "bits-per-byte" else found

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """Mean loss, perplexity or bits per byte; methods are judged by the loss of each block."""
        return perplexity(outcomes, metric)

    def baseline(self, part: Any, metric: Metric) -> Baseline | None:
        """Every token predicted by its frequency in the training text, whatever stands before it; each counts once more."""
        if not len(part):
            return None
        if self._frequencies is None:
            self._frequencies = _frequencies(self.train, len(self.processor))
        losses: list[tuple[float, int]] = []
        counted: list[tuple[float, int]] = []
        for row in part:
            wanted = torch.tensor([row["labels"] if "labels" in row else row["input_ids"]])
            predicted = wanted[0, 1:][wanted[0, 1:] >= 0]
            losses.append((-float(self._frequencies[predicted].sum()), len(predicted)))
            counted += self._by_bytes(losses[-1:], wanted)
        scores = {m.name: perplexity(counted if m.name == "bits-per-byte" else losses, m) for m in self.metrics()}
        said = ", ".join(f"{METRICS[name].title} {score.value:.3f}" for name, score in scores.items())
        return Baseline(
            "unigram",
            "Unigram",
            "predicting every token by its frequency in the training text",
            scores[metric.name],
            {name: score.value for name, score in scores.items()},
            f"predicting every token by its frequency in the training text gives {said}",
        )

    def samples(self, model: nn.Module, count: int = 5) -> list[dict[str, str]]:
        """How the model continues the beginnings of the first blocks of the test part."""
        blocks = [self.test[place]["input_ids"] for place in range(min(count, len(self.test)))]
        if not blocks or not hasattr(model, "generate"):
            return []
        begin = max(1, min(_BEGINNING, self.max_length // 2))
        most = min(_CONTINUED, self.max_length - begin)
        pad = self.processor.pad_token_id or 0
        written = generate(model, [block[:begin] for block in blocks], most=most, pad=pad)
        kinds = ("prompt", "answer", "expected")
        rows = ((block[:begin], ids, block[begin : begin + most]) for block, ids in zip(blocks, written))
        return [{kind: self._text(ids) for kind, ids in zip(kinds, row)} for row in rows]

    def _text(self, ids: Sequence[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _by_bytes(self, found: Sequence[tuple[float, int]], labels: Tensor) -> list[tuple[float, int]]:
        """Losses of blocks with their numbers of bytes in place of tokens."""
        if self._bytes is None:
            self._bytes = byte_counter(self.processor)
        return [(loss, self._bytes(row)) for (loss, _), row in zip(found, labels.tolist())]


def block_losses(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[float, int]]:
    """Summed cross entropy of the tokens that count, and their number, for each row.

    Raises:
        FloatingPointError: an output is not finite.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    check_finite(logits)
    labels = batch["labels"][:, 1:]
    found = []
    for row, wanted in zip(logits[:, :-1], labels):  # row by row: float32 copies of all logits would be large
        losses = torch.nn.functional.cross_entropy(row.float(), wanted, ignore_index=-100, reduction="sum")
        found.append((float(losses), int(wanted.ne(-100).sum())))
    return found


def perplexity(outcomes: Sequence[tuple[float, int]], metric: Metric) -> Score:
    """The mean loss of a part in nats per token, its exponential, or the loss in bits per byte.

    A block's value is its negative loss, weighted such that their mean is the negative mean loss.
    """
    items = max(1, sum(count for _, count in outcomes)) * (math.log(2) if metric.name == "bits-per-byte" else 1.0)
    mean = sum(loss for loss, _ in outcomes) / items
    values = tuple(-loss * len(outcomes) / items for loss, _ in outcomes)
    return Score(math.exp(min(mean, _LARGEST)) if metric.name == "perplexity" else mean, values)


def _frequencies(rows: Iterable[Any], vocabulary: int) -> Tensor:
    """The logarithm of each token's frequency in training, where each counts once more; of a stream, in its first blocks."""
    counts = torch.ones(vocabulary, dtype=torch.float64)
    seen = 0
    for row in rows if isinstance(rows, Sized) else itertools.islice(rows, _STREAMED):
        ids = torch.as_tensor(row["labels"] if "labels" in row else row["input_ids"])
        ids = ids[ids >= 0]
        counts += torch.bincount(ids, minlength=vocabulary)
        seen += len(ids)
        if seen >= _COUNTED:
            break
    return (counts / counts.sum()).log()


def load(recipe: Any, processor: Any, **keywords: Any) -> LanguageModelling:
    """The task of a recipe."""
    return language_modelling(processor, recipe.data, **keywords)


def language_modelling(
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
) -> LanguageModelling:
    """Language modelling on text files: documents are joined by the end token and cut into blocks of `max_length`.

    Args: see `classification`.

    A document is read once (`lowdim.train.unseen`). Held-out blocks are contiguous, at the end of the text, so that
    neighbouring blocks do not leak.

    Raises:
        DataError: no text, or fewer than three blocks of it.
    """
    datasets = datasets_module()
    notes: list[str] = []
    if most is not None and most < max_length:
        notes.append(f"blocks have {most} tokens, not {max_length}: the model reads no more")
        max_length = most
    found = read_documents(files, text=text)
    test, choice = (None if file is None else read_documents([file], text=text) for file in (evaluation, validation))
    apart = Unseen(tokenizer)
    held = _blocks(apart.apart(_whole(test)), max_length)
    chosen = _blocks(apart.ids(_whole(choice)), max_length)
    apart.check(evaluation, what="validation")
    unseen = Unseen(tokenizer)
    for _ in itertools.chain(unseen.apart(_whole(test)), unseen.apart(_whole(choice))):
        pass
    blocks = _blocks(unseen.ids(_whole(found)), max_length)
    reading = [part for part in (found, choice, test) if part is not None]
    notes = [*dict.fromkeys(note for part in reading for note in part.notes), *notes]
    notes += left_out(0, apart.held_out, what="validation")
    notes += left_out(unseen.repeated, unseen.held_out, "the test file" if validation is None else "a separate file")
    unseen.check(validation if evaluation is None else evaluation)
    test_count = 0 if evaluation is not None else max(1, len(blocks) // 5)
    validation_count = 0 if validation is not None else max(1, len(blocks) // 8)
    for option, file, count in (("--eval", evaluation, len(held)), ("--validation", validation, len(chosen))):
        if file is not None and not count:
            raise DataError(f"{option} {file} is shorter than a block of {max_length} tokens (--max-length)")
    need = 1 + bool(test_count) + bool(validation_count)
    if len(blocks) < need:
        raise DataError(
            f"{data_name(files)} gives {len(blocks)} blocks of {max_length} tokens; at least {need} are needed (--max-length)"
        )
    rest = blocks[: len(blocks) - test_count]
    held = held or blocks[len(rest) :]
    train = rest[: len(rest) - validation_count]
    chosen = chosen or rest[len(train) :]
    notes += overlap_note(train, [*chosen, *held], len(tokenizer))
    random.Random(f"{seed}/blocks").shuffle(train)
    learn, choose, report = (datasets.Dataset.from_dict({"input_ids": p, "labels": p}) for p in (train[:limit], chosen, held))
    return LanguageModelling(
        train=learn,
        validation=choose,
        test=report,
        collate=stack_blocks,
        max_length=max_length,
        notes=tuple(notes),
        name=data_name(files),
        columns=tuple(used for part in reading for used in part.columns),
        example=example_text(tokenizer, learn),
        processor=tokenizer,
    )


def stack_blocks(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of one length as a batch; the labels are the inputs."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def _whole(documents: Documents | None) -> Iterator[Piece]:
    return iter(()) if documents is None else ((text, True) for text in documents.texts)


def _blocks(documents: Iterable[list[int]], length: int) -> list[list[int]]:
    stream = list(itertools.chain.from_iterable(documents))
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
