"""What decides a run's numbers besides its settings, as checksums by name: the base model, the tokenizer and the data."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lowdim.checksums import checksum, checksums, file_checksum
from lowdim.errors import CheckpointError
from lowdim.train.packing import is_source
from lowdim.train.tables import locate
from lowdim.train.tasks.base import Task

__all__ = ["check_fingerprint", "fingerprint_of", "fingerprint_of_objects"]

#: Keys of a configuration that do not change what the model computes.
_INERT = ("_name_or_path", "transformers_version")


def fingerprint_of(
    model: nn.Module,
    processor: Any,
    task: Task,
    data: Iterable[str | Path],
    evaluation: str | Path | None = None,
    validation: str | Path | None = None,
    keep: str | Path | None = None,
    replaced: str | Path | None = None,
) -> dict[str, str]:
    """Checksums of the base model's configuration and weights, the tokenizer, and each data file.

    Of a source of `datasets`, which may be endless, the validation and test parts stand for the whole.

    Args:
        evaluation, validation: separate files.
        keep: the text that must not be forgotten.
        replaced: the model that is replaced, or the file of its vectors.
    """
    files = {f"data {name}": str(name) for name in data}
    others = {"test data": evaluation, "validation data": validation, "the text to keep": keep, "the old vectors of": replaced}
    files |= {f"{what} {name}": str(name) for what, name in others.items() if name is not None}
    found = _of_model(model, processor) | {what: _of_data(name, task) for what, name in files.items()}
    if task.kind == "instruct":
        found["the chat template"] = checksum([str(processor.chat_template).encode()])
    return found


def fingerprint_of_objects(model: nn.Module, task: Task) -> dict[str, str]:
    """Checksums of a model and a task that were given as Python objects: the rows of all parts, and the task's functions."""
    rows = (row for part in (task.train, task.validation, task.test) if isinstance(part, Sized) for row in _each(part))
    functions = sorted((name, value) for name, value in vars(task).items() if isinstance(value, FunctionType))
    return _of_model(model, task.processor) | {
        "the task's rows": checksum(piece for row in rows for piece in _pieces(row)),
        "the task's functions": checksum(piece for name, made in functions for piece in (name.encode(), *_code(made.__code__))),
    }


def check_fingerprint(now: Mapping[str, str], earlier: Mapping[str, str], folder: Path) -> None:
    """Check that a resumed run builds on what it was begun with.

    Raises:
        CheckpointError: something has changed; the error names it.
    """
    changed = [name for name, value in earlier.items() if now.get(name) != value]
    if changed:
        raise CheckpointError(
            f"--resume: {folder} was begun with other content of {', '.join(changed)}; "
            "restore that, or start anew in another folder with --out"
        )


def _of_model(model: nn.Module, processor: Any) -> dict[str, str]:
    found = {
        "the base model's configuration": _of_config(getattr(model, "config", None)),
        "the base model's weights": _of_weights(model),
    }
    if processor is None:
        return found
    return found | {"the tokenizer" if hasattr(processor, "get_vocab") else "the processor": _of_processor(processor)}


def _each(part: Any) -> Iterator[Any]:
    """The rows of a part; a class with a length and indices need not end an iteration."""
    return (part[i] for i in range(len(part)))


def _pieces(row: Any) -> Iterator[bytes]:
    """The bytes of a row: tensors, arrays and pictures, and dicts, tuples and lists of such, numbers and texts."""
    if isinstance(row, Mapping):
        for name in sorted(row, key=str):
            yield str(name).encode()
            yield from _pieces(row[name])
    elif isinstance(row, (tuple, list)):
        yield f"{len(row)} parts".encode()
        for part in row:
            yield from _pieces(part)
    elif isinstance(row, torch.Tensor):
        yield from (bytes(part) for part in _parts("", row))
    elif hasattr(row, "tobytes"):
        yield f"{getattr(row, 'dtype', '')} {getattr(row, 'shape', getattr(row, 'size', ''))}".encode()
        yield row.tobytes()
    else:
        yield repr(row).encode() if isinstance(row, (str, int, float, bool, type(None))) else type(row).__name__.encode()


def _code(code: CodeType) -> Iterator[bytes]:
    """What a function does, without the place of its source."""
    yield code.co_code
    yield repr(code.co_names).encode()
    for value in code.co_consts:
        yield from _code(value) if isinstance(value, CodeType) else [repr(value).encode()]


def _of_config(config: Any) -> str:
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in values.items() if name not in _INERT}
    return checksum([json.dumps(kept, sort_keys=True, default=str).encode()])


def _of_weights(model: nn.Module) -> str:
    return checksum(part for name, value in sorted(model.state_dict().items()) for part in _parts(name, value))


def _parts(name: str, value: Any) -> Iterator[bytes | memoryview]:
    yield f"{name} {tuple(value.shape)} {value.dtype}".encode() if isinstance(value, torch.Tensor) else name.encode()
    if type(value) is torch.Tensor and value.device.type != "meta":
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    else:  # quantized tensors, and other state
        stream = io.BytesIO()
        torch.save(value, stream)
        yield stream.getvalue()


def _of_processor(processor: Any) -> str:
    """All that an image processor writes; of a tokenizer see `_of_tokenizer`."""
    if hasattr(processor, "get_vocab"):
        return _of_tokenizer(processor)
    values = processor.to_dict() if hasattr(processor, "to_dict") else {}
    return checksum([json.dumps(values, sort_keys=True, default=str).encode()])


def _of_tokenizer(tokenizer: Any) -> str:
    """Its vocabulary, its rules where they are known as text, and its special tokens."""
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = type(tokenizer).__name__
    if backend is not None:
        state = json.loads(backend.to_str())
        # The last call's truncation and padding are part of the state.
        rules = json.dumps({key: value for key, value in state.items() if key not in ("truncation", "padding")})
    special = json.dumps(getattr(tokenizer, "special_tokens_map", {}), sort_keys=True, default=str)
    return checksum(part.encode() for part in (words, rules, special))


def _of_data(name: str, task: Task) -> str:
    if is_source(name):
        rows = (row for part in (task.validation, task.test) for row in part)
        return checksum(json.dumps(row, sort_keys=True, default=str).encode() for row in rows)
    if (known := task.data_checksum(name)) is not None:
        return known
    path = locate(name)
    if path.is_dir():
        return checksum(f"{file} {value}".encode() for file, value in checksums(path).items())
    return file_checksum(path)
