"""The cache of projected keys and values. It subclasses transformers' classes, so it is imported on first use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lowdim.compress.matryoshka_kv.interface import decoder_of, projections
from lowdim.compress.matryoshka_kv.projection import Block, MatryoshkaProjection

__all__ = ["MatryoshkaCache"]

#: Room for this share of the tokens is allocated in advance, so that most steps copy one token and not the whole cache.
_SPARE = 1 / 128


class MatryoshkaCache(Cache):
    """A transformers cache that holds only the leading directions of each head's keys and values.

    It is used like any other: `model.generate(ids, past_key_values=MatryoshkaCache(model))`, and grows with the tokens. Greedy
    and beam search, sampling, several sequences, assisted and prompt-lookup decoding, padding, cropping, reordering, `reset`
    and offloading work as with `DynamicCache`. Layers without a projection (sliding windows, recurrent states) have the cache
    that transformers would use.

    Args:
        model: a model with projections (`matryoshka_kv`). The cache serves this model only; with assisted decoding it is
            the target's.
        offloading: keep the layers on the CPU and bring each back in time (CUDA only, as in transformers).
        offload_only_non_sliding: offload only the layers that grow without a bound.

    Raises:
        TypeError: the model has no projections.
        ValueError (when tokens are added): the ranks or bases have changed since the first tokens.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import MatryoshkaCache, MatryoshkaKVConfig, kv_cache_bytes, matryoshka_kv
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval(), torch.arange(3, 43).view(4, 10)
        >>> model = matryoshka_kv(model, MatryoshkaKVConfig(key_ranks=4, value_ranks=4), [{"input_ids": ids}])
        >>> cache = MatryoshkaCache(model)
        >>> generated = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
        >>> cache.get_seq_length(), cache.nbytes() == kv_cache_bytes([[4, 4]], [[4, 4]], 14, batch=4, element_size=4)
        (14, True)

    When not: `torch.compile` and static shapes (`cache_implementation="static"`); use `StaticCache`.

    Source: Lin et al., "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection", arXiv 2410.14731.
    """

    def __init__(self, model: nn.Module, *, offloading: bool = False, offload_only_non_sliding: bool = False):
        layers: list[Any] = DynamicCache(config=decoder_of(model).config).layers
        for name, projection in projections(model).items():
            layers[model.get_submodule(name).layer_idx] = _Layer(projection)  # type: ignore[index]
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)

    def nbytes(self) -> int:
        """Bytes of all tensors that are held, in all layers and for all tokens."""
        return sum(tensor.untyped_storage().nbytes() for layer in self.layers for tensor in _tensors(layer))


def _tensors(layer: Any) -> Iterator[Tensor]:
    if isinstance(layer, _Layer):
        for block in layer.blocks:
            yield from block
        return
    for value in vars(layer).values():
        yield from (v for v in (value.values() if isinstance(value, dict) else [value]) if isinstance(v, Tensor) and v.ndim)


class _Layer(DynamicLayer):
    """The states of one layer: for each pair of ranks a block of keys and one of values, with room for a few more tokens."""

    def __init__(self, projection: MatryoshkaProjection):
        super().__init__()
        self.projection = projection
        self.blocks: list[Block] = []
        self.length = 0
        self.filled_with: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the states for the same model: a prompt can be computed once and continued often."""
        memo[id(self.projection)] = self.projection
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Block:
        """Project and append; what is returned stands for all states in the attention that follows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self.projection.state()
        if self.length and self.filled_with != now:
            raise ValueError(
                f"layer {self.projection.layer}: the ranks or bases have changed since this cache was filled; call "
                "cache.reset(), or make a new MatryoshkaCache"
            )
        self.filled_with = now
        heads = self.projection.heads(key_states.dtype)
        self._append([part.compress(key_states, value_states) for part in heads])
        return self.projection.hand_over(heads, self._held())

    def _held(self) -> list[Block]:
        return [(key[:, :, : self.length], value[:, :, : self.length]) for key, value in self.blocks]

    def _append(self, new: list[Block]) -> None:
        start, self.length = self.length, self.length + new[0][0].shape[2]
        if not start:
            self.blocks = new
            return
        for i, (old, more) in enumerate(zip(self.blocks, new)):
            key, value = (_joined(*pair, start, self.length) for pair in zip(old, more))
            self.blocks[i] = key, value

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.blocks = [(change(key), change(value)) for key, value in self._held()]

    def get_seq_length(self) -> int:
        """The number of cached tokens."""
        return self.length

    def reset(self) -> None:
        """Forget all tokens."""
        self.blocks, self.length, self.is_initialized = [], 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number, which older versions of transformers took for the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number, that of the tokens to remove; got {tokens_to_remove}")
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of the batch in another order, some several times."""
        self._change(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences only."""
        self._change(lambda states: states[indices, ...])

    def offload(self) -> None:
        """Move the states to the CPU."""
        self._change(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the states back to the device of the model."""
        if any(key.device != self.device for key, _ in self.blocks):
            self._change(lambda states: states.to(self.device, non_blocking=True))


def _joined(old: Tensor, new: Tensor, start: int, length: int) -> Tensor:
    """A tensor with the first `start` tokens of `old`, then `new`: written in place where there is room and no graph."""
    graph = torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)
    frozen = old.is_inference() and not torch.is_inference_mode_enabled()
    if old.shape[2] >= length and not graph and not frozen:
        old[:, :, start:length] = new
        return old
    spare = 0 if graph else int(length * _SPARE)
    return torch.cat([old[:, :, :start], new, new.new_zeros(*new.shape[:2], spare, new.shape[3])], dim=2)
