"""Tokenizers that need no training: one token for each byte, or for each character of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowdim.errors import MissingExtraError

__all__ = ["END", "PAD", "UNKNOWN", "byte_tokenizer", "character_tokenizer"]

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"


def byte_tokenizer() -> Any:
    """A transformers tokenizer whose ids are the text's UTF-8 bytes; 256 ends a document, 257 pads.

    Any text is reproduced exactly. If a model writes bytes that are not UTF-8, decoding shows a replacement character.

    Returns:
        A `transformers.PreTrainedTokenizerFast`: 258 tokens. After `save_pretrained`, `AutoTokenizer.from_pretrained`
        loads it without lowdim. The names of special tokens within a text are ordinary text.

    Raises:
        MissingExtraError: transformers is not installed.

    Example:
        >>> from lowdim.train.tokenizers import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("né")["input_ids"], tokenizer.decode([110, 195, 169]), tokenizer.eos_token_id, len(tokenizer)
        ([110, 195, 169], 'né', 256, 258)

    When not: texts have several times as many tokens as with a trained vocabulary, and fill the model's context sooner. Use
    it if the vocabulary's matrices would dominate a small model, or if any kind of text must be possible.
    """
    kit = _tokenizers()
    made = kit.Tokenizer(kit.models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_symbols())}, merges=[]))
    made.pre_tokenizer = kit.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = kit.decoders.ByteLevel()
    return _fast(made)


def character_tokenizer(text: str | Iterable[str]) -> Any:
    """A transformers tokenizer with a token for each character (code point) of a text.

    Ids follow the order of the code points, from 0; then come the unknown character, the end of a document and padding.

    Args:
        text: the training text, or several texts. Other characters become the unknown one.

    Returns:
        A `transformers.PreTrainedTokenizerFast`, as `byte_tokenizer` gives. `save_pretrained` keeps its characters.

    Raises:
        ValueError: no character in the text, or a lone surrogate, which UTF-8 cannot encode.
        MissingExtraError: transformers is not installed.

    Example:
        >>> from lowdim.train.tokenizers import character_tokenizer
        >>> tokenizer = character_tokenizer("abba cab")
        >>> tokenizer("a bad cab")["input_ids"], len(tokenizer)
        ([1, 0, 2, 1, 4, 0, 3, 1, 2], 7)
        >>> tokenizer.decode([1, 4, 2])
        'a<|unknown|>b'

    When not: for text with thousands of different characters, or if new ones may appear; use `byte_tokenizer` there.
    """
    characters = sorted(set(text) if isinstance(text, str) else set().union(*map(set, text)))
    if not characters:
        raise ValueError("text must hold at least one character; got none")
    surrogates = [c for c in characters if "\ud800" <= c <= "\udfff"]
    if surrogates:
        raise ValueError(f"text must be Unicode that UTF-8 can hold; got the lone surrogate {surrogates[0]!r}")
    kit = _tokenizers()
    vocabulary = {c: i for i, c in enumerate([*characters, UNKNOWN])}
    made = kit.Tokenizer(kit.models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    made.decoder = kit.decoders.Fuse()
    return _fast(made, unk_token=UNKNOWN)


def _symbols() -> list[str]:
    """The printable character that represents each byte in the tokenizers library: itself, or the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _fast(tokenizer: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        split_special_tokens=True,  # their names in a text are ordinary text
        clean_up_tokenization_spaces=False,
        **special,
    )


def _tokenizers() -> Any:
    try:
        import tokenizers
        import transformers  # noqa: F401 (which wraps what is built)
    except ImportError:
        raise MissingExtraError("transformers", "train", "a tokenizer") from None
    return tokenizers
