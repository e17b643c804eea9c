"""Text for pretraining: documents joined by the end token and cut into blocks, from files or from any source of `datasets`.

Files are packed once into a memory-mapped table, so a run can read its blocks in any order and continue at any of them. A
source `datasets:PATH[:CONFIG[:SPLIT]]` is streamed: blocks are packed during training, and nothing is stored.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowdim.errors import DataError, MissingExtraError
from lowdim.train.data import read_texts, text_column
from lowdim.train.tables import locate, read_text
from lowdim.train.tasks import Task, stack_blocks

__all__ = ["is_source", "packed", "pretraining", "training_text"]

#: A text, and whether a document ends with it.
Piece = tuple[str, bool]

PREFIX = "datasets:"
_TEXT = (".txt", ".text", ".md")
_BATCH = 64  # pieces per call of the tokenizer
_PIECE = 2**16  # bytes of a text file that are tokenised at once
_LARGE = 2**28  # files of this size or more are checked while reading, not before
#: Held-out blocks: the first ones of a stream; of files a twentieth each for validation and test, at most this many.
STREAM_HELD, FILE_HELD = 64, 512
_BUFFER = 1024  # blocks in the shuffle buffer of a stream


def is_source(name: str | Path) -> bool:
    """Whether this names a source of `datasets` rather than a file."""
    return str(name).startswith(PREFIX)


def packed(documents: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Blocks of `length` tokens from documents that each end with the tokenizer's end token; the rest at the end is dropped.

    Example:
        >>> from lowdim.train.packing import packed
        >>> from lowdim.train.tokenizers import byte_tokenizer
        >>> list(packed(["abc", "de"], byte_tokenizer(), 3))
        [[97, 98, 99], [256, 100, 101]]
    """
    return _packed(((document, True) for document in documents), tokenizer, length)


