"""`save_pretrained` of a model with our layers writes what loads again, or is refused with the call that does.

transformers writes whatever `state_dict` gives. With an adapter in place these are names that no model has, and
`from_pretrained` would fill the model with random numbers; a compressed model that `save_compressed` has not seen would lack
its description. The method is wrapped once, when transformers is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lowdim.files import read_json_object, write_json
from lowdim.linalg import is_sharded

__all__ = ["begin_checkpoints", "end_checkpoints", "install", "writes_checkpoints"]

#: Models in training, and what writes their adapter; None for those without one.
_TRAINED: WeakKeyDictionary[nn.Module, Callable[[Path], Any] | None] = WeakKeyDictionary()


def install() -> None:
    """Wrap `PreTrainedModel.save_pretrained`. Calling it again changes nothing."""
    from transformers.modeling_utils import PreTrainedModel

    plain = PreTrainedModel.save_pretrained
    if getattr(plain, "_lowdim", False):
        return

    @functools.wraps(plain)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if self in _TRAINED:
            done = plain(self, save_directory, *args, **kwargs)
            _add_adapter(self, _TRAINED[self], Path(save_directory))
            return done
        _refuse_adapted(self)
        _describe_compressed(self)
        return plain(self, save_directory, *args, **kwargs)

    upload: Any = PreTrainedModel.push_to_hub

    @functools.wraps(upload)
    def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_adapted(self)  # before a repository is made
        return upload(self, *args, **kwargs)

    save_pretrained._lowdim = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub = save_pretrained, push_to_hub


def begin_checkpoints(model: nn.Module, save: Callable[[Path], Any] | None) -> None:
    """From now on `model.save_pretrained` writes checkpoints of a training, to which `save(folder)` adds the adapter, if any.

    The folder holds the model under the names that it has with the adapter, which a trainer reads again when it resumes. Its
    `config.json` says so, and `from_pretrained` refuses it.
    """
    _TRAINED[model] = save


def end_checkpoints(model: nn.Module) -> None:
    """Undo `begin_checkpoints`."""
    _TRAINED.pop(model, None)


@contextmanager
def writes_checkpoints(model: nn.Module, save: Callable[[Path], Any] | None) -> Iterator[None]:
    """`begin_checkpoints`, inside the block."""
    begin_checkpoints(model, save)
    try:
        yield
    finally:
        end_checkpoints(model)


def _add_adapter(model: nn.Module, save: Callable[[Path], Any] | None, folder: Path) -> None:
    if save is None:
        return
    if not any(is_sharded(p) for p in model.parameters()):  # every process would have to gather, and only one is here
        save(folder)
    config = folder / "config.json"
    if config.is_file():
        write_json(config, {**read_json_object(config), "quantization_config": {"quant_method": "lowdim", "adapter": True}})


def _refuse_adapted(model: nn.Module) -> None:
    """Raise ValueError if the model has an adapter."""
    layer = sys.modules.get("lowdim.adapters.core.layer")
    composed = sys.modules.get("lowdim.adapters.core.composed")
    adapted = layer is not None and any(isinstance(module, layer.AdaptedLayer) for module in model.modules())
    if adapted or (composed is not None and composed.is_composed(model)):
        raise ValueError(
            f"{type(model).__name__} has an adapter, and save_pretrained would lose it: adapted.save(folder) writes the "
            "adapter, adapted.export(folder) writes it for PEFT, and adapted.merge() gives a plain model that save_pretrained "
            "writes. In transformers.Trainer, lowdim.train.AdaptedTrainerMixin or callbacks=[lowdim.train.AdaptedCallback("
            "adapted)] keeps it in the checkpoints"
        )


def _describe_compressed(model: Any) -> None:
    """Give a compressed model the description by which `from_pretrained` reads it again."""
    modules = sys.modules.get("lowdim.modules")
    swap = sys.modules.get("lowdim.layers.core.swap")
    rebuilt = modules is not None and any(isinstance(module, modules.Rebuildable) for module in model.modules())
    if rebuilt or (swap is not None and swap.structured_layers(model)):
        from lowdim.pretrained.saving import prepare_compressed

        prepare_compressed(model)
