"""A trained model as a folder for other tools, also where it is sharded over processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lowdim.errors import LowdimError, WrittenModelError
from lowdim.files import whole_folder
from lowdim.linalg import is_sharded
from lowdim.methods import Applied
from lowdim.models import Probe, room_for
from lowdim.models.blocks import has_blocks

__all__ = ["check_adapter", "make_small", "save_plain", "whole_state"]


def whole_state(model: nn.Module) -> dict[str, Any] | None:
    """All tensors of a sharded model (FSDP2), on the first process; None if nothing is sharded.

    Every process must call it.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def make_small(applied: Applied) -> bool:
    """Make the trained layers as small as the method has found they can be, if a file can hold that.

    Returns:
        Whether a whole model has compressed layers, or was built with other parts; an adapter holds its open ranks only, in its
        usual form.
    """
    from transformers import PreTrainedModel

    model = applied.model
    if (applied.adapted is None and not isinstance(model, PreTrainedModel)) or any(is_sharded(p) for p in model.parameters()):
        return False
    return applied.compact() or has_blocks(model)


def save_plain(
    model: Any,
    folder: Path,
    tokenizer: Any,
    whole: dict[str, Any] | None = None,
    *,
    joint: str | None = None,
    small: bool = False,
) -> None:
    """Save a whole model for other tools.

    Args:
        whole: its tensors, if it is sharded.
        joint: as in `export`.
        small: keep its compressed layers, as `lowdim.pretrained.save_compressed` writes them.

    Raises:
        LowdimError: a sharded model has structured layers, which can be made plain only in one process.
    """
    from lowdim.export import export
    from lowdim.layers.core.swap import structured_layers
    from lowdim.pretrained import save_compressed

    if small:
        save_compressed(model, folder, tokenizer)
        return
    if whole is None:
        export(model, folder, "merged", tokenizer=tokenizer, joint=joint)
        return
    structured = next(iter(structured_layers(model)), None)
    if structured is not None:
        raise LowdimError(
            f"layer {structured} is structured and sharded over processes, so no plain model is written; "
            f"continue from the checkpoints in {folder.parent} in one process (--resume), which writes it"
        )
    with whole_folder(folder) as draft:
        model.save_pretrained(draft, state_dict=whole)
        tokenizer.save_pretrained(draft)


def check_adapter(model: nn.Module, folder: Path, base: Callable[[], nn.Module]) -> None:
    """Load a written adapter over a fresh base model and compare outputs, where memory for a second model is free.

    Raises:
        WrittenModelError: they differ; the adapter is removed.
    """
    from lowdim.adapters import load_adapter

    probe = Probe.of(model) if room_for(model) else None
    if probe is None:
        return
    fresh = base()
    load_adapter(fresh, folder)
    try:
        probe.check(fresh, f"the adapter in {folder}", same=True)
    except WrittenModelError:
        shutil.rmtree(folder)
        raise
