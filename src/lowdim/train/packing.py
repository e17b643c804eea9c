"""Text for pretraining: documents joined by the end token and cut into blocks, from files or from any source of `datasets`.

Files are packed once into a memory-mapped table, so a run can read its blocks in any order and continue at any of them. A
source `datasets:PATH[:CONFIG[:SPLIT]]` is streamed: blocks are packed during training, and nothing is stored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowdim.errors import DataError
from lowdim.train.data import read_texts
from lowdim.train.overlap import overlap_note
from lowdim.train.streams import StreamSource, datasets_module, is_source
from lowdim.train.tasks.base import example_text
from lowdim.train.tasks.causal_lm import stack_blocks
from lowdim.train.tasks.pretrain import Pretraining
from lowdim.train.text_files import TextFiles
from lowdim.train.unseen import Piece, Unseen, left_out

__all__ = ["is_source", "packed", "pretraining", "training_text"]

#: Held-out blocks: the first ones of a stream; of files a twentieth each for validation and test, at most this many.
STREAM_HELD, FILE_HELD = 64, 512
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
    validation: str | Path | None = None,
    text: str | None = None,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    cache: str | Path | None = None,
    streaming: bool | None = None,
) -> Pretraining:
    """Language modelling on large amounts of text.

    Args:
        sources: files, or one source of `datasets`.
        length: tokens of a block, at most `most`, the model's context length.
        evaluation, validation: separate files; otherwise the last blocks, or of a stream the first, are held out.
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
    test = None if evaluation is None else TextFiles([evaluation], text)
    choice = None if validation is None else TextFiles([validation], text, test)
    held = None if test is None else _separate(test, tokenizer, length, cache, str(evaluation))
    chosen = None if choice is None else _separate(choice, tokenizer, length, cache, str(validation), test)
    separate = [name for name in (evaluation, validation) if name is not None]
    apart = TextFiles(separate, text) if separate else None
    if files:
        label, source = _label(files), TextFiles(files, text, apart)
        if streaming:
            parts, left = _stream_parts(source, apart, tokenizer, length, seed, held, chosen, label, limit), []
        else:
            table, left = _table(source, tokenizer, length, cache, apart)
            parts, train = _table_parts(table, held, chosen, label, length, seed, limit)
            left += overlap_note(_rows(train), [*_rows(parts[1]), *_rows(parts[2])], len(tokenizer))
    else:
        label, source = str(sources[0]), StreamSource(str(sources[0]), text)
        if streaming is False:
            raise DataError(f"streaming=False is for files; {label} is streamed")
        parts = _stream_parts(source, apart, tokenizer, length, seed, held, chosen, label, limit)
        left = [f"duplicates of the first {_REMEMBERED // 2:,} documents of {label} are left out while it is read"]
    learn, choose, report = parts
    for part in (source, apart):
        notes += [note for note in (part.notes if part is not None else ()) if note not in notes]
    return Pretraining(
        train=learn,
        validation=choose,
        test=report,
        collate=stack_blocks,
        max_length=length,
        notes=(*notes, *left),
        name=label,
        columns=(*source.columns, *(apart.columns if apart is not None else ())),
        example=example_text(tokenizer, choose),
        processor=tokenizer,
    )


def _separate(
    files: TextFiles, tokenizer: Any, length: int, cache: str | Path | None, name: str, apart: TextFiles | None = None
) -> Any:
    """The blocks of a test or validation file.

    Raises:
        DataError: it has none.
    """
    table, _ = _table(files, tokenizer, length, cache, apart)
    if len(table) == 0:
        raise DataError(f"{name} is shorter than a block of {length} tokens (--max-length)")
    return table


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


def _table(
    files: TextFiles, tokenizer: Any, length: int, cache: str | Path | None, apart: TextFiles | None = None
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


def _unseen(tokenizer: Any, apart: TextFiles | None, most: int | None = None) -> Unseen:
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
    table: Any, held: Any, chosen: Any, label: str, length: int, seed: int, limit: int | None
) -> tuple[tuple[Any, Any, Any], Any]:
    """The three parts, and the blocks that training is drawn from, in the order of the text."""
    count, share = len(table), max(1, min(FILE_HELD, len(table) // 20))
    last, middle = (0 if part is not None else share for part in (held, chosen))
    need = 1 + bool(last) + bool(middle)
    if count < need:
        raise DataError(f"{label} gives {count} blocks of {length} tokens; at least {need} are needed (--max-length)")
    train = count - middle - last
    order = torch.randperm(train, generator=torch.Generator().manual_seed(seed))[: limit or train].tolist()
    report = held if held is not None else table.select(range(count - last, count))
    choose = chosen if chosen is not None else table.select(range(train, train + middle))
    return (table.select(order), choose, report), table.select(range(train))


def _stream_parts(
    source: Callable[[], Iterator[Piece]],
    test: TextFiles | None,
    tokenizer: Any,
    length: int,
    seed: int,
    held: Any,
    chosen: Any,
    label: str,
    limit: int | None,
) -> tuple[Any, Any, Any]:
    """The first blocks are held out; all others are repeated endlessly, shuffled within a buffer.

    A document is read once in each pass, as far as it is remembered, so that none that is held out is trained on.
    """

    def blocks() -> Iterator[list[int]]:
        return _packed(_unseen(tokenizer, test, _REMEMBERED).ids(source()), length)

    datasets = datasets_module()
    needed = (held is None) + (chosen is None)  # parts that the stream gives
    share = STREAM_HELD
    first = list(itertools.islice(blocks(), needed * share + 1))
    if len(first) <= needed * share:
        share = len(first) // 3
        if len(first) < 3:
            raise DataError(f"{label} gives {len(first)} blocks of {length} tokens; at least 3 are needed (--max-length)")
    apart = needed * share
    kept = [{"input_ids": row} for row in first[:apart]]

    def rows() -> Iterator[dict[str, list[int]]]:
        while True:
            for row in itertools.islice(blocks(), apart, None if limit is None else apart + limit):
                yield {"input_ids": row}

    stream = datasets.IterableDataset.from_generator(rows).shuffle(seed=seed, buffer_size=min(_BUFFER, limit or _BUFFER))
    table = datasets.Dataset.from_list
    choose = chosen if chosen is not None else table(kept[:share])
    return stream, choose, held if held is not None else table(kept[apart - share :])
