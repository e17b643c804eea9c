"""A token mixer in the place of a decoder's self-attention, which files describe."""

from __future__ import annotations

import importlib
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowdim.errors import check_choice
from lowdim.layers.core.token_mixer import TokenMixer
from lowdim.modules import Rebuildable
from lowdim.surgery import layer_dtype

__all__ = ["MIXERS", "MixerBlock", "mixer_attention", "mixer_options"]

#: Name of a mixer -> its class in `lowdim.layers`.
MIXERS = {"delta-product": "DeltaProduct", "s4d": "S4D"}


class MixerBlock(TokenMixer, Rebuildable):
    """`TokenMixer` with the call of a transformers decoder's self-attention, which returns the output and no weights.

    Its state lies in the cache beside a column that counts the tokens, so that the model's masks and positions stay right; the
    configuration's `layer_types` are `"hybrid"`. The decoder's causal mask tells which tokens are padding, and nothing else.
    """

    def __init__(self, mixer: nn.Module, layer_idx: int, name: str, options: dict[str, Any]):
        super().__init__(mixer, layer_idx)
        self.name, self.options = name, options

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,  # (batch, length, hidden_size)
        *args: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`(o, None)`; a given cache is brought up to date."""
        mask = None if attention_mask is None else _padding(attention_mask)
        y, _, _ = super().forward(hidden_states, mask, past_key_values)
        if past_key_values is not None:
            count = hidden_states.new_zeros(*hidden_states.shape[:1], 1, hidden_states.shape[1], 1)
            past_key_values.update(count, count, self.layer_idx)
        return y, None

    def description(self) -> dict[str, Any]:
        """The mixer, its place and its options."""
        return {"mixer": self.name, "layer_idx": self.layer_idx, **self.options}

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A mixer without numbers in the place of `layer`, on the meta device."""
        name, place = description.pop("mixer"), description.pop("layer_idx")
        dtype = layer_dtype(next(module for module in layer.modules() if isinstance(getattr(module, "weight", None), Tensor)))
        made = _mixer(name, {**description, "device": "meta", "dtype": dtype})
        return cls(made, place, name, description).train(layer.training)


def mixer_attention(name: str, options: dict[str, Any]) -> type[MixerBlock]:
    """A class that takes the arguments of a decoder's self-attention, `(config, layer_idx)`, for transformers' patch mapping.

    Raises:
        UnknownNameError: no such mixer. TypeError, ValueError: when it is made, options that the mixer does not have.
    """
    check_choice("mixer", name, MIXERS)

    def __init__(self: MixerBlock, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        MixerBlock.__init__(self, _mixer(name, options), layer_idx, name, dict(options))

    return type("MixerBlock", (MixerBlock,), {"__init__": __init__, "__module__": __name__})


def mixer_options(name: str, config: Any) -> dict[str, Any]:
    """The sizes of a mixer in the place of this configuration's attention.

    DeltaProduct has the attention's heads, and values as wide as its keys; S4D has the model's width and 64 states.
    """
    check_choice("mixer", name, MIXERS)
    width = config.hidden_size
    if name == "s4d":
        return {"d_model": width, "d_state": 64}
    heads = config.num_attention_heads
    return {"hidden_size": width, "num_heads": heads, "head_dim": width // heads, "expand_v": 1.0}


def _mixer(name: str, options: dict[str, Any]) -> nn.Module:
    check_choice("mixer", name, MIXERS)
    return getattr(importlib.import_module("lowdim.layers"), MIXERS[name])(**options)


def _padding(mask: Tensor) -> Tensor:  # (batch, length), or (batch, 1, queries, keys): True, 0 or 1 where attended
    """Which tokens count, from a mask of any kind: the last token attends to all before it but padding."""
    if mask.ndim == 2:
        return mask
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0
