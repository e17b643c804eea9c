"""Nested whole-word masks for pre-training: what the encoder does not see, and the more that the decoder does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int

__all__ = ["nested_whole_word_masks"]


def nested_whole_word_masks(
    word_ids: Tensor,  # (n,)
    *,
    encoder_probability: float = 0.2,
    decoder_probability: float = 0.4,
    order: Tensor | None = None,  # (words,)
    generator: torch.Generator | None = None,
    max_predictions: int = 512,
) -> tuple[Tensor, Tensor]:
    """Whole words in random order, until the larger budget is used; the encoder's mask is a part of the decoder's.

    Formula: `N = max(1, round(n p))` tokens of the n (special ones count), at most `max_predictions`. A word that would pass
    the larger budget is skipped. Of the others the decoder's mask gets those that fit into its budget, the encoder's those
    that fit into both.

    Args:
        word_ids: for each token the number of its word, -1 for special tokens; tokens of a word stand together.
        encoder_probability, decoder_probability: shares of the tokens.
        order: a permutation of the words, which are counted in the order of the text; None draws one.
        generator: of the draw.
        max_predictions: tokens of a mask at most.

    Returns:
        Two masks `(n,)` bool: the encoder's, the decoder's.

    Raises:
        ValueError: a share outside (0, 1), an order that is no permutation of the words, word_ids that are no vector.

    Example:
        >>> import torch
        >>> from lowdim.represent import nested_whole_word_masks
        >>> words = torch.tensor([-1, 0, 0, 1, 2, -1])
        >>> encoder, decoder = nested_whole_word_masks(words, order=torch.tensor([1, 0, 2]))
        >>> encoder.int().tolist(), decoder.int().tolist()
        ([0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0])

    Source: Zhuang et al., arXiv 2410.13230; the authors' program (smae).
    """
    for name, value in (("encoder_probability", encoder_probability), ("decoder_probability", decoder_probability)):
        check_float(name, value, 0.0, 1.0, low_open=True, high_open=True)
    check_int("max_predictions", max_predictions, 1)
    if word_ids.ndim != 1:
        raise ValueError(f"word_ids must be a vector, one number for each token; got shape {tuple(word_ids.shape)}")
    starts, lengths = _words(word_ids)
    words = len(starts)
    if order is None:
        order = torch.randperm(words, generator=generator)
    elif order.shape != (words,) or not torch.equal(order.cpu().sort().values, torch.arange(words)):
        raise ValueError(f"order must be a permutation of the {words} words; got {order.tolist()}")
    count = len(word_ids)
    budgets = [min(max_predictions, max(1, round(count * p))) for p in (encoder_probability, decoder_probability)]
    masks = torch.zeros(2, count, dtype=torch.bool)
    used, inside = 0, [0, 0]
    for word in order.tolist():
        if used >= max(budgets):
            break
        size = lengths[word]
        if used + size > max(budgets):
            continue
        fits = [inside[i] + size <= budgets[i] for i in (0, 1)]
        where = slice(starts[word], starts[word] + size)
        if fits[0] and fits[1]:
            masks[0, where] = True
        if fits[1]:
            masks[1, where] = True
        inside = [filled + size * fit for filled, fit in zip(inside, fits)]
        used += size
    return masks[0].to(word_ids.device), masks[1].to(word_ids.device)


def _words(word_ids: Tensor) -> tuple[list[int], list[int]]:
    """Where each word begins, and its tokens: a run of equal numbers that are not negative."""
    numbers, counts = torch.unique_consecutive(word_ids.cpu(), return_counts=True)
    starts = counts.cumsum(0) - counts
    real = numbers >= 0
    return starts[real].tolist(), counts[real].tolist()
