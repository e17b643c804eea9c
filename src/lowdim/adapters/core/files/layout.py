"""An adapter on disk: `adapter.safetensors` holds the tensors and how to load them, `adapter.json` the same for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lowdim.errors import CheckpointError, shown
from lowdim.files import parse_json, read_json, read_tensors, whole_folder, write_json, write_tensors
from lowdim.version import __version__

__all__ = ["DESCRIPTION", "FORMAT", "TENSORS", "VERSION", "Header", "digest_of", "read_adapter", "write_adapter"]

#: Version 1 had a digest of the tensors alone.
FORMAT, VERSION = "lowdim-adapter", 2
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", protected_namespaces=())


class Weight(_Part):
    """A parameter that a method composes: its shape, and the fingerprint of the pre-trained one."""

    shape: list[int]
    fingerprint: str | None


class Layer(Weight):
    """An adapted layer: the shape of its matrix `(out, in)`, and what its method needs to allocate the update."""

    shape: list[int] = Field(min_length=2, max_length=2)
    meta: dict[str, Any]


class Header(_Part):
    """The description of an adapter. Whole-model methods (SAID, aTLAS) have `parameters` and `shared`, and no layers."""

    format: str
    version: int
    method: str
    config: dict[str, Any]
    seed: int
    layers: dict[str, Layer]
    modules_to_save: list[str]
    digest: str
    base_model: dict[str, Any] = {}
    parameters: dict[str, Weight] = {}
    shared: dict[str, Any] | None = None

    @property
    def quantize(self) -> str | None:
        """How the base model was quantized when it was loaded, as in `lowdim.models.load_model`."""
        scheme = self.base_model.get("quantize")
        return scheme if isinstance(scheme, str) else None

    @property
    def base(self) -> str | None:
        """The name or path of the base model, if the adapter records one."""
        name = self.base_model.get("name_or_path")
        return name if isinstance(name, str) and name else None


def write_adapter(folder: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files under temporary names, then rename both. The tensors file is complete by itself and is renamed last."""
    whole = json.loads(json.dumps({"format": FORMAT, "version": VERSION, "lowdim": __version__, **description}))
    whole["digest"] = digest_of(tensors, whole)
    with whole_folder(folder) as draft:
        write_json(draft / DESCRIPTION, whole)
        write_tensors(draft / TENSORS, tensors, {"lowdim": json.dumps(whole)})
    return folder


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], Header]:
    """The tensors and the description of a saved adapter, compared with their digest.

    Raises:
        CheckpointError: a file is missing, damaged, of a newer version or not lowdim's; the error names the file.
    """
    path = folder / TENSORS
    tensors, metadata = read_tensors(path)
    try:
        content = parse_json(metadata["lowdim"])
    except KeyError:
        raise CheckpointError(f"{path} was not written by lowdim (no description in its header)") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} was not written by lowdim, or is damaged: its description is not JSON ({error})"
        ) from None
    header = _checked(content, path)
    if header.digest != digest_of(tensors, content if header.version > 1 else None):
        raise CheckpointError(
            f"{path} is damaged: its tensors and description do not match its digest; use another copy, or save it again"
        )
    _compare_description(folder / DESCRIPTION, content)
    return tensors, header


def digest_of(tensors: Mapping[str, Tensor], description: Mapping[str, Any] | None = None) -> str:
    """A digest of names, shapes, dtypes and bits, and of the description without its own entry `digest`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    if description is not None:
        rest = {key: value for key, value in description.items() if key != "digest"}
        digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def _checked(content: Any, path: Path) -> Header:
    """The description with every part of the right type."""
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("version"), int):
        found = content.get("format") if isinstance(content, dict) else content
        raise CheckpointError(f"{path} is not a lowdim adapter (format {shown(found)})")
    if content["version"] > VERSION:
        raise CheckpointError(
            f"{path.parent} has format version {shown(content['version'])}; this lowdim reads up to {VERSION}: upgrade lowdim"
        )
    if content["version"] < 1:
        raise CheckpointError(f"{path} is damaged: format version {shown(content['version'])}; versions begin with 1")
    required = [name for name, field in Header.model_fields.items() if field.is_required()]
    missing = [name for name in required if name not in content]
    if missing:
        raise CheckpointError(f"{path} is damaged: its description lacks {', '.join(missing)}")
    try:
        return Header.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged: {shown(where)[1:-1]} of its description: {first['msg']}") from None


def _compare_description(path: Path, content: Mapping[str, Any]) -> None:
    """The file for people, where it is still there, must say the same."""
    if path.exists() and read_json(path) != _as_written(content):
        raise CheckpointError(
            f"{path} does not belong to {TENSORS} (an interrupted save, or damage?); remove it to load the tensors as they are"
        )


def _as_written(content: Mapping[str, Any]) -> Any:
    """The description as `write_json` writes it: infinity and NaN are null."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)
