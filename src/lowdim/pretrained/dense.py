"""The dense equivalent of a compressed model, in a form that a plain checkpoint can hold."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import LowdimError
from lowdim.layers.core.swap import plain_layers
from lowdim.surgery import holder

__all__ = ["dense_model", "make_room_for_biases"]

#: Switches by which configurations of transformers give linear layers a bias.
_BIAS_FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")


def dense_model(model: Any) -> Any:
    """A plain model of the same class and function, which shares the unchanged tensors; `model` is not modified.

    Raises:
        LowdimError: a layer has a bias that the model's class cannot hold.
    """
    layers = plain_layers(model)
    state = {key: value for key, value in model.state_dict().items() if holder(key, layers) is None}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    plain, state = _model_with_biases(model, state)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = getattr(model, "generation_config", None)
    return plain.train(model.training)


def make_room_for_biases(model: Any) -> None:
    """Update the configuration of a densified model for the biases that its layers have gained, in place.

    Layers without a bias that the configuration then gives one get zeros. Without this `save_pretrained` would write biases
    that `from_pretrained` drops.

    Raises:
        LowdimError: the model's class cannot hold a bias of the model.
    """
    roomy, state = _model_with_biases(model, dict(model.state_dict()))
    for key in state.keys() - model.state_dict().keys():
        layer = model.get_submodule(key.rpartition(".")[0])
        layer.bias = nn.Parameter(state[key], requires_grad=any(p.requires_grad for p in layer.parameters()))
    for flag in _BIAS_FLAGS:
        if hasattr(roomy.config, flag):
            setattr(model.config, flag, getattr(roomy.config, flag))


def _model_with_biases(model: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """A model of the same class on the meta device that can hold every tensor, and the tensors it needs."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = _on_meta(type(model), config)
    extra = _extra(state, plain)
    for flag in _BIAS_FLAGS:
        if extra and getattr(config, flag, None) is False:
            setattr(config, flag, True)
            trial = _on_meta(type(model), config)
            if len(_extra(state, trial)) < len(extra):
                plain, extra = trial, _extra(state, trial)
            else:
                setattr(config, flag, False)
    if extra:
        names = ", ".join(sorted(extra)[:3])
        raise LowdimError(
            f"{type(model).__name__} cannot hold {names}{' ...' if len(extra) > 3 else ''}, so a dense checkpoint would "
            "lose it; write the compressed one, or compress without new biases (LoRD: centered=False)"
        )
    own = dict(plain.state_dict())
    zeros = {
        key: torch.zeros(own[key].shape, dtype=_layer_dtype(key, state), device=_device(state.values()))
        for key in own.keys() - state.keys()
        if key.endswith(".bias")
    }
    return plain, {**state, **zeros}


def _on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def _extra(state: Mapping[str, Tensor], plain: nn.Module) -> set[str]:
    return state.keys() - plain.state_dict().keys()


def _layer_dtype(key: str, state: Mapping[str, Tensor]) -> torch.dtype:
    return state[f"{key.rpartition('.')[0]}.weight"].dtype


def _device(tensors: Iterable[Tensor]) -> torch.device:
    return next(iter(tensors)).device
