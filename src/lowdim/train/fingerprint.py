"""What decides a run's numbers besides its settings, as checksums by name: the base model, the tokenizer and the data."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.checksums import checksum, checksums, file_checksum
from lowdim.errors import CheckpointError
from lowdim.train.packing import is_source
from lowdim.train.tables import locate
from lowdim.train.tasks import Task

__all__ = ["check_fingerprint", "fingerprint_of"]

#: Keys of a configuration that do not change what the model computes.
_INERT = ("_name_or_path", "transformers_version")


def fingerprint_of(
    model: nn.Module, tokenizer: Any, task: Task, data: Iterable[str | Path], evaluation: str | Path | None
) -> dict[str, str]:
    """Checksums of the base model's configuration and weights, the tokenizer, and each data file.

    Of a source of `datasets`, which may be endless, the validation and test parts stand for the whole.
    """
    files = [f"data {name}" for name in map(str, data)] + ([] if evaluation is None else [f"test data {evaluation}"])
    found = {
        "the base model's configuration": _of_config(getattr(model, "config", None)),
        "the base model's weights": _of_weights(model),
        "the tokenizer": _of_tokenizer(tokenizer),
    }
    return found | {name: _of_data(name.partition("data ")[2], task) for name in files}


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
    path = locate(name)
    if path.is_dir():
        return checksum(f"{file} {value}".encode() for file, value in checksums(path).items())
    return file_checksum(path)
