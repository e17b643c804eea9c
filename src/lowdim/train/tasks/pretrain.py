"""Task pretrain: a language model from random weights, on packed text that may be a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lowdim.train.tasks.causal_lm import LanguageModelling

__all__ = ["Pretraining"]


@dataclass(kw_only=True)
class Pretraining(LanguageModelling):
    """Packed blocks of text; see `lowdim.train.packing.pretraining`."""

    kind: ClassVar[str] = "pretrain"


def load(recipe: Any, processor: Any, **keywords: Any) -> Pretraining:
    """The task of a recipe."""
    from lowdim.train.packing import pretraining

    length = keywords.pop("max_length")
    return pretraining(processor, recipe.data, length=length, streaming=recipe.streaming, **keywords)
