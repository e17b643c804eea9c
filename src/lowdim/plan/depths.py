"""A deep stack of identical blocks from two shallow ones."""

from __future__ import annotations

from typing import Any

from lowdim.catalogue import Variant
from lowdim.errors import LowdimError
from lowdim.plan.fake import Subject, fake_mode
from lowdim.plan.rehearse import Plan, Rehearsal, rehearse
from lowdim.plan.tracker import KINDS, Peak, unique_bytes

__all__ = ["SHALLOW", "rehearse_deep"]

#: Deeper stacks than this are rehearsed at two small depths and extrapolated linearly.
SHALLOW = (2, 3)
#: The same where chance decides how much of each layer is trained: more blocks come closer to the mean.
SHALLOW_DRAWN = (4, 8)
#: The same under FSDP2, where a block's neighbours hold memory, too: its gathered weights, its gradients on their way.
SHALLOW_SHARDED = (4, 6)
_EVERYTHING = ("all-linear", None)


def rehearse_deep(subject: Subject, plan: Plan) -> tuple[Rehearsal, tuple[int, ...]]:
    """The rehearsal at the model's own depth, and the depths that it was extrapolated from, if it was."""
    drawn = plan.variant.target and getattr(plan.variant.build(), "draws_layers", False)
    depth, shallow = subject.depth, SHALLOW_SHARDED if plan.devices > 1 else SHALLOW_DRAWN if drawn else SHALLOW
    if depth is None or depth <= 2 * shallow[1] or _names_layers(plan.variant) or plan.variant.nested or plan.variant.exponents:
        return rehearse(subject, plan), ()
    try:
        small, large = (rehearse(subject, plan, d) for d in shallow)
    except (LowdimError, ValueError, IndexError):  # a config that cannot be that shallow
        return rehearse(subject, plan), ()
    if (small.depth, large.depth) != shallow:
        return rehearse(subject, plan), ()
    extended = _extend(small, large, depth)
    if int(extended.amounts["weight_bytes"]) != _weight_bytes(subject):
        return rehearse(subject, plan), ()  # the blocks are not all alike
    return extended, shallow


def _extend(small: Rehearsal, large: Rehearsal, depth: int) -> Rehearsal:
    """The rehearsal at `depth`: every part and amount extrapolated linearly from two depths.

    Memory rises or falls from block to block by the same amount, so its maximum is at the first blocks or the last: the parts
    in between are left out.
    """

    def line(a: float, b: float) -> float:
        return a + (b - a) * (depth - small.depth) / (large.depth - small.depth)

    peaks = {}
    for key, a in small.peaks.items():
        step, phase, place, index = key
        if isinstance(place, int) and place >= small.depth / 2:  # counted from the end
            place += large.depth - small.depth
        b = large.peaks.get((step, phase, place, index))
        if b is None:
            continue
        by_kind = {kind: round(line(a.by_kind[kind], b.by_kind[kind])) for kind in KINDS}
        peaks[key] = Peak(round(line(a.total, b.total)), 0, by_kind)
    amounts = {name: line(value, large.amounts[name]) for name, value in small.amounts.items()}
    return Rehearsal(peaks, amounts, depth)


def _names_layers(variant: Variant) -> bool:
    """Whether the target patterns contain a digit, and so may select single blocks."""
    patterns = variant.options.get("target_modules")
    if patterns in _EVERYTHING:
        return False
    text = patterns if isinstance(patterns, str) else " ".join(map(str, patterns))
    return any(c.isdigit() for c in text)


_WEIGHT_BYTES: dict[tuple[Any, ...], int] = {}


def _weight_bytes(subject: Subject) -> int:
    """Bytes of the model at its full depth, counted once for a comparison of many methods."""
    key = subject.config.to_json_string(use_diff=False), subject.task, subject.num_labels, subject.dtype, subject.quantize
    if key not in _WEIGHT_BYTES:
        with fake_mode():
            model = subject.build()
            _WEIGHT_BYTES[key] = unique_bytes([*model.parameters(), *model.buffers()])
    return _WEIGHT_BYTES[key]
