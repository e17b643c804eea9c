"""An adapter on disk: `adapter.safetensors` holds the tensors and how to load them, `adapter.json` the same for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowdim.files import whole_folder, write_json, write_tensors
from lowdim.version import __version__

__all__ = ["DESCRIPTION", "FORMAT", "TENSORS", "VERSION", "digest_of", "write_adapter"]

FORMAT, VERSION = "lowdim-adapter", 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def write_adapter(folder: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files under temporary names, then rename both. The tensors file is complete by itself and is renamed last."""
    head = {"format": FORMAT, "version": VERSION, "lowdim": __version__}
    whole = {**head, **description, "digest": digest_of(tensors)}
    with whole_folder(folder) as draft:
        write_json(draft / DESCRIPTION, whole)
        write_tensors(draft / TENSORS, tensors, {"lowdim": json.dumps(whole)})
    return folder


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes, dtypes and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
