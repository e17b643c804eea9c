"""Splitting a rank or parameter budget over layers, from their spectra or importance scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowdim.errors import check_float, check_int

__all__ = ["by_energy", "energy_rank"]


def energy_rank(
    singular_values: Tensor,  # (k,) descending
    energy: float,
) -> int:
    """The smallest r with `Σ_{i≤r} σ_i² ≥ energy · Σ σ_i²` (tolerance 1e-12).

    Example:
        >>> import torch
        >>> from lowdim.ranks import energy_rank
        >>> energy_rank(torch.tensor([3.0, 1.0, 1.0]), 0.9)
        2
    """
    check_float("energy", energy, 0.0, 1.0, low_open=True)
    squares = singular_values.double().square()
    total = squares.sum()
    reached = squares.cumsum(0) >= energy * total - 1e-12 * total
    return int(reached.int().argmax()) + 1


def by_energy(spectra: list[Tensor], *, rank: int, choices: Sequence[int]) -> list[int]:
    """LaMDA++'s rule: the layers whose top `rank` singular values hold the least energy get the largest rank.

    Formula: `E_l = Σ_{j≤rank} σ_j² / Σ_j σ_j²`; layers sorted by `E_l` ascending (ties: model order) are cut into
    `len(choices)` consecutive groups of nearly equal size, earlier groups taking the remainder; the first group
    gets the largest choice.

    Args:
        spectra: all singular values of each layer, descending.
        rank: the target rank at which energy is read.
        choices: the ranks to hand out.

    Returns:
        One rank per layer, in the order of `spectra`.

    Raises:
        ValueError: no layers, no choices, a choice or rank below 1.

    Example:
        >>> import torch
        >>> from lowdim.ranks import by_energy
        >>> by_energy([torch.tensor([2.0, 0.1]), torch.tensor([1.0, 1.0])], rank=1, choices=(1, 3))
        [1, 3]

    Source: Azizi, Kundu, Pedram, "LaMDA", EMNLP Findings 2024 (an equivalent in spirit; the paper's exact formula was not
    at hand).
    """
    check_int("rank", rank, 1)
    if not choices or not spectra:
        raise ValueError(f"by_energy needs layers and choices; got {len(spectra)} layers and choices={tuple(choices)!r}")
    for choice in choices:
        check_int("choices", choice, 1)
    energy = [float(s.double()[:rank].square().sum() / s.double().square().sum().clamp_min(1e-300)) for s in spectra]
    order = sorted(range(len(spectra)), key=lambda i: energy[i])
    size, extra = divmod(len(order), len(choices))
    result, start = [0] * len(order), 0
    for group, choice in enumerate(sorted(choices, reverse=True)):
        stop = start + size + (group < extra)
        for i in order[start:stop]:
            result[i] = choice
        start = stop
    return result
