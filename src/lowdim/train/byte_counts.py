"""How many bytes of text tokens stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["byte_counter"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
#: Decoders of the tokenizers library under which the text of a token does not depend on its neighbours.
_APART = {"ByteLevel", "ByteFallback", "Metaspace", "Fuse"}


def byte_counter(tokenizer: Any) -> Callable[[Sequence[int]], int]:
    """A function: token ids -> bytes, in UTF-8, of the text that all but the first of them stand for.

    Where every token stands for some bytes of its own (tokenizers of bytes and characters, byte-level BPE, SentencePiece) these
    are counted; otherwise the decoded text is. Special tokens stand for none.

    Example:
        >>> from lowdim.train.byte_counts import byte_counter
        >>> from lowdim.train.tokenizers import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> byte_counter(tokenizer)([*tokenizer("né!")["input_ids"], tokenizer.eos_token_id])
        3
    """
    kinds = _decoders(tokenizer)
    if not kinds & _APART:
        return lambda ids: _decoded(tokenizer, ids) - _decoded(tokenizer, ids[:1])
    sizes = [_size(name, kinds) for name in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    for token, added in tokenizer.added_tokens_decoder.items():
        sizes[token] = 0 if added.special else len(added.content.encode())
    for token in tokenizer.all_special_ids:
        sizes[token] = 0
    return lambda ids: sum(sizes[token] for token in ids[1:])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> int:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "surrogatepass"))


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of the tokenizer's decoder and its parts."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "decoder", None) is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in [state, *state.get("decoders", ())]}


def _size(name: str | None, kinds: set[str]) -> int:
    if name is None:  # an id without a token
        return 0
    if "ByteLevel" in kinds:  # a character stands for each byte
        return len(name)
    if "ByteFallback" in kinds and _BYTE.fullmatch(name):
        return 1
    return len((name.replace("\u2581", " ") if kinds & {"ByteFallback", "Metaspace"} else name).encode())
