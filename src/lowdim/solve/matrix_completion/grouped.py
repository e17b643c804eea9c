"""The observed entries of a sparse matrix, in blocks of rows that are solved together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_int
from lowdim.solve.core.reading import read_indices, read_vector

__all__ = ["Block", "Entries", "blocks_of", "read_entries"]

_BLOCK_NUMBERS = 1 << 19  # numbers in a block's design matrices (4 MB in float64): stays in cache
_PADDING = 8  # rows of a block differ in length by at most one part in this many


@dataclass(frozen=True)
class Entries:
    """Observed entries `(row, col) -> value` of a matrix; indices int64, values float64, sorted by row, then column."""

    rows: Tensor  # (nnz,)
    cols: Tensor  # (nnz,)
    values: Tensor  # (nnz,)
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.values.numel()

    @classmethod
    def sorted(cls, rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Entries:
        """Entries in any order."""
        order = (rows * shape[1] + cols).argsort(stable=True)
        return cls(rows[order], cols[order], values[order], shape)

    @property
    def T(self) -> Entries:
        """The entries of the transposed matrix."""
        return Entries.sorted(self.cols, self.rows, self.values, (self.shape[1], self.shape[0]))

    def pick(self, mask: Tensor) -> Entries:
        """A subset."""
        return Entries(self.rows[mask], self.cols[mask], self.values[mask], self.shape)

    def counts(self) -> Tensor:
        """Entries in each row."""
        return torch.bincount(self.rows, minlength=self.shape[0])

    def sparse(self) -> Tensor:
        """The matrix `(m, n)` in compressed rows, zeros elsewhere."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts().cumsum(0)])
        with warnings.catch_warnings():  # torch calls this layout beta; its products are five times those of the other one
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(starts, self.cols, self.values, self.shape, check_invariants=False)


def read_entries(rows: Any, cols: Any, values: Any, shape: tuple[int, int], rank: int) -> Entries:
    """The observed entries that a caller gives, checked and sorted.

    Raises:
        ValueError: lengths that differ, no entries, indices outside the shape, duplicates, NaN or infinity, a rank that the
            shape does not allow. TypeError: indices that are not integers.
    """
    m, n = (int(size) for size in shape)
    if min(m, n) < 1:
        raise ValueError(f"shape must be two positive sizes; got {tuple(shape)}")
    check_int("rank", rank, 1, min(m, n))
    r, c, v = read_indices("rows", rows, m), read_indices("cols", cols, n), read_vector("values", values)
    if not len(r) == len(c) == len(v):
        raise ValueError(f"rows, cols and values must have the same length; got {len(r)}, {len(c)} and {len(v)}")
    if len(v) == 0:
        raise ValueError("values must hold at least one observed entry; got none")
    entries = Entries.sorted(r, c, v, (m, n))
    duplicate = (entries.rows[1:] == entries.rows[:-1]) & (entries.cols[1:] == entries.cols[:-1])
    if bool(duplicate.any()):
        at = int(duplicate.nonzero()[0])
        raise ValueError(f"duplicate entry ({int(entries.rows[at])}, {int(entries.cols[at])}); give each entry once")
    return entries


@dataclass(frozen=True)
class Block:
    """Rows of nearly equal length, padded to one length L with entries of value 0 in column n (one past the last)."""

    rows: Tensor  # (g,)
    cols: Tensor  # (g, L)
    values: Tensor  # (g, L)
    kind: str  # "under": fewer entries than unknowns; "short": at most `sketch` of them; "long"

    def design(self, padded: Tensor) -> Tensor:
        """The factor's rows `(g, L, k)`; `padded (n + 1, k)` ends with a row of zeros."""
        return padded[self.cols]


def blocks_of(entries: Entries, rank: int, sketch: int) -> list[Block]:
    """All rows that have entries, in blocks. Padding with zeros does not change a least-squares problem.

    Args:
        rank: unknowns of each row's problem.
        sketch: rows of the sketch; only longer problems can be sketched.
    """
    counts = entries.counts()
    first = counts.cumsum(0) - counts
    order = counts.argsort(stable=True)
    order = order[counts[order] > 0]
    blocks = []
    for ids, length, kind in _classes(order, counts[order], rank, sketch):
        for part in ids.split(max(1, _BLOCK_NUMBERS // (length * rank))):
            position = torch.arange(length)[None]
            inside = position < counts[part, None]
            at = torch.where(inside, first[part, None] + position, 0)
            cols = torch.where(inside, entries.cols[at], entries.shape[1])
            blocks.append(Block(part, cols, torch.where(inside, entries.values[at], 0.0), kind))
    return blocks


def _classes(order: Tensor, lengths: Tensor, rank: int, sketch: int) -> Iterator[tuple[Tensor, int, str]]:
    """Runs of rows (sorted by length) that may share a block: one kind, lengths within the padding allowed."""
    start = 0
    while start < len(order):
        shortest = int(lengths[start])
        kind, limit = "long", shortest + shortest // _PADDING
        if shortest < rank:
            kind, limit = "under", shortest
        elif shortest <= sketch:
            kind, limit = "short", min(limit, sketch)
        stop = int(torch.searchsorted(lengths, limit, right=True))
        yield order[start:stop], int(lengths[stop - 1]), kind
        start = stop
