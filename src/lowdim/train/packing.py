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

from lowdim.errors import DataError
from lowdim.train.data import TEXT_FILES, Used, read_documents, read_texts
from lowdim.train.overlap import overlap_note
from lowdim.train.repeats import Repeats, same_text
from lowdim.train.streams import StreamSource, datasets_module, is_source
from lowdim.train.tables import locate, read_text
from lowdim.train.tasks import Task, example_text, stack_blocks
from lowdim.train.unseen import Piece, Unseen, left_out

__all__ = ["is_source", "packed", "pretraining", "training_text"]

#: Held-out blocks: the first ones of a stream; of files a twentieth each for validation and test, at most this many.
STREAM_HELD, FILE_HELD = 64, 512
_PIECE = 2**16  # bytes of a text file that are tokenized at once
_LARGE = 2**28  # text files of this size or more are checked while reading, not before
_BUFFER = 1024  # blocks in the shuffle buffer of a stream
_REMEMBERED = 2**18  # documents of a stream that are not trained on again


def packed(documents: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Blocks of `length` tokens from documents that each end with the tokenizer's end token; the rest at the end is dropped.

    Example:
        >>> from lowdim.train.packing import packed
        >>> from lowdim.train.tokenizers import byte_tokenizer
        >>> list(packed(["abc", "de"], byte_tokenizer(), 3))
        [[97, 98, 99], [256, 100, 101]]
    """
    whole = Unseen(tokenizer).apart((document, True) for document in documents)
    return _packed(whole, length)


def _packed(pieces: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    rest: list[int] = []
    for ids in pieces:
        rest += ids
        whole = len(rest) // length * length
        for start in range(0, whole, length):
            yield rest[start : start + length]
        if whole:
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
    held, apart = None, None
    if evaluation is not None:
        apart = _Files([evaluation], text)
        held, _ = _table(apart, tokenizer, length, cache)
        if len(held) == 0:
            raise DataError(f"{evaluation} is shorter than a block of {length} tokens")
    if files:
        label, source = _label(files), _Files(files, text, apart)
        if streaming:
            parts, left = _stream_parts(source, apart, tokenizer, length, seed, held, label, limit), []
        else:
            table, left = _table(source, tokenizer, length, cache, apart)
            parts, train = _table_parts(table, held, label, length, seed, limit)
            left += overlap_note(_rows(train), [*_rows(parts[1]), *_rows(parts[2])], len(tokenizer))
    else:
        label, source = str(sources[0]), StreamSource(str(sources[0]), text)
        if streaming is False:
            raise DataError(f"streaming=False is for files; {label} is streamed")
        parts = _stream_parts(source, apart, tokenizer, length, seed, held, label, limit)
        left = [f"duplicates of the first {_REMEMBERED // 2:,} documents of {label} are left out while it is read"]
    learn, choose, report = parts
    for part in (source, apart):
        notes += [note for note in (part.notes if part is not None else ()) if note not in notes]
    return Task(
        "causal-lm",
        learn,
        choose,
        report,
        stack_blocks,
        length,
        (),
        (*notes, *left),
        label,
        evaluation_batch=16,
        columns=(*source.columns, *(apart.columns if apart is not None else ())),
        example=example_text(tokenizer, choose),
    )


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
    """The documents of files, which are checked at once; a text file is one document, read in pieces.

    Args:
        apart: files whose documents are held out; a text file with the same text is left out here.

    Attributes:
        notes, columns: see `lowdim.train.data.Documents`.
        repeated, held_out: text files that were left out, as another file, or one of `apart`, has the same text.
    """

    def __init__(self, files: Sequence[str | Path], text: str | None, apart: _Files | None = None):
        self.text, self._apart = text, apart
        self.files: list[Path] = []
        self.notes: list[str] = []
        self.columns: tuple[Used, ...] = ()
        self.held_out = 0
        self._known = Repeats()
        for path in map(locate, files):
            if path.suffix.lower() not in TEXT_FILES:
                found = read_documents([path], text=text)
                self.notes += [note for note in found.notes if note not in self.notes]
                self.columns += tuple(used for used in found.columns if used not in self.columns)
                self.files.append(path)
            elif self._new(path):
                self.files.append(path)

    @property
    def repeated(self) -> int:
        """Text files that another one has, too."""
        return self._known.left_out

    def _new(self, path: Path) -> bool:
        if path.is_file() and path.stat().st_size >= _LARGE:
            return True
        key = same_text(read_text(path))
        if self._apart is not None and self._apart.has(key):
            self.held_out += 1
            return False
        return self._known.add(key)

    def has(self, key: bytes) -> bool:
        """Whether one of the text files has this text."""
        return self._known.has(key)

    def __call__(self) -> Iterator[Piece]:
        """The documents in pieces."""
        for path in self.files:
            if path.suffix.lower() in TEXT_FILES:
                yield from _pieces(path)
            else:
                yield from ((document, True) for document in read_documents([path], text=self.text).texts)

    def digest(self) -> str:
        """Of the contents, and of those of the files that are held out."""
        found = hashlib.blake2b(repr(self.text).encode(), digest_size=12)
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
        return found.hexdigest() + (self._apart.digest() if self._apart is not None else "")


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


def _table(
    files: _Files, tokenizer: Any, length: int, cache: str | Path | None, apart: _Files | None = None
) -> tuple[Any, list[str]]:
    """All blocks as a memory-mapped table, packed once for these contents, this tokenizer and this length; and notes.

    Each row has the numbers of documents that were left out so far, so that a table from the cache knows them, too.
    """
    datasets = datasets_module()
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    key = hashlib.blake2b(f"once/{length}/{tokenizer.eos_token_id}/{words}".encode(), digest_size=12).hexdigest()
    key = hashlib.blake2b(f"{key}/{files.digest()}".encode(), digest_size=12).hexdigest()
    number = datasets.Value("int64")
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "repeated": number, "held_out": number})

    def blocks() -> Iterator[dict[str, Any]]:
        unseen = _unseen(tokenizer, apart)
        waiting = None
        for row in _packed(unseen.ids(files()), length):
            if waiting is not None:
                yield {"input_ids": waiting, "repeated": 0, "held_out": 0}
            waiting = row
        if waiting is not None:
            yield {"input_ids": waiting, "repeated": unseen.repeated, "held_out": unseen.held_out}
        elif apart is not None:
            unseen.check(apart.files[0])

    if next(blocks(), None) is None:  # which the library treats as an error
        return datasets.Dataset.from_dict(
            {"input_ids": []}, features=datasets.Features({"input_ids": features["input_ids"]})
        ), []
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        place = None if cache is None else str(cache)
        table = datasets.Dataset.from_generator(blocks, features=features, cache_dir=place, fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    last = table[-1]
    notes = left_out(last["repeated"] + files.repeated, last["held_out"] + files.held_out)
    return table.select_columns(["input_ids"]), notes


def _unseen(tokenizer: Any, apart: _Files | None, most: int | None = None) -> Unseen:
    """What tokenizes documents once, without those that are held out."""
    unseen = Unseen(tokenizer, most)
    for _ in unseen.apart(apart() if apart is not None else ()):
        pass
    return unseen


def _rows(table: Any) -> Iterator[Any]:
    """The blocks of a table, as arrays."""
    for batch in table.with_format("numpy").iter(1024):
        yield from batch["input_ids"]


def _table_parts(
    table: Any, held: Any, label: str, length: int, seed: int, limit: int | None
) -> tuple[tuple[Any, Any, Any], Any]:
    """The three parts, and the blocks that training is drawn from, in the order of the text."""
    count, share = len(table), max(1, min(FILE_HELD, len(table) // 20))
    last = 0 if held is not None else share
    if count < share + last + 1:
        raise DataError(f"{label} gives {count} blocks of {length} tokens; at least {2 + bool(last)} are needed (--max-length)")
    train = count - share - last
    order = torch.randperm(train, generator=torch.Generator().manual_seed(seed))[: limit or train].tolist()
    report = held if held is not None else table.select(range(count - last, count))
    return (table.select(order), table.select(range(train, train + share)), report), table.select(range(train))


def _stream_parts(
    source: Callable[[], Iterator[Piece]],
    test: _Files | None,
    tokenizer: Any,
    length: int,
    seed: int,
    held: Any,
    label: str,
    limit: int | None,
) -> tuple[Any, Any, Any]:
    """The first blocks are held out; all others are repeated endlessly, shuffled within a buffer.

    A document is read once in each pass, as far as it is remembered, so that none that is held out is trained on.
    """

    def blocks() -> Iterator[list[int]]:
        return _packed(_unseen(tokenizer, test, _REMEMBERED).ids(source()), length)

    datasets = datasets_module()
    apart = STREAM_HELD if held is not None else 2 * STREAM_HELD
    first = list(itertools.islice(blocks(), apart + 1))
    if len(first) <= apart:
        apart = len(first) // 3 * (1 if held is not None else 2)
        if apart < 1 or len(first) < 3:
            raise DataError(f"{label} gives {len(first)} blocks of {length} tokens; at least 3 are needed (--max-length)")
    kept = [{"input_ids": row} for row in first[:apart]]
    choose = kept if held is not None else kept[: apart // 2]

    def rows() -> Iterator[dict[str, list[int]]]:
        while True:
            for row in itertools.islice(blocks(), apart, None if limit is None else apart + limit):
                yield {"input_ids": row}

    stream = datasets.IterableDataset.from_generator(rows).shuffle(seed=seed, buffer_size=min(_BUFFER, limit or _BUFFER))
    table = datasets.Dataset.from_list
    return stream, table(choose), held if held is not None else table(kept[apart // 2 :])
