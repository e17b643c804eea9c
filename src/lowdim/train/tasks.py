"""Tasks: text classification or language modelling, with datasets, loss and score in one object."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowdim.errors import DataError, MissingExtraError, shown
from lowdim.models.padding import padding_side
from lowdim.surgery import model_device
from lowdim.train.data import Examples, Used, read_documents, read_examples
from lowdim.train.inputs import Inputs, encode
from lowdim.train.metrics import Metric, classification_score
from lowdim.train.overlap import overlap_note
from lowdim.train.repeats import same_text, same_tokens
from lowdim.train.splits import places
from lowdim.train.unseen import Unseen, left_out

__all__ = ["Score", "Task", "classification", "language_modelling", "stack_blocks"]


class Score(NamedTuple):
    """A model's score on one part.

    Attributes:
        value: of the metric.
        hits: 1 or 0 for each row, right or wrong, in the order of the part; empty for language models.
    """

    value: float
    hits: tuple[int, ...] = ()


@dataclass
class Task:
    """Tokenised parts of the data, and the scoring of a model on them.

    Attributes:
        kind: `"classify"` or `"causal-lm"`.
        train, validation, test: `datasets.Dataset` with `input_ids` (and `labels`, `token_type_ids`).
        collate: rows -> batch of tensors.
        classes: names of the classes (empty for language models).
        notes: columns that are not used, and texts that were left out or truncated.
        columns: what the columns of each file or stream are used for.
        example: the first training row as the model sees it, in one line.
        joint: what stands between the texts of a pair; `""` if the tokenizer puts it there, None for single texts.
    """

    kind: str
    train: Any
    validation: Any
    test: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    max_length: int
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    name: str = ""
    evaluation_batch: int = field(default=50)
    columns: tuple[Used, ...] = ()
    example: str = ""
    joint: str | None = None

    def data_record(self) -> dict[str, Any]:
        """What records hold about the data."""
        return {
            "name": self.name,
            **self.sizes(),
            "labels": list(self.classes),
            "columns": [used.to_dict() for used in self.columns],
            "example": self.example,
            "notes": list(self.notes),
            **({} if self.joint is None else {"joint": self.joint}),
        }

    def remarks(self) -> list[tuple[str, str]]:
        """What the user should read before training, each line with its kind: the columns, the notes, one example."""
        told = [("data", used.sentence) for used in self.columns if used.sentence not in self.notes]
        example = [("example", self.example)] if self.example else []
        return [*told, *(("note", note) for note in self.notes), *example]

    @property
    def num_labels(self) -> int:
        """The number of outputs of the head."""
        return max(2, len(self.classes))

    def sizes(self) -> dict[str, int]:
        """Rows in each part; a stream is not counted."""
        train = {"train": len(self.train)} if isinstance(self.train, Sized) else {}
        return {**train, "validation": len(self.validation), "test": len(self.test)}

    def sample_batches(self, count: int, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The first training rows, for methods that need data before training."""
        rows = list(itertools.islice(iter(self.train), count * batch_size))
        for start in range(0, len(rows), batch_size):
            batch = self.collate(rows[start : start + batch_size])
            yield {key: value.to(device) for key, value in batch.items()}

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """The number over which the loss of a batch is a mean: rows with a label, or tokens that are predicted and count."""
        labels = batch["labels"]
        return int((labels if self.kind == "classify" else labels[:, 1:]).ne(-100).sum())

    @staticmethod
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's own loss on a batch with labels."""
        return model(**batch).loss

    def evaluate(self, model: nn.Module, part: Any, metric: Metric) -> float:
        """The value of `score`."""
        return self.score(model, part, metric).value

    @torch.no_grad()
    def score(self, model: nn.Module, part: Any, metric: Metric) -> Score:
        """The score of a model on one part, in evaluation mode; NaN if an output is not finite."""
        device, was_training = model_device(model), model.training
        model.eval()
        order = sorted(range(len(part)), key=lambda i: len(part[i]["input_ids"]))
        labels, predictions, loss, tokens = [], [], 0.0, 0
        try:
            for start in range(0, len(order), self.evaluation_batch):
                rows = [part[i] for i in order[start : start + self.evaluation_batch]]
                batch = {key: value.to(device) for key, value in self.collate(rows).items()}
                output = model(**batch)
                if not bool(torch.isfinite(output.logits).all()):
                    return Score(math.nan)
                if self.kind == "classify":
                    labels += batch["labels"].tolist()
                    predictions += output.logits.argmax(-1).tolist()
                else:
                    count = self.count_items(batch)
                    loss, tokens = loss + float(output.loss) * count, tokens + count
        finally:
            model.train(was_training)
        if self.kind == "classify":
            right = dict(zip(order, (int(a == b) for a, b in zip(labels, predictions))))
            hits = tuple(right[i] for i in range(len(part)))
            return Score(classification_score(metric.name, labels, predictions), hits)
        mean = loss / max(1, tokens)
        return Score(mean if metric.name == "loss" else math.exp(min(mean, 50.0)))


