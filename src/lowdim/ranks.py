"""Splitting a rank or parameter budget over layers, from their spectra or importance scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int

__all__ = ["Choices", "by_energy", "by_error_per_byte", "capped_note", "energy_rank", "parameter_rank", "welore", "welore_at"]


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
    `len(choices)` consecutive groups of nearly equal size, with the remainder in the earlier groups; the first group
    gets the largest choice.

    Args:
        spectra: all singular values of each layer, descending.
        rank: the target rank, at which energy is measured.
        choices: the ranks to assign.

    Returns:
        One rank per layer, in the order of `spectra`.

    Raises:
        ValueError: no layers, no choices, a choice or rank below 1.

    Example:
        >>> import torch
        >>> from lowdim.ranks import by_energy
        >>> by_energy([torch.tensor([2.0, 0.1]), torch.tensor([1.0, 1.0])], rank=1, choices=(1, 3))
        [1, 3]

    Source: Azizi, Kundu, Pedram, "LaMDA", EMNLP Findings 2024 (similar in spirit; the paper's exact formula was not
    available).
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


class Choices(NamedTuple):
    """What one layer can become, from the largest to the smallest.

    Attributes:
        sizes: bytes of each choice, falling.
        errors: what each choice costs, on a scale that all layers share.
    """

    sizes: Tensor  # (n,)
    errors: Tensor  # (n,)


def by_error_per_byte(layers: Mapping[str, Choices], allowed: int) -> dict[str, int]:
    """Choose for each layer so that all fit into `allowed` bytes: always the step that costs least error for each byte saved.

    Every layer starts at its first choice. A step goes on to the choice with the smallest `(error' - error) / (size - size')`,
    which is the next corner of the layer's lower convex hull; the cheapest step of all layers is taken until they fit. What is
    left then goes to the layers whose steps came last: each takes the smallest error that fits.

    Args:
        allowed: bytes of all layers together.

    Returns:
        The index of each layer's choice.

    Raises:
        ValueError: no layers, a layer without choices, sizes that do not fall; or all smallest are above `allowed`.

    Example:
        >>> import torch
        >>> from lowdim.ranks import Choices, by_error_per_byte
        >>> steep = Choices(torch.tensor([100, 60, 20]), torch.tensor([0.0, 0.5, 1.0]))
        >>> flat = Choices(torch.tensor([100, 60, 20]), torch.tensor([0.0, 0.1, 0.2]))
        >>> by_error_per_byte({"steep": steep, "flat": flat}, 130)
        {'steep': 0, 'flat': 2}
    """
    check_int("allowed", allowed, 0)
    if not layers:
        raise ValueError("layers must name at least one layer; got none")
    tables = {name: _checked(name, choices) for name, choices in layers.items()}
    least = sum(int(sizes[-1]) for sizes, _ in tables.values())
    if least > allowed:
        raise ValueError(f"allowed must be at least {least}, the bytes of all smallest choices; got {allowed}")
    steps = [
        (slope, order, name, to)
        for order, (name, (sizes, errors)) in enumerate(tables.items())
        for slope, to in _hull(sizes.tolist(), errors.tolist())
    ]
    steps.sort(key=lambda step: step[:2])  # stable: the steps of a layer keep their order
    chosen = dict.fromkeys(tables, 0)
    size = sum(int(sizes[0]) for sizes, _ in tables.values())
    taken: list[str] = []
    for _, _, name, to in steps:
        if size <= allowed:
            break
        sizes = tables[name][0]
        size -= int(sizes[chosen[name]] - sizes[to])
        chosen[name] = to
        taken.append(name)
    for name in dict.fromkeys(reversed(taken)):
        sizes, errors = tables[name]
        fits = sizes <= int(sizes[chosen[name]]) + allowed - size
        best = int(torch.where(fits, errors, math.inf).argmin())
        if float(errors[best]) < float(errors[chosen[name]]):
            size += int(sizes[best] - sizes[chosen[name]])
            chosen[name] = best
    return chosen


def _checked(name: str, choices: Choices) -> tuple[Tensor, Tensor]:
    sizes, errors = choices.sizes.to("cpu", torch.int64), choices.errors.to("cpu", torch.float64)
    if sizes.ndim != 1 or not len(sizes) or sizes.shape != errors.shape or bool((sizes.diff() >= 0).any()):
        raise ValueError(f"layer {name}: choices must be sizes that fall, and as many errors; got {tuple(choices.sizes.shape)}")
    if not bool(torch.isfinite(errors).all()):
        raise ValueError(f"layer {name}: an error is not finite")
    return sizes, errors


def _hull(sizes: Sequence[int], errors: Sequence[float]) -> list[tuple[float, int]]:
    """The corners after the first of the lower convex hull of `errors` over `sizes`: (error for each byte, index), rising."""
    corners: list[tuple[float, int]] = [(-math.inf, 0)]
    for i in range(1, len(sizes)):
        while True:
            slope, last = corners[-1]
            new = (errors[i] - errors[last]) / (sizes[last] - sizes[i])
            if new > slope or len(corners) == 1:
                break
            corners.pop()
        corners.append((new, i))
    return corners[1:]


def capped_note(ranks: Mapping[str, Any]) -> tuple[str, ...]:
    """One note that names the layers whose rank was capped, and to what; none without such layers.

    Example:
        >>> from lowdim.ranks import capped_note
        >>> capped_note({"gate": 1})
        ('the rank is above what 1 layer allows, which is adapted at its own limit: gate (1)',)
    """
    if not ranks:
        return ()
    shown = ", ".join(f"{name} ({rank})" for name, rank in list(ranks.items())[:4])
    many = "1 layer allows, which is" if len(ranks) == 1 else f"{len(ranks)} layers allow, which are"
    rest = "" if len(ranks) <= 4 else f" and {len(ranks) - 4} more"
    limit = "its own limit" if len(ranks) == 1 else "their own limits"
    return (f"the rank is above what {many} adapted at {limit}: {shown}{rest}",)


def parameter_rank(out_features: int, in_features: int, *, share: float, multiple: int = 1) -> int:
    """The rank at which two factors hold this share of a matrix's parameters.

    Formula: `⌊share · out · in / (out + in)⌋`, rounded down to a multiple of `multiple` unless that is 0. It may be 0, for a
    matrix too small to be factored, or above min(out, in) for a share above 1; the caller must clip or reject it.

    Raises:
        ValueError: a size or `multiple` below 1, a share that is not a positive number.

    Example:
        >>> from lowdim.ranks import parameter_rank
        >>> parameter_rank(1536, 384, share=0.5), parameter_rank(1536, 384, share=0.5, multiple=64)
        (153, 128)

    Source: the rule of LoRD (arXiv 2309.14021) and, with `share = 1 / ratio`, of PELA (arXiv 2310.10700).
    """
    check_int("out_features", out_features, 1)
    check_int("in_features", in_features, 1)
    check_float("share", share, 0.0, low_open=True)
    check_int("multiple", multiple, 1)
    rank = math.floor(share * in_features * out_features / (in_features + out_features) + 1e-9)  # 0.29 * 100 is just below 29
    return rank // multiple * multiple or rank


def welore(
    singular_values: Mapping[str, Tensor],  # name -> (d,)
    target: float,
    *,
    grid: float = 0.005,
) -> tuple[float, dict[str, int]]:
    """WeLore's rule: one threshold on normalised singular values for all layers, the smallest that removes enough ranks.

    Formula: with `z = (s - min s) / (max s - min s)` in each layer, the smallest `k` of `grid, 2 grid, ...` up to 1 with
    `Σ_l #{z_l < k} / Σ_l d_l >= target`; layer l keeps `d_l - #{z_l < k}` ranks.

    A layer whose singular values are all equal keeps them all, and counts in the sum of `d_l`; a layer with one singular value
    cannot lose any and does not count.

    Args:
        singular_values: all singular values of each layer, in any order; they are compared in float64.
        target: share of all ranks to remove, in (0, 1). Slightly more may be removed, at most what one step of the grid adds.

    Returns:
        `(k, {name: kept rank})`; every kept rank is at least 1.

    Raises:
        ValueError: target outside (0, 1), grid outside (0, 1], no layer, a spectrum that is empty, not a vector, negative or
            not finite (named); a target that no threshold reaches.

    Example:
        >>> import torch
        >>> from lowdim.ranks import welore
        >>> welore({"falls": torch.tensor([8.0, 1.0, 0.5, 0.0]), "flat": torch.tensor([1.0, 0.9, 0.9, 0.0])}, 0.5)
        (0.13, {'falls': 1, 'flat': 3})

    When not: to reach a target of parameters or energy; ranks of wide and square layers count alike here.

    Source: Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", arXiv
    2407.11239.
    """
    check_float("target", target, 0.0, 1.0, low_open=True, high_open=True)
    check_float("grid", grid, 0.0, 1.0, low_open=True)
    normalised = _normalised(singular_values)
    counted = [z for z in normalised.values() if len(z) > 1]
    if not counted:
        raise ValueError("singular_values must hold a layer with more than one singular value; all have one")
    pool = torch.cat(counted).sort().values
    steps = torch.arange(1, math.floor(1 / grid + 1e-9) + 1, dtype=torch.float64)
    thresholds = (steps * grid).round(decimals=12).clamp_max(1.0)  # exactly 0.205
    removed = torch.searchsorted(pool, thresholds)  # the number of z below each
    enough = removed.double() / len(pool) >= target
    if not bool(enough.any()):
        most = int(removed[-1]) / len(pool)
        raise ValueError(f"target must be at most {most:g}, which threshold {float(thresholds[-1]):g} removes; got {target!r}")
    threshold = float(thresholds[int(enough.int().argmax())])
    return threshold, _kept(normalised, threshold)


def welore_at(
    singular_values: Mapping[str, Tensor],  # name -> (d,)
    threshold: float,
) -> dict[str, int]:
    """The ranks that `welore` keeps at a given threshold `k`: `#{z >= k}` in each layer.

    Raises:
        ValueError: threshold outside [0, 1]; a spectrum as in `welore`.

    Example:
        >>> import torch
        >>> from lowdim.ranks import welore_at
        >>> welore_at({"a": torch.tensor([3.0, 2.0, 1.0])}, 0.5)
        {'a': 2}

    Source: arXiv 2407.11239.
    """
    check_float("threshold", threshold, 0.0, 1.0)
    return _kept(_normalised(singular_values), threshold)


def _normalised(spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each spectrum stretched to [0, 1] in float64; a constant one becomes ones, which no threshold removes."""
    if not spectra:
        raise ValueError("singular_values must hold at least one layer; got none")
    found = {}
    for name, values in spectra.items():
        s = values.detach().to("cpu", torch.float64)
        if s.ndim != 1 or not len(s):
            raise ValueError(f"singular_values[{name!r}] must be a vector of at least one number; got shape {tuple(s.shape)}")
        if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
            raise ValueError(f"singular_values[{name!r}] has negative, NaN or infinite entries")
        low, high = s.min(), s.max()
        found[name] = (s - low) / (high - low) if bool(high > low) else torch.ones_like(s)
    return found


def _kept(normalised: Mapping[str, Tensor], threshold: float) -> dict[str, int]:
    return {name: int((z >= threshold).sum()) for name, z in normalised.items()}
