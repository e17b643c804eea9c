"""The reader and writer of `quant_method: "lowdim"` inside transformers. Importing this module registers it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowdim.errors import CheckpointError, LowdimError
from lowdim.layers import densify
from lowdim.layers.core.token_mixer import TokenMixer
from lowdim.modules import Rebuildable, describe_layers, layer_class, place_blanks, remove_added
from lowdim.modules.rebuildable import owner_name
from lowdim.pretrained.checksums import header, verify

__all__ = ["LowdimConfig", "LowdimQuantizer"]

METHOD = "lowdim"
_VERSION = 1


class LowdimConfig(QuantizationConfigMixin):
    """The entry of a compressed model in `config.json`.

    Attributes:
        layers: module name -> class and description of the module there (see `lowdim.modules.Rebuildable`).
        system: the system that made it, for people who read the file; nothing depends on it.
        version: of this format.

    Raises:
        CheckpointError: another version, or the mark of a checkpoint that holds an adapter.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        system: str | None = None,
        version: int = _VERSION,
        quant_method: str = METHOD,
        adapter: bool = False,
        **unknown: Any,
    ):
        if adapter:
            raise CheckpointError(
                "the folder is a checkpoint of a training and holds the model under the names that it has with its adapter: "
                "load the base model, then lowdim.load_adapter(model, folder)"
            )
        if version != _VERSION or unknown:
            extra = f" with {', '.join(map(repr, unknown))}" if unknown else ""
            raise CheckpointError(
                f"config.json describes a compressed model in version {version!r}{extra}; this lowdim reads version "
                f"{_VERSION}; update it"
            )
        self.quant_method: Any = quant_method
        self.version = version
        self.system = system
        self.layers = {name: dict(description) for name, description in (layers or {}).items()}


class LowdimQuantizer(HfQuantizer):
    """Swaps in compressed layers before transformers loads the tensors, and writes them back."""

    requires_calibration = True  # transformers only reads such models; compressing is `lowdim.compress`

    quantization_config: Any

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> nn.Module:
        layers = _as_named_in(model, self.quantization_config.layers)
        place_blanks(model, layers)
        verify(checkpoint_files or (), self.quantization_config.layers)
        guards = {rf"(^|\.){re.escape(name)}\.weight$" for name in (*layers, *self.quantization_config.layers)}
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *guards}  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        loaded = [module for module in model.modules() if isinstance(module, Rebuildable)]
        for module in loaded:
            module.after_loading()
        for kind in dict.fromkeys(map(type, loaded)):
            kind.enter(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The current tensors, their checksums, and `config.json` updated from the layers.

        If the first compressed layer has no weight, an empty tensor is written under that name: a reader without lowdim then
        fails on its shape instead of initialising the missing weights at random.
        """
        layers = describe_layers(model)
        self.quantization_config.layers = layers
        model.config.quantization_config = self.quantization_config
        state = dict(model.state_dict())
        replaced = [name for name, about in layers.items() if not layer_class(about["class"]).added]
        guarded = next((name for name in replaced if f"{name}.weight" not in state), None)
        if guarded is not None:
            like = next(value for key, value in state.items() if key.startswith(f"{guarded}."))
            state[f"{guarded}.weight"] = torch.empty(0, dtype=like.dtype)
        return state, header(state, layers)

    def _dequantize(self, model: Any, dtype: Any = None) -> nn.Module:
        from lowdim.pretrained.dense import make_room_for_biases

        for name, module in model.named_modules():
            if isinstance(module, TokenMixer):
                raise LowdimError(
                    f"{name} is a token mixer ({type(module.mixer).__name__}), of which there is no dense equivalent"
                )
        remove_added(model)
        densify(model)
        make_room_for_biases(model)
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model if wanted in (None, model.dtype) else model.to(wanted)

    def is_serializable(self) -> bool:
        """A loaded model, tuned or not, can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through every compressed layer."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The compressed layers themselves can be trained, so that `Trainer` accepts the model."""
        return True


def _as_named_in(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The descriptions under the names of `model`, which may be the saved model's base model, or contain it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    body = not hasattr(model, prefix.rstrip(".")) if prefix else False
    found = {}
    for name, description in layers.items():
        owner = owner_name(name, description)
        if owner in modules:
            found[name] = dict(description)
        elif body and prefix and name.startswith(prefix):
            found[name.removeprefix(prefix)] = dict(description)
        elif prefix and f"{prefix}{owner}" in modules:
            found[f"{prefix}{name}"] = dict(description)
        elif not body:
            found[name] = dict(description)  # not in the model: the error names it
        # The rest belongs to the head of the saved model, which the base model does not have.
    return found


register_quantization_config(METHOD)(LowdimConfig)
register_quantizer(METHOD)(LowdimQuantizer)