def classification(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    segments: bool | None = None,
) -> Task:
    """A classification task from labelled files.

    Pairs of texts are read as one input each (`lowdim.train.inputs`). No text is in two parts (`lowdim.train.splits`).

    Args:
        evaluation: a separate test file; otherwise part of the data is held out.
        text: the column of the text, or two with a comma for pairs; None detects them.
        max_length: tokens kept of each text; longer ones are cut and counted.
        most: maximum number of tokens that the model can read (`lowdim.models.longest_text`).
        limit: maximum number of training texts, with at least one of each class.
        segments: whether the model reads `token_type_ids` of pairs; None: if the tokenizer gives them.

    Raises:
        DataError, UnknownNameError: see `lowdim.train.data`.
    """
    examples = read_examples(files, text=text, label=label)
    held = None if evaluation is None else read_examples([evaluation], text=text, label=label, classes=examples.classes)
    if held is not None and bool(held.others) != bool(examples.others):
        kinds = ["pairs of texts" if part.others else "single texts" for part in (examples, held)]
        raise DataError(f"{_name(files)} has {kinds[0]}, {evaluation} {kinds[1]}; name the same columns for both with --text")
    length = max_length if most is None else min(max_length, most)
    inputs = encode(tokenizer, examples.texts, examples.others, length=length, segments=segments)
    apart = None if held is None else encode(tokenizer, held.texts, held.others, length=length, segments=segments)
    unknown = tokenizer.unk_token_id if _unfit(examples, inputs, tokenizer.unk_token_id) else None
    tokens, held_tokens = (
        [] if part is None else [same_tokens(ids, unknown) for ids in part.ids()] for part in (inputs, apart)
    )
    parts = places(examples, tokens=tokens, test=held, test_tokens=held_tokens, seed=seed)
    train = parts.train if limit is None else _first(parts.train, examples.labels, limit)
    notes = [*examples.notes, *(held.notes if held else ()), *parts.notes]
    notes += _indistinct(inputs, [*parts.train, *parts.validation, *parts.test])
    seen = [part for part in (inputs, apart) if part is not None]
    cut, total = sum(part.cut for part in seen), sum(map(len, seen))
    if cut:
        why = "--max-length" if length == max_length else "the model reads no more"
        notes.append(f"{cut} of {total} texts are longer than {length} tokens and were cut ({why})")
    learn, choose = (_rows(inputs, examples, where) for where in (train, parts.validation))
    return Task(
        "classify",
        learn,
        choose,
        _rows(inputs, examples, parts.test) if held is None or apart is None else _rows(apart, held, range(len(held))),
        _Pad(tokenizer.pad_token_id or 0, padding_side(tokenizer)),
        length,
        examples.classes,
        tuple(notes),
        _name(files),
        columns=(*examples.columns, *(held.columns if held else ())),
        example=f"{example_text(tokenizer, learn)} -> {shown(examples.classes[learn[0]['labels']])}",
        joint=inputs.joint,
    )


