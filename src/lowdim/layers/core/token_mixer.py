"""A token mixer in the place of a transformers model's attention, with its state in the model's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import check_int

__all__ = ["TokenMixer", "as_token_mixer"]


def as_token_mixer(layer: nn.Module, layer_idx: int) -> TokenMixer:
    """A mixer with the signature of flash-linear-attention's layers, its state in transformers' cache at `layer_idx`.

    Args:
        layer: DeltaProduct, or another module with `forward(x, state, attention_mask=, return_state=)`, `step` and
            `initial_state`, whose state is a tensor, or a tuple of one and of the last inputs of its convolutions.
        layer_idx: its place in the cache.

    Raises:
        TypeError: `layer` is no token mixer.
        ValueError: `layer_idx` below 0.

    Example:
        >>> import torch
        >>> from transformers.cache_utils import Cache, LinearAttentionLayer
        >>> from lowdim.layers import DeltaProduct, as_token_mixer
        >>> mixer = as_token_mixer(DeltaProduct(16, num_heads=2, head_dim=8, seed=0), layer_idx=0)
        >>> cache, x = Cache(layers=[LinearAttentionLayer()]), torch.randn(1, 5, 16)
        >>> y, _, cache = mixer(x[:, :4], past_key_values=cache)
        >>> last, _, cache = mixer(x[:, 4:], past_key_values=cache)
        >>> torch.allclose(last, mixer(x)[0][:, 4:], atol=1e-5)
        True

    Source: the layers of flash-linear-attention (fla-org), and the linear attention of transformers' caches.
    """
    if not all(callable(getattr(layer, name, None)) for name in ("step", "initial_state", "forward")):
        raise TypeError(f"layer must be a token mixer with forward, step and initial_state; got {type(layer).__name__}")
    check_int("layer_idx", layer_idx, 0)
    return TokenMixer(layer, layer_idx)


class TokenMixer(nn.Module):
    """See `as_token_mixer`. The mixer itself is `mixer`."""

    def __init__(self, mixer: nn.Module, layer_idx: int):
        super().__init__()
        self.mixer, self.layer_idx = mixer, layer_idx

    def forward(
        self,
        hidden_states: Tensor,  # (batch, length, hidden_size)
        attention_mask: Tensor | None = None,  # (batch, at least length)
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """`(o, None, past_key_values)`. A given cache is read and brought up to date, whatever `use_cache` says.

        Args:
            attention_mask: of these tokens, or of all since the first one, as in decoding: its last columns count.
            past_key_values: a transformers `Cache` with a `LinearAttentionLayer` at `layer_idx`.

        Raises:
            TypeError: another kind of layer in the cache, or none.
            ValueError: a mask that is not 2-D, or a cache of another batch.
        """
        length = hidden_states.shape[1]
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError(f"attention_mask must be (batch, length); got shape {tuple(attention_mask.shape)}")
            attention_mask = attention_mask[:, max(attention_mask.shape[1] - length, 0) :]
        if past_key_values is None:
            return self.mixer(hidden_states, attention_mask=attention_mask), None, None
        place = _place(past_key_values, self.layer_idx)
        state = self._read(place, hidden_states.shape[0])
        if length == 1 and attention_mask is None:
            y, state = self.mixer.step(hidden_states[:, 0], state)  # type: ignore[operator]
            y = y[:, None]
        else:
            y, state = self.mixer(hidden_states, state, attention_mask=attention_mask, return_state=True)
        self._write(past_key_values, state)
        return y, None, past_key_values

    def _read(self, place: Any, batch: int) -> Any:
        """The state in the cache; one that was never written, or was reset, is the initial state, which is zeros."""
        blank = self.mixer.initial_state(batch)  # type: ignore[operator]
        if not place.is_recurrent_states_initialized[0]:
            return blank
        recurrent = place.recurrent_states[0].clone()  # it is overwritten in place
        if isinstance(blank, Tensor):
            return recurrent
        channels = [0 if part is None else part.shape[2] for part in blank[1:]]
        inputs = place.conv_states[0].mT.split(channels, 2)
        kept = (
            None if part is None else given[:, given.shape[1] - part.shape[1] :].to(part.dtype, copy=True)
            for part, given in zip(blank[1:], inputs, strict=True)
        )
        return type(blank)(recurrent, *kept) if hasattr(blank, "_fields") else (recurrent, *kept)

    def _write(self, cache: Any, state: Any) -> None:
        """Into the cache's own tensors. Without convolutions an empty input says that there is a state."""
        recurrent, *inputs = [state] if isinstance(state, Tensor) else state
        present = [part.detach() for part in inputs if part is not None]
        last = torch.cat(present, 2).mT if present else recurrent.new_empty(recurrent.shape[0], 0, 0).real
        cache.update_conv_state(last, self.layer_idx, conv_kernel_size=last.shape[2])
        cache.update_recurrent_state(recurrent.detach(), self.layer_idx)


def _place(cache: Any, layer_idx: int) -> Any:
    layers = getattr(cache, "layers", ())
    place = layers[layer_idx] if layer_idx < len(layers) else None
    if not all(hasattr(place, name) for name in ("recurrent_states", "conv_states", "update_recurrent_state")):
        found = "nothing" if place is None else type(place).__name__
        raise TypeError(
            f"past_key_values must have a LinearAttentionLayer of transformers at layer {layer_idx}; got {found}: "
            "Cache(layers=[LinearAttentionLayer(), ...]), or DynamicCache(config=...) of a config with layer_types"
        )
    return place
