"""A trained model as a folder for other tools, also where it is sharded over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowdim.errors import LowdimError
from lowdim.files import whole_folder
from lowdim.linalg import is_sharded

__all__ = ["save_plain", "whole_state"]


def whole_state(model: nn.Module) -> dict[str, Any] | None:
    """All tensors of a sharded model (FSDP2), on the first process; None if nothing is sharded.

    Every process must call it.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_plain(
    model: Any, folder: Path, tokenizer: Any, whole: dict[str, Any] | None = None, *, joint: str | None = None
) -> None:
    """Save a whole model for other tools; `whole` holds its tensors if it is sharded, and `joint` is as in `export`.

    Raises:
        LowdimError: a sharded model has structured layers, which can be made plain only in one process.
    """
    from lowdim.export import export
    from lowdim.layers.core.swap import structured_layers

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
