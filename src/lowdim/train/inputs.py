"""Texts and pairs of texts as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["JOINT", "Inputs", "encode", "separates"]

#: Stands between the texts of a pair where the tokenizer puts nothing between them.
JOINT = "\n"
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


def separates(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a token of its own between the texts of a pair."""
    pair = tokenizer("a", "b")
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    owners = pair.sequence_ids(0)
    return None in owners[owners.index(0) : owners.index(1)]


def encode(
    tokenizer: Any, texts: Sequence[str], others: Sequence[str] = (), *, length: int, segments: bool | None = None
) -> Inputs:
    """Token ids of texts, or of pairs of texts as one input each, with at most `length` tokens.

    A pair is encoded as the tokenizer does it (`tokenizer(first, second)`). Where that puts nothing between the texts, a line
    break stands there. Of a pair that is too long, the longer text is cut first.

    Args:
        others: the second texts, for pairs.
        segments: whether the model reads `token_type_ids`; None: if the tokenizer gives them.
    """
    import pyarrow as pa

    native = bool(others) and separates(tokenizer)
    chunks: dict[str, list[Any]] = {"input_ids": []}
    cut = 0
    for start in range(0, len(texts), _BATCH):
        first, second = list(texts[start : start + _BATCH]), list(others[start : start + _BATCH])
        call = (first, second) if native else ([f"{a}{JOINT}{b}" for a, b in zip(first, second)] if second else first,)
        rows = tokenizer(*call, truncation=False, verbose=False)
        ids, types = rows["input_ids"], rows.get("token_type_ids") if native and segments is not False else None
        for i in [i for i, row in enumerate(ids) if len(row) > length]:
            cut += 1
            part = [texts[i] for texts in call] if native or not second else [_cut(tokenizer, first[i], second[i], length)]
            row = tokenizer(*part, truncation=True, max_length=length)
            ids[i] = row["input_ids"]
            if types is not None:
                types[i] = row["token_type_ids"]
        chunks["input_ids"].append(pa.array(ids, pa.list_(pa.int32())))
        if types is not None:
            chunks.setdefault("token_type_ids", []).append(pa.array(types, pa.list_(pa.int8())))
    joint = None if not others else "" if native else JOINT
    return Inputs({name: pa.chunked_array(parts) for name, parts in chunks.items()}, cut, joint)


def _cut(tokenizer: Any, first: str, second: str, length: int) -> str:
    """A joined pair whose longer text is cut, so that it has at most `length` tokens."""
    if not getattr(tokenizer, "is_fast", False):
        return f"{first}{JOINT}{second}"
    between = tokenizer(JOINT, add_special_tokens=False)["input_ids"]
    room = max(0, length - tokenizer.num_special_tokens_to_add(pair=False) - len(between))
    ends = [
        [
            end
            for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
        ]
        for text in (first, second)
    ]
    kept = min(len(ends[1]), max(room // 2, room - len(ends[0])))
    return JOINT.join(
        text[: own[count - 1] if count else 0]
        for text, own, count in zip((first, second), ends, (min(len(ends[0]), room - kept), kept))
    )
