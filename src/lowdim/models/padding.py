"""The padding token: one id for the tokenizer that fills batches and for the model that ignores it.

A decoder that classifies finds the last token of a text by comparing with its configuration's id, and an encoder of RoBERTa's
kind counts positions from it. Where the two folders' files disagree, a text's output would depend on the other texts of its
batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["PADDING", "declare_padding", "model_padding", "name_padding", "padding_side", "set_padding"]

PADDING = "pad_token_id"


def model_padding(config: Any) -> int | None:
    """The padding id that a model of this configuration uses; None if it names none, or one outside its vocabulary."""
    for part in _parts(config):
        found = getattr(part, PADDING, None)
        if _is_token(found, part):
            return found
    return None


def set_padding(tokenizer: Any, config: Any) -> None:
    """Give the tokenizer the padding token that the model ignores, in place.

    The model's own id is taken if the tokenizer knows it. Otherwise the model must be told (`declare_padding`): the tokenizer's
    padding token, or its end, or another special token. An encoder-decoder finds the end of a text by its end token, which
    is never taken there.
    """
    theirs = model_padding(config)
    limit = _vocabulary(config)
    usable = [i for i in (tokenizer.pad_token_id,) if i is not None and (limit is None or i < limit)]
    if theirs is not None and not (usable and theirs not in tokenizer.all_special_ids):
        usable.insert(0, theirs)
    ends = [] if getattr(config, "is_encoder_decoder", False) else [tokenizer.eos_token_id]
    usable += [i for i in (theirs, *ends, tokenizer.unk_token_id, tokenizer.bos_token_id, 0) if i is not None]
    for token in usable:
        name = tokenizer.convert_ids_to_tokens(token)
        if name is not None and (limit is None or token < limit):
            if token != tokenizer.pad_token_id:
                tokenizer.pad_token = name
            return


def declare_padding(model: Any, token: int) -> None:
    """Write the padding id into a model's configurations, so that it ignores it and its saved folder names it."""
    name_padding(model.config, token)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = token


def name_padding(config: Any, token: int) -> None:
    """Write the padding id into a configuration and the text model's within it."""
    for part in _parts(config):
        setattr(part, PADDING, token)


def padding_side(tokenizer: Any) -> str:
    """The side on which texts to classify are padded: where the model does not look for the text's state.

    Padding on the left moves a text to later positions, which a model with a table of positions notices. It is right only
    for models whose tokenizer puts the classification token last (XLNet), since they read the last position.
    """
    ids = tokenizer("a", verbose=False)["input_ids"]
    last = tokenizer.cls_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.cls_token_id != ids[0]
    return "left" if last else "right"


def _parts(config: Any) -> Iterator[Any]:
    """The configurations that may hold the id, that of the text model first: a multimodal model reads it there."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield text
    if text is not config:
        yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not text and hasattr(part, "vocab_size") and hasattr(part, PADDING):
            yield part


def _vocabulary(config: Any) -> int | None:
    sizes = (getattr(part, "vocab_size", None) for part in _parts(config))
    return next((size for size in sizes if isinstance(size, int)), None)


def _is_token(value: Any, config: Any) -> bool:
    limit = getattr(config, "vocab_size", None)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= 0 and (not isinstance(limit, int) or value < limit)
