"""Texts and pairs of texts as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Inputs", "encode", "joint_of"]

_BATCH = 1024  # texts per call of the tokenizer


@dataclass(frozen=True)
class Inputs:
    """Token ids of texts.

    Attributes:
        columns: `input_ids`, and `token_type_ids` of pairs where the model reads them, as Arrow arrays of lists.
        cut: number of texts that were longer than allowed.
        joint: what was put between the texts of a pair; `""` if the tokenizer does it, None for single texts.
    """

    columns: dict[str, Any]
    cut: int
    joint: str | None = None

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def ids(self) -> Iterator[list[int]]:
        """The token ids of each text."""
        for chunk in self.columns["input_ids"].chunks:
            yield from chunk.to_pylist()


def joint_of(tokenizer: Any) -> str:
    """What to put between the texts of a pair: nothing if the tokenizer puts a token of its own there, else a line break.

    Where the tokenizer does not see line breaks, its separator or its end token is taken, or a bar.
    """
    if _separates(tokenizer):
        return ""
    tokens = (token for token in (tokenizer.sep_token, tokenizer.eos_token) if token)
    for joint in ("\n", *(f" {token} " for token in tokens)):
        ids = tokenizer(joint, add_special_tokens=False)["input_ids"]
        if ids and tokenizer.unk_token_id not in ids:
            return joint
    return " | "


def _separates(tokenizer: Any) -> bool:
    pair = tokenizer("a", "b")
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    owners = pair.sequence_ids(0)
    return None in owners[owners.index(0) : owners.index(1)]


def encode(
    tokenizer: Any, texts: Sequence[str], others: Sequence[str] = (), *, length: int, segments: bool | None = None
) -> Inputs:
    """Token ids of texts, or of pairs of texts as one input each, with at most `length` tokens.

    A pair is encoded as the tokenizer does it (`tokenizer(first, second)`). Where that puts nothing between the texts, they are
    joined (`joint_of`). Of a pair that is too long, the longer text is cut first.

    Args:
        others: the second texts, for pairs.
        segments: whether the model reads `token_type_ids`; None: if the tokenizer gives them.
    """
    import pyarrow as pa

    joint = joint_of(tokenizer) if others else None
    typed = joint == "" and segments is not False and "token_type_ids" in tokenizer.model_input_names
    names = ("input_ids", "token_type_ids") if typed else ("input_ids",)
    chunks: dict[str, list[Any]] = {name: [] for name in names}
    cut = 0
    for start in range(0, len(texts), _BATCH):
        first, second = list(texts[start : start + _BATCH]), list(others[start : start + _BATCH])
        rows = tokenizer(*_joined(first, second, joint), truncation=False, verbose=False)
        long = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) > length]
        if long:
            cut += len(long)
            few, partners = ([part[i] for i in long] if part else [] for part in (first, second))
            if joint:
                few, partners = zip(*(_shortened(tokenizer, *pair, joint, length) for pair in zip(few, partners)))
            again = tokenizer(*_joined(few, partners, joint), truncation=True, max_length=length)
            for name in names:
                for i, row in zip(long, again[name]):
                    rows[name][i] = row
        for name in names:
            chunks[name].append(pa.array(rows[name], pa.list_(pa.int32())))
    return Inputs({name: pa.chunked_array(parts) for name, parts in chunks.items()}, cut, joint)


def _joined(first: Sequence[str], second: Sequence[str], joint: str | None) -> tuple[list[str], ...]:
    """What the tokenizer is called with."""
    if joint is None:
        return (list(first),)
    return (list(first), list(second)) if not joint else ([f"{a}{joint}{b}" for a, b in zip(first, second)],)


def _shortened(tokenizer: Any, first: str, second: str, joint: str, length: int) -> tuple[str, str]:
    """Two texts that give at most `length` tokens when they are joined: the longer one is cut first."""
    if not getattr(tokenizer, "is_fast", False):
        return first, second
    between = tokenizer(joint, add_special_tokens=False)["input_ids"]
    room = max(0, length - tokenizer.num_special_tokens_to_add(pair=False) - len(between))
    ends = [_ends(tokenizer, text) for text in (first, second)]
    kept = min(len(ends[1]), max(room // 2, room - len(ends[0])))
    counts = (min(len(ends[0]), room - kept), kept)
    cut = [text[: own[count - 1] if count else 0] for text, own, count in zip((first, second), ends, counts)]
    return cut[0], cut[1]


def _ends(tokenizer: Any, text: str) -> list[int]:
    """Where in the text each of its tokens ends."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in found["offset_mapping"]]
