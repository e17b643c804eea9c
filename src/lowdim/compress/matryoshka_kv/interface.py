"""The projections' place in transformers: which layers cache keys and values, and the function that they call."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowdim.compress.matryoshka_kv.attention import attend, grouped, joined
from lowdim.compress.matryoshka_kv.projection import NAME, MatryoshkaProjection
from lowdim.errors import MissingExtraError

__all__ = [
    "ATTENTION",
    "decoder_of",
    "keeping_ranks",
    "kv_layers",
    "projected_attention",
    "projections",
    "recording",
    "turn_off",
    "turn_on",
]

#: The name of the attention function in transformers' register.
ATTENTION = "lowdim_matryoshka"

#: Keywords of attention functions that change nothing here: the mask has them, or they are for other parts of the model.
_KNOWN = frozenset(
    [
        "sliding_window",
        "use_cache",
        "cache_position",
        "position_ids",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "logits_to_keep",
        "return_dict",
    ]
)


def projections(model: nn.Module) -> dict[str, MatryoshkaProjection]:
    """The projections of a model by the names of their attention layers, in model order.

    Raises:
        TypeError: there are none.
    """
    found = {
        name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, MatryoshkaProjection)
    }
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no layer with projections; lowdim.compress.matryoshka_kv(model, config, batches) "
            "makes them"
        )
    return found


def decoder_of(model: nn.Module) -> Any:
    """The transformers model whose configuration describes the decoder's layers: the model itself, or its text part.

    Raises:
        TypeError: not a transformers model, or one without a cache of keys and values.
    """
    if not hasattr(model, "config") or not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model must be a transformers model with a decoder; got {type(model).__name__}")
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"model must be a decoder; {type(model).__name__} is an encoder with a decoder, whose cache of two parts the "
            "projections do not cover"
        )
    text = config.get_text_config(decoder=True)
    parts = [module for module in model.modules() if getattr(module, "config", None) is text]
    return next((part for part in parts if hasattr(part, "set_attn_implementation")), model)


def kv_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers that cache the keys and values of all tokens, by name: those that a projection can compress.

    Layers with a sliding window, a recurrent state or the cache of another layer are left alone.

    Raises:
        TypeError: the model has none (the first attention layer and the reason are named).
    """
    decoder = decoder_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    attention: dict[int, nn.Module] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and (hasattr(module, "num_key_value_groups") or hasattr(module, "is_causal")):
            attention.setdefault(index, module)
    first = next(iter(attention.values()), None) or _looks_like_attention(decoder)
    where = (
        f"layer {names[id(first)]} is a {type(first).__name__}" if first is not None else f"{type(model).__name__} is a model"
    )
    if not decoder._can_set_attn_implementation():
        raise TypeError(
            f"{where} that computes its attention itself; only layers that call transformers' AttentionInterface can get "
            "projections"
        )
    if not attention or not all(getattr(module, "is_causal", True) for module in attention.values()):
        raise TypeError(f"{where} that is not causal: an encoder caches no keys and values, so there is nothing to compress")
    kinds = _cache_kinds(decoder)
    found = {names[id(module)]: module for i, module in sorted(attention.items()) if kinds[i : i + 1] == ["DynamicLayer"]}
    if not found:
        raise TypeError(f"{where} that does not keep the keys of all tokens (its cache: {', '.join(sorted(set(kinds)))})")
    return found


def _looks_like_attention(model: nn.Module) -> nn.Module | None:
    return next((module for module in model.modules() if "attention" in type(module).__name__.lower()), None)


def _cache_kinds(decoder: Any) -> list[str]:
    """The class of the cache that transformers itself would use, layer by layer."""
    try:
        cache = importlib.import_module("transformers").DynamicCache(config=decoder.config)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"{type(decoder).__name__}: transformers knows no cache for its layers ({error})") from error
    return [type(layer).__name__ for layer in cache.layers]


def register() -> None:
    """Make the attention function known to transformers; again, nothing changes.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise MissingExtraError("transformers", "train", "lowdim.compress.matryoshka_kv") from error
    AttentionInterface.register(ATTENTION, projected_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it there would be no causal mask


def turn_on(model: nn.Module) -> None:
    """Make the decoder's layers call `projected_attention`; what they called before is remembered with it."""
    register()
    decoder = decoder_of(model)
    before = decoder.config._attn_implementation
    if before != ATTENTION:
        decoder.set_attn_implementation(ATTENTION)
        decoder._lowdim_attention_before = before


def turn_off(model: nn.Module) -> None:
    """Undo `turn_on`."""
    decoder = decoder_of(model)
    if decoder.config._attn_implementation == ATTENTION:
        decoder.set_attn_implementation(getattr(decoder, "_lowdim_attention_before", None) or "sdpa")


@contextmanager
def recording(layers: dict[str, nn.Module], recorders: dict[str, Any]) -> Iterator[None]:
    """Within the block, each layer gives its keys and values to its recorder and computes ordinary attention."""
    try:
        for name, layer in layers.items():
            layer.lowdim_recorder = recorders[name]  # type: ignore[assignment]
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("lowdim_recorder", None)


@contextmanager
def keeping_ranks(found: Mapping[str, MatryoshkaProjection]) -> Iterator[None]:
    """After the block, the projections have the ranks that they had before it."""
    before = [projection.ranks for projection in found.values()]
    try:
        yield
    finally:
        for projection, (key, value) in zip(found.values(), before, strict=True):
            projection.set_ranks(key, value)


def projected_attention(
    module: nn.Module,
    query: Tensor,  # (batch, heads, queries, d)
    key: Tensor,  # (batch, kv_heads, tokens, d), or what the cache gave
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a model with projections; layers without one compute ordinary attention.

    Raises:
        NotImplementedError: a keyword that would change the result and is not known here, such as attention sinks.
    """
    strange = [name for name, given in other.items() if given is not None and name not in _KNOWN]
    where = f"layer {getattr(module, 'layer_idx', '')} ({type(module).__name__})"
    if strange:
        raise NotImplementedError(f"{where}: MatryoshkaKV does not know the attention's {', '.join(strange)}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    how: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "mask": attention_mask,
        "causal": bool(causal),
        "dropout": dropout,
        "softcap": softcap,
        "weights": bool(other.get("output_attentions")),
    }
    recorder = module.__dict__.get("lowdim_recorder")
    projection: Any = module._modules.get(NAME)
    if recorder is not None:
        recorder.add(key, value)
    elif projection is not None:
        return projection.attention(query, key, value, **how)
    MatryoshkaProjection.refuse_others(None, key, where.removeprefix("layer "))
    mixed, weights = attend(grouped(query, key.shape[1]), key, value, query.shape[2], **how)
    return joined(mixed, query.shape[2]), weights
