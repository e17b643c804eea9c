"""Statistics of the layers' outputs, in as many passes as their memory asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate import collect, walk_blocks
from lowdim.compress.lord.config import LoRDConfig
from lowdim.linalg.remember import is_remembering
from lowdim.surgery import Patterns, find_layers, is_linear, matrix_shape

__all__ = ["lord_spectra", "output_statistics"]

_NEEDS = frozenset({"output_covariance"})
_LEAST = 2**26  # bytes of calibration sums that are held at once also for a small model


def lord_spectra(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: Patterns = None,
    exclude: tuple[str, ...] = LoRDConfig.exclude,
) -> dict[str, Tensor]:
    """Singular values `√λ` of each layer's centred outputs, descending: input for `lowdim.ranks` to choose the ranks.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.compress import lord_spectra
        >>> from lowdim.ranks import energy_rank
        >>> spectra = lord_spectra(nn.Sequential(nn.Linear(4, 16)), [torch.randn(300, 4)])
        >>> {name: energy_rank(s, 1 - 1e-6) for name, s in spectra.items()}
        {'0': 4}
    """
    selected = find_layers(
        model, target_modules, exclude=exclude if target_modules in (None, "all-linear") else (), accept=is_linear
    )
    found: dict[str, Tensor] = {}
    for group, _ in output_statistics(model, selected, batches, None):
        for name in list(group):
            found[name] = torch.linalg.eigvalsh(group.pop(name)["output_covariance"]).flip(0).clamp_min(0).sqrt()
    return {name: found[name] for name in selected}


def output_statistics(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], max_bytes: int | None
) -> Iterator[tuple[dict[str, dict[str, Any]], tuple[str, ...]]]:
    """The statistics of some layers at a time, all of the model as it is now, and which layers may be replaced from now on.

    If the sums of all layers fit into `max_bytes`, one pass does it. Otherwise the blocks of the model are run one by one: what
    is in a block may be replaced when it is done. Where blocks cannot be run so, or their states take more than half of the
    model, there are several passes, and layers may be replaced after the last.

    Raises:
        ValueError: several passes over batches that can be read only once; see `lowdim.calibrate.collect`.
    """
    once = isinstance(batches, Iterator)
    half = max(_LEAST, sum(p.numel() * p.element_size() for p in model.parameters()) // 2)
    limit = half if max_bytes is None and not once else max_bytes
    passes = _passes(layers, limit)
    if len(passes) > 1 and once:
        raise ValueError(
            f"batches can be read only once, but max_bytes={max_bytes} asks for {len(passes)} passes; "
            "pass a list or a DataLoader, or raise max_bytes"
        )
    # What a comparison remembers of one compression serves the next, so there the same passes are made for each.
    walk = walk_blocks(model, layers, batches, max_bytes=half) if len(passes) > 1 and not is_remembering() else None
    blocks: dict[str, list[str]] = {}
    if walk is not None:
        blocks = {block: [name for name in layers if name.startswith(f"{block}.")] for block in walk.blocks}
        held = {name for names in blocks.values() for name in names}
        passes = _passes({name: layer for name, layer in layers.items() if name not in held}, limit)
    outside = tuple(name for names in passes for name in names)
    for names in passes:
        group = collect(model, {name: layers[name] for name in names}, _NEEDS, batches)
        yield group, outside if names is passes[-1] and walk is None else ()
    for block, inside in blocks.items():
        assert walk is not None
        if not inside:
            walk.skip(block)
        parts = _passes({name: layers[name] for name in inside}, limit)
        for names in parts:
            last = names is parts[-1]
            yield (
                walk.collect(block, {name: layers[name] for name in names}, _NEEDS, leave=last),
                tuple(inside) if last else (),
            )
    if walk is not None and outside:
        yield {}, outside  # only now: a block may use them too


def _passes(layers: Mapping[str, nn.Module], limit: int | None) -> list[list[str]]:
    """The layers of each pass."""
    passes: list[list[str]] = []
    room = 0
    for name, layer in layers.items():
        need = 8 * matrix_shape(layer)[0] ** 2
        if not passes or (limit is not None and need > room):
            passes.append([])
            room = limit or 0
        passes[-1].append(name)
        room -= need
    return passes
