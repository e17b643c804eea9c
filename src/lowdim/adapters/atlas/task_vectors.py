"""Task vectors: the change of each parameter in fine-tuning, as tensors or as a safetensors file that is read when needed."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.linalg import wide

__all__ = ["TaskVector", "task_vector"]


def task_vector(
    pretrained: nn.Module | Mapping[str, Tensor],
    finetuned: nn.Module | Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """`τ = θ_finetuned − θ_pretrained` by parameter name, floating point ones only.

    For a module its parameters are used (tied ones once), for a state dict every floating point tensor. Differences are
    computed in float32 or better and returned in the pre-trained dtype.

    Raises:
        ValueError: a name that only one of the two has, or shapes that differ.

    Example:
        >>> import torch
        >>> from lowdim.adapters import task_vector
        >>> task_vector({"w": torch.ones(2), "n": torch.tensor(3)}, {"w": torch.tensor([1.0, 3.0]), "n": torch.tensor(4)})
        {'w': tensor([0., 2.])}

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.
    """
    before, after = _numbers(pretrained), _numbers(finetuned)
    if isinstance(pretrained, nn.Module) != isinstance(finetuned, nn.Module):  # a state dict also holds buffers and ties
        module = set(before if isinstance(pretrained, nn.Module) else after)
        before, after = ({name: t for name, t in part.items() if name in module} for part in (before, after))
    unpaired = sorted(set(before) ^ set(after))
    if unpaired:
        raise ValueError(f"block {unpaired[0]} is only in the {'pretrained' if unpaired[0] in before else 'finetuned'} model")
    found = {}
    for name, tensor in before.items():
        if after[name].shape != tensor.shape:
            raise ValueError(f"block {name} has shape {tuple(tensor.shape)}; fine-tuned, it has {tuple(after[name].shape)}")
        found[name] = (wide(after[name]) - wide(tensor)).to(tensor.dtype)
    return found


class TaskVector(Mapping[str, Tensor]):
    """One task vector: a mapping from parameter name to its change; two are equal if names and numbers are.

    Args:
        source: a mapping, or the path of a safetensors file, which is memory-mapped.
    """

    def __init__(self, source: Any):
        self.path = None
        if isinstance(source, (str, Path)):
            self.path = Path(source)
            tensors, _ = read_tensors(self.path)
        elif isinstance(source, TaskVector):
            self.path, tensors = source.path, source.tensors
        elif isinstance(source, Mapping):
            tensors = dict(source)
        else:
            raise ValueError(f"a task vector must be a mapping from names to tensors or a safetensors path; got {source!r}")
        strange = next((name for name, t in tensors.items() if not isinstance(t, Tensor)), None)
        if strange is not None:
            raise ValueError(f"block {strange} of a task vector must be a tensor; got {type(tensors[strange]).__name__}")
        self.tensors = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @functools.cached_property
    def digest(self) -> str:
        """Of names, dtypes and all numbers."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.tensors):
            tensor = self.tensors[name].cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()

    def reference(self) -> dict[str, Any]:
        """Its entry in a checkpoint (JSON)."""
        return {"path": None} if self.path is None else {"path": str(self.path), "digest": self.digest}

    @classmethod
    def found(cls, reference: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> TaskVector:
        """The inverse: from the file that it came from, or from the tensors in the checkpoint.

        Raises:
            CheckpointError: the file is missing, or has changed.
        """
        if reference["path"] is None:
            return cls(tensors)
        path = Path(reference["path"])
        place = path if path.is_file() else folder / path.name
        if not place.is_file():
            raise CheckpointError(
                f"the task vector {path} is missing; put it back, or save it as {path.name} next to the adapter"
            )
        read = cls(place)
        if read.digest != reference["digest"]:
            raise CheckpointError(f"{place} is not the task vector that the adapter was trained with: its digest differs")
        return read

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskVector) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: Any) -> TaskVector:
        return self  # never modified

    def __repr__(self) -> str:
        where = "" if self.path is None else f"{str(self.path)!r}, "
        return f"TaskVector({where}{len(self)} blocks, {sum(t.numel() for t in self.tensors.values()):,} numbers)"


def _numbers(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = source.named_parameters() if isinstance(source, nn.Module) else source.items()
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}