def language_modelling(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    text: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Task:
    """Language modelling on text files: documents are joined by the end token and cut into blocks of `max_length`.

    Args: see `classification`.

    A document is read once (`lowdim.train.unseen`). Held-out blocks are contiguous, at the end of the text, so that
    neighbouring blocks do not leak.

    Raises:
        DataError: no text, or fewer than three blocks of it.
    """
    datasets = _datasets()
    found = read_documents(files, text=text)
    held_found = None if evaluation is None else read_documents([evaluation], text=text)
    notes = [*found.notes, *(held_found.notes if held_found else ())]
    if most is not None and most < max_length:
        notes.append(f"blocks have {most} tokens, not {max_length}: the model reads no more")
        max_length = most
    unseen = Unseen(tokenizer)
    held = _blocks(unseen.apart((text, True) for text in held_found.texts), max_length) if held_found else []
    blocks = _blocks(unseen.ids((text, True) for text in found.texts), max_length)
    notes += left_out(unseen.repeated, unseen.held_out)
    if evaluation is None:
        if len(blocks) < 3:
            raise DataError(
                f"{_name(files)} gives {len(blocks)} blocks of {max_length} tokens; at least 3 are needed (--max-length)"
            )
        test_count, validation_count = max(1, len(blocks) // 5), max(1, len(blocks) // 8)
        held = blocks[len(blocks) - test_count :]
        rest = blocks[: len(blocks) - test_count]
    else:
        unseen.check(evaluation)
        rest, validation_count = blocks, max(1, len(blocks) // 8)
        if len(rest) < 2 or not held:
            raise DataError(
                f"{_name(files)} and {evaluation} give too little text for blocks of {max_length} tokens (--max-length)"
            )
    train, chosen = rest[: len(rest) - validation_count], rest[len(rest) - validation_count :]
    notes += overlap_note(train, [*chosen, *held], len(tokenizer))
    random.Random(f"{seed}/blocks").shuffle(train)
    learn, choose, report = (datasets.Dataset.from_dict({"input_ids": p, "labels": p}) for p in (train[:limit], chosen, held))
    return Task(
        "causal-lm",
        learn,
        choose,
        report,
        stack_blocks,
        max_length,
        (),
        tuple(notes),
        _name(files),
        evaluation_batch=16,
        columns=(*found.columns, *(held_found.columns if held_found else ())),
        example=example_text(tokenizer, learn),
    )


def _rows(inputs: Inputs, examples: Examples, where: Sequence[int]) -> Any:
    """The examples at these places as a dataset."""
    import pyarrow as pa

    datasets = _datasets()
    where = list(where)
    columns = {name: column.take(pa.array(where, pa.int64())) for name, column in inputs.columns.items()}
    labels = pa.array([examples.labels[i] for i in where], pa.int64())
    return datasets.Dataset(pa.table({**columns, "labels": labels}))


def _unfit(examples: Examples, inputs: Inputs, unknown: int | None) -> bool:
    """Whether more than a tenth of the texts differ only in words that the tokenizer does not know.

    They are then compared by their characters: they are not the same, and few would be left.
    """
    if unknown is None:
        return False
    vague = [(same_text(*texts), same_tokens(ids)) for texts, ids in zip(examples.each(), inputs.ids()) if unknown in ids]
    texts, tokens = (len(set(keys)) for keys in zip(*vague)) if vague else (0, 0)
    return texts - tokens > len(examples) // 10


def _indistinct(inputs: Inputs, where: Sequence[int]) -> list[str]:
    """A note on texts that are the same to the model, though they are not."""
    kept = set(where)
    same = len(kept) - len({same_tokens(ids) for i, ids in enumerate(inputs.ids()) if i in kept})
    if not same:
        return []
    return [f"{same} texts have the tokens of another text, since the tokenizer does not know the words that they differ in"]


def _first(train: Sequence[int], labels: Sequence[int], limit: int) -> list[int]:
    """The first `limit` training examples, with one of each class before others."""
    firsts = set({labels[i]: at for at, i in reversed(list(enumerate(train)))}.values())
    if limit < len(firsts):
        raise DataError(f"limit must be at least {len(firsts)}, one example of each class; got {limit}")
    others = [at for at in range(len(train)) if at not in firsts]
    return [train[at] for at in sorted([*firsts, *others[: limit - len(firsts)]])]


def example_text(tokenizer: Any, part: Any) -> str:
    """The first row of a part as the model sees it, cut to a line."""
    return shown(tokenizer.decode(part[0]["input_ids"], clean_up_tokenization_spaces=False), 160)


class _Pad:
    """Pads rows to the longest of the batch."""

    def __init__(self, pad: int, side: str):
        self.pad, self.side = pad, side

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        types = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            where = slice(longest - count, None) if self.side == "left" else slice(0, count)
            ids[i, where] = torch.tensor(row["input_ids"])
            mask[i, where] = 1
            types[i, where] = torch.tensor(row.get("token_type_ids", 0))
        segments = {"token_type_ids": types} if "token_type_ids" in rows[0] else {}
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, **segments, "labels": labels}


def stack_blocks(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks of one length as a batch; the labels are the inputs."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def _blocks(documents: Iterable[list[int]], length: int) -> list[list[int]]:
    stream = list(itertools.chain.from_iterable(documents))
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def _name(files: Sequence[str | Path]) -> str:
    names = [Path(f).name for f in files]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "training") from None
    return datasets
