"""Batches for pre-training: the same text masked twice, lightly for the encoder and heavily for the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg import derive_seed, stream
from lowdim.represent.starbucks.masks import nested_whole_word_masks

__all__ = ["StarbucksCollator"]


class StarbucksCollator:
    """Pads rows of token ids and masks whole words for `StarbucksPretraining`.

    Formula: masks from `nested_whole_word_masks`; of the masked tokens 80 % become the mask token, 10 % a random token, 10 %
    stay, drawn apart for encoder and decoder. Labels are -100 elsewhere.

    Args:
        tokenizer: with a mask token and a padding token. A word is a token and those after it that begin with `##`, as in
            BERT's vocabulary; rows of other tokenizers bring `"word_ids"` (None or -1 for special tokens).
        encoder_probability, decoder_probability: shares of masked tokens.
        pad_to_multiple_of: of the padded length.
        seed: of all draws. A worker of a data loader has its own draws, new ones in each epoch.

    Shapes: rows are mappings with `"input_ids"`; the batch has `input_ids`, `attention_mask`, `labels`, `decoder_input_ids`,
    `decoder_labels`, all `(B, T)`.

    Raises:
        ValueError: a share outside (0, 1), a tokenizer without mask or padding token, an empty batch.

    Example:
        >>> from lowdim.represent import StarbucksCollator
        >>> from lowdim.testing.small_encoder import small_encoder
        >>> tokenizer = small_encoder(layers=1).tokenizer
        >>> batch = StarbucksCollator(tokenizer, seed=1)([tokenizer("the old cat sat on a mat")])
        >>> batch["decoder_input_ids"].shape
        torch.Size([1, 16])

    Source: Zhuang et al., arXiv 2410.13230; the authors' program (smae).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        encoder_probability: float = 0.2,
        decoder_probability: float = 0.4,
        pad_to_multiple_of: int = 8,
        seed: int = 0,
    ):
        for name, value in (("encoder_probability", encoder_probability), ("decoder_probability", decoder_probability)):
            check_float(name, value, 0.0, 1.0, low_open=True, high_open=True)
        check_int("pad_to_multiple_of", pad_to_multiple_of, 1)
        for name in ("mask_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"tokenizer must have a {name}; {type(tokenizer).__name__} has none")
        self.tokenizer, self.seed = tokenizer, seed
        self.encoder_probability, self.decoder_probability = encoder_probability, decoder_probability
        self.pad_to_multiple_of = pad_to_multiple_of
        self._generators: dict[int | None, torch.Generator] = {}
        self._specials = torch.tensor(sorted(tokenizer.all_special_ids))
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self._continues = torch.tensor([str(token).startswith("##") for token in tokens])

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The rows as a batch."""
        if not rows:
            raise ValueError("rows must hold at least one text; got none")
        generator = self._generator()
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        longest = max(len(row) for row in ids)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(ids), length), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(ids), length, dtype=torch.int64),
            "labels": torch.full((len(ids), length), -100),
        }
        batch |= {"decoder_input_ids": batch["input_ids"].clone(), "decoder_labels": batch["labels"].clone()}
        for i, (row, tokens) in enumerate(zip(rows, ids)):
            batch["attention_mask"][i, : len(tokens)] = 1
            masks = nested_whole_word_masks(
                self._words(row, tokens),
                encoder_probability=self.encoder_probability,
                decoder_probability=self.decoder_probability,
                generator=generator,
            )
            for mask, inputs, labels in zip(masks, ("input_ids", "decoder_input_ids"), ("labels", "decoder_labels")):
                batch[inputs][i, : len(tokens)] = self._replaced(tokens, mask, generator)
                batch[labels][i, : len(tokens)] = torch.where(mask, tokens, -100)
        return batch

    def _words(self, row: Mapping[str, Any], tokens: Tensor) -> Tensor:
        given = row.get("word_ids")
        if given is not None:
            return torch.tensor([-1 if word is None else word for word in given])
        words = (~self._continues[tokens]).cumsum(0)
        return torch.where(torch.isin(tokens, self._specials), -1, words)

    def _replaced(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        draw = torch.rand(len(tokens), generator=generator)
        other = torch.randint(len(self.tokenizer), (len(tokens),), generator=generator)
        hidden = torch.where(draw < 0.8, self.tokenizer.mask_token_id, torch.where(draw < 0.9, other, tokens))
        return torch.where(mask, hidden, tokens)

    def _generator(self) -> torch.Generator:
        """Of this process: a worker's seed is new in each epoch."""
        info = torch.utils.data.get_worker_info()
        worker = None if info is None else info.seed
        if worker not in self._generators:
            seed = self.seed if worker is None else derive_seed(self.seed, "worker", worker)
            self._generators = {worker: stream(seed, "starbucks", "masks")}
        return self._generators[worker]