def _packed(pieces: Iterable[Piece], tokenizer: Any, length: int) -> Iterator[list[int]]:
    rest: list[int] = []
    mark = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    walk = iter(pieces)
    while batch := list(itertools.islice(walk, _BATCH)):
        texts = [text for text, _ in batch]
        rows = tokenizer(texts, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
        for ids, (_, ends) in zip(rows, batch):
            rest += ids
            if ends:
                rest += mark
        whole = len(rest) // length * length
        for start in range(0, whole, length):
            yield rest[start : start + length]
        rest = rest[whole:]


def pretraining(
    tokenizer: Any,
    sources: Sequence[str | Path],
    *,
    length: int = 256,
    evaluation: str | Path | None = None,
    text: str | None = None,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    cache: str | Path | None = None,
    streaming: bool | None = None,
) -> Task:
    """Language modelling on large amounts of text.

    Args:
        sources: files, or one source of `datasets`.
        length: tokens of a block, at most `most`, the model's context length.
        evaluation: a separate test file.
        text: name of the text column.
        limit: maximum number of training blocks.
        cache: folder for packed files; None uses that of `datasets`.
        streaming: pack while training instead of before it; by default for sources of `datasets` only.

    Raises:
        DataError: a file is missing, empty, binary or not UTF-8; too little text for the blocks; files together with a source.
        UnknownNameError: the text column cannot be found.
    """
    notes: list[str] = []
    if most is not None and most < length:
        notes.append(f"blocks have {most} tokens, not {length}: the model reads no more")
        length = most
    files = [name for name in sources if not is_source(name)]
    if files and len(files) < len(sources):
        raise DataError(f"data must be files or a source of datasets; got both: {', '.join(map(str, sources))}")
    if len(sources) - len(files) > 1:
        raise DataError(f"data must name one source of datasets at a time; got {len(sources)}")
    held = None
    if evaluation is not None:
        held = _table(_Files([evaluation], text, notes), tokenizer, length, cache)
        if len(held) == 0:
            raise DataError(f"{evaluation} is shorter than a block of {length} tokens")
    if files:
        label, texts = _label(files), _Files(files, text, notes)
        if streaming:
            parts = _stream_parts(texts, tokenizer, length, seed, held, label, limit)
        else:
            parts = _table_parts(_table(texts, tokenizer, length, cache), held, label, length, seed, limit)
    else:
        label = str(sources[0])
        if streaming is False:
            raise DataError(f"streaming=False is for files; {label} is streamed")
        parts = _stream_parts(lambda: _streamed(label, text), tokenizer, length, seed, held, label, limit)
    learn, choose, report = parts
    return Task("causal-lm", learn, choose, report, stack_blocks, length, (), tuple(notes), label, evaluation_batch=16)


def training_text(sources: Sequence[str | Path], text: str | None = None) -> Iterator[str]:
    """The documents of files, for a vocabulary of their characters.

    Raises:
        DataError: a source of `datasets`, whose text is not known in advance.
    """
    if any(map(is_source, sources)):
        raise DataError(f"tokenizer characters needs all text in advance, which {sources[0]} does not give; use bytes")
    yield from read_texts(sources, text=text)[0]


def _label(files: Sequence[str | Path]) -> str:
    names = [Path(str(f).removeprefix("lowdim:")).name for f in files]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class _Files:
    """The documents of files that were checked before; a text file is one document, read in pieces."""

    def __init__(self, files: Sequence[str | Path], text: str | None, notes: list[str]):
        self.files, self.text = [locate(f) for f in files], text
        for path in self.files:
            if path.suffix.lower() not in _TEXT:
                notes += [n for n in read_texts([path], text=text)[1] if n not in notes]
            elif not path.is_file() or path.stat().st_size < _LARGE:
                read_text(path)

    def __call__(self) -> Iterator[Piece]:
        for path in self.files:
            if path.suffix.lower() in _TEXT:
                yield from _pieces(path)
            else:
                yield from ((document, True) for document in read_texts([path], text=self.text)[0])

    def digest(self) -> str:
        """Of the contents."""
        found = hashlib.blake2b(repr(self.text).encode(), digest_size=12)
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
        return found.hexdigest()


def _pieces(path: Path) -> Iterator[Piece]:
    """A text file in pieces that end at a line break, if there is one."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, place = "", 0
    with path.open("rb") as file:
        while True:
            raw = file.read(_PIECE)
            try:
                rest += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8: near byte {place + error.start}") from None
            place += len(raw)
            if not raw:
                break
            cut = rest.rfind("\n") + 1 or (len(rest) if len(rest) > 4 * _PIECE else 0)
            if cut:
                yield rest[:cut], False
                rest = rest[cut:]
    yield rest, True


def _streamed(source: str, text: str | None) -> Iterator[Piece]:
    """The texts of a source of `datasets`, row by row."""
    path, _, rest = source.removeprefix(PREFIX).partition(":")
    config, _, part = rest.partition(":")
    load = _datasets().load_dataset
    try:
        rows = load(path, config or None, split=part or "train", streaming=True)
        walk = iter(rows)
        first = next(walk)
    except StopIteration:
        raise DataError(f"{source} has no rows") from None
    except Exception as error:  # the library raises various errors for a missing source
        raise DataError(f"{source} cannot be read ({' '.join(str(error).split())[:200]})") from error
    column = text_column([first], text, source)
    for row in itertools.chain([first], walk):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            yield value, True


def _table(files: _Files, tokenizer: Any, length: int, cache: str | Path | None) -> Any:
    """All blocks as a memory-mapped table, packed once for these contents, this tokenizer and this length."""
    datasets = _datasets()
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    key = hashlib.blake2b(f"{length}/{tokenizer.eos_token_id}/{words}".encode(), digest_size=12).hexdigest()
    key = hashlib.blake2b(f"{key}/{files.digest()}".encode(), digest_size=12).hexdigest()
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})

    def blocks() -> Iterator[dict[str, list[int]]]:
        for row in _packed(files(), tokenizer, length):
            yield {"input_ids": row}

    if next(blocks(), None) is None:  # which the library treats as an error
        return datasets.Dataset.from_dict({"input_ids": []}, features=features)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        place = None if cache is None else str(cache)
        return datasets.Dataset.from_generator(blocks, features=features, cache_dir=place, fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    finally:
        if bars:
            datasets.enable_progress_bars()


def _table_parts(table: Any, held: Any, label: str, length: int, seed: int, limit: int | None) -> tuple[Any, Any, Any]:
    count, share = len(table), max(1, min(FILE_HELD, len(table) // 20))
    last = 0 if held is not None else share
    if count < share + last + 1:
        raise DataError(f"{label} gives {count} blocks of {length} tokens; at least {2 + bool(last)} are needed (--max-length)")
    train = count - share - last
    order = torch.randperm(train, generator=torch.Generator().manual_seed(seed))[: limit or train].tolist()
    report = held if held is not None else table.select(range(count - last, count))
    return table.select(order), table.select(range(train, train + share)), report


def _stream_parts(
    make: Callable[[], Iterator[Piece]], tokenizer: Any, length: int, seed: int, held: Any, label: str, limit: int | None
) -> tuple[Any, Any, Any]:
    """The first blocks are held out; all others are repeated endlessly, shuffled within a buffer."""
    datasets = _datasets()
    apart = STREAM_HELD if held is not None else 2 * STREAM_HELD
    first = list(itertools.islice(_packed(make(), tokenizer, length), apart + 1))
    if len(first) <= apart:
        apart = len(first) // 3 * (1 if held is not None else 2)
        if apart < 1 or len(first) < 3:
            raise DataError(f"{label} gives {len(first)} blocks of {length} tokens; at least 3 are needed (--max-length)")
    kept = [{"input_ids": row} for row in first[:apart]]
    choose = kept if held is not None else kept[: apart // 2]

    def rows() -> Iterator[dict[str, list[int]]]:
        while True:
            blocks = itertools.islice(_packed(make(), tokenizer, length), apart, None if limit is None else apart + limit)
            for row in blocks:
                yield {"input_ids": row}

    stream = datasets.IterableDataset.from_generator(rows).shuffle(seed=seed, buffer_size=min(_BUFFER, limit or _BUFFER))
    table = datasets.Dataset.from_list
    return stream, table(choose), held if held is not None else table(kept[apart // 2 :])


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", "training") from None
    return datasets
