"""What a language model must not forget: its loss on a text that it is not trained on, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.errors import DataError
from lowdim.models.forms import form_of
from lowdim.surgery import model_device
from lowdim.train.data import read_documents
from lowdim.train.tasks.causal_lm import block_losses

__all__ = ["DEFAULT", "Kept", "kept_by"]

#: The text that is taken where the user names none.
DEFAULT = "lowdim:plain-english"
_MOST = 64  # blocks
_BATCH = 8


@dataclass(frozen=True)
class Kept:
    """Blocks of a text that must not be forgotten.

    Attributes:
        source: the file.
    """

    source: str
    blocks: list[list[int]]

    @classmethod
    def of(cls, path: str | Path | None, tokenizer: Any, length: int) -> Kept:
        """The first blocks of a text.

        Args:
            path: a text file, or a table with one column of text; None takes the text that is shipped.
            length: tokens of a block at most.

        Raises:
            DataError: unreadable, or without text.

        Example:
            >>> from lowdim import models
            >>> from lowdim.train.keeping import Kept
            >>> tokenizer, model = models.load_tokenizer("stories260k"), models.load_model("stories260k", "causal-lm")
            >>> kept = Kept.of(None, tokenizer, 128)
            >>> len(kept.blocks), round(kept.loss(model), 2)
            (23, 2.86)
        """
        source = DEFAULT if path is None else str(path)
        ids: list[int] = []
        for text in read_documents([source]).texts:
            ids += tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            if len(ids) >= _MOST * length:
                break
        blocks = [ids[start : start + length] for start in range(0, min(len(ids), _MOST * length), length)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise DataError(f"--keep {source} has less than two tokens of text")
        return cls(source, blocks)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """The mean loss in nats per token, in evaluation mode; NaN if an output is not finite."""
        device, was_training = model_device(model), model.training
        model.eval()
        outcomes: list[tuple[float, int]] = []
        try:
            for rows in _equal(self.blocks):
                ids = torch.tensor(rows, device=device)
                outcomes += block_losses(model, {"input_ids": ids, "labels": ids})
        except FloatingPointError:
            return float("nan")
        finally:
            model.train(was_training)
        return sum(loss for loss, _ in outcomes) / sum(count for _, count in outcomes)


def kept_by(recipe: Any, tokenizer: Any, length: int) -> Kept | None:
    """What a recipe keeps: the text that it names; the shipped one for pre-trained language models; None for others.

    Args:
        recipe: with `task`, `keep` and `from_scratch`.
        length: tokens of a block at most, as of the task's rows.
    """
    if not form_of(recipe.task).generates or (recipe.keep is None and recipe.from_scratch):
        return None
    return Kept.of(recipe.keep, tokenizer, length)


def _equal(blocks: Sequence[list[int]]) -> list[list[list[int]]]:
    """Batches of blocks of one length; only the last block may be shorter."""
    whole = [block for block in blocks if len(block) == len(blocks[0])]
    batches = [whole[start : start + _BATCH] for start in range(0, len(whole), _BATCH)]
    return batches + [[block] for block in blocks if len(block) != len(blocks[0])]
