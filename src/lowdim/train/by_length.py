"""Batches of rows of like length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["GroupedByLength"]

_GROUPED = 50  # batches that are sorted together at most
_GROUPS = 4  # groups that a small data set is divided into at least, so that batches still differ from epoch to epoch


class GroupedByLength(Sampler[int]):
    """The rows of an epoch in a random order in which each batch holds rows of like length.

    The rows are shuffled and divided into groups of up to 50 batches; a group is sorted by length and cut into batches, and the
    batches are shuffled. The order depends on the seed and the epoch alone, so a resumed run sees the same batches.

    transformers' `LengthGroupedSampler` gives the longest rows of a group first, which in a short training is an order of its
    own, and draws from the global generator.

    Args:
        lengths: of the rows.
        batch_size: rows in a batch.
        seed: with the epoch, of the order.

    Raises:
        ValueError: a batch size below 1.

    Example:
        >>> from lowdim.train.by_length import GroupedByLength
        >>> lengths = [9, 1, 8, 2] * 16
        >>> order = list(GroupedByLength(lengths, 4))
        >>> [sum(4 * max(lengths[i] for i in rows[k : k + 4]) for k in range(0, 64, 4)) for rows in (range(64), order)]
        [576, 384]
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        size = self.batch_size
        draw = torch.Generator().manual_seed((self.seed + self.epoch) % 2**63)
        order = torch.randperm(len(self), generator=draw).tolist()
        together = size * max(1, min(_GROUPED, len(self) // (size * _GROUPS)))
        batches: list[list[int]] = []
        for begin in range(0, len(order), together):
            group = sorted(order[begin : begin + together], key=lambda i: self.lengths[i])
            batches += [group[k : k + size] for k in range(0, len(group), size)]
        whole = [batch for batch in batches if len(batch) == size]
        for k in torch.randperm(len(whole), generator=draw).tolist():
            yield from whole[k]
        for batch in batches:
            if len(batch) < size:  # the one that is not full, at the end
                yield from batch
