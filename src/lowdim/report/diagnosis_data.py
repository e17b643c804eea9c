"""Sections of the page of `lowdim diagnose all` that were measured on data: a body and a hint, empty where nothing was."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowdim.report import sections
from lowdim.report.figures import grid, lines
from lowdim.report.findings import items, mapping
from lowdim.report.text import esc, number, percent, plain

__all__ = ["curvature", "dynamics", "limits"]


def limits(record: Mapping[str, Any]) -> tuple[str, str]:
    """Largest entries of queries and keys by layer and head, where attention was measured."""
    found = mapping(mapping(record.get("on_data")).get("lora-limits"))
    heads = [mapping(head) for head in items(found.get("heads"))]
    cells: dict[tuple[int, int], tuple[float, str, str]] = {}
    names: list[str] = []
    for head in heads:
        limits, where = mapping(head.get("limits")), plain(head.get("layer"), 120)
        ratio, column = number(limits.get("ratio")), number(head.get("head"))
        if ratio is None or column is None:
            continue
        if where not in names:
            names.append(where)
        degree = limits.get("degree_needed")
        tip = f"{where}, head {column:.0f}: norm {number(limits.get('bound')) or 0:.3g}, degree needed {degree or 'above 64'}"
        cells[names.index(where), int(column)] = (ratio, f"{ratio:.1f}", tip)
    if not cells:
        return "", ""
    width = max(column for _, column in cells) + 1
    below, pays = (sum(bool(mapping(h.get("limits")).get(key)) for h in heads) for key in ("below", "pays"))
    hint = (
        "Largest entry of queries and keys over √ln L: below 1 LoRA's gradient could take almost linear time; the theory has "
        f"no constants. {below} of {len(heads)} heads are below, the linear algorithm pays for {pays}. Exact for these texts."
    )
    rows = [".".join(re.findall(r"\d+", name)[:1]) or name for name in names]
    notes = "".join(f"<li>{esc(note)}</li>" for note in items(found.get("notes")))
    return grid("LoRA limits", rows, [f"head {i}" for i in range(width)], cells) + f'<ul class="notes">{notes}</ul>', hint


def curvature(record: Mapping[str, Any]) -> tuple[str, str]:
    """Largest eigenvalues with their bounds, noise and stable rates, where they were measured."""
    found = mapping(mapping(record.get("on_data")).get("batch-lr"))
    if not found:
        return "", ""
    batch, size = mapping(found.get("predicted")), number(found.get("batch_size"))
    where = f"batches of {size:.0f}" if size is not None else "batches"
    shown = {
        "largest eigenvalue, all samples": _within(found, "largest", "largest_bound"),
        f"largest eigenvalue, {where}": _within(found, "measured_largest", "measured_bound"),
        "deviation over batches": found.get("spread"),
        "predicted by theory": batch.get("largest"),
        f"largest stable rate by theory ({plain(found.get('optimizer'), 20) or 'sgd'})": found.get("max_lr"),
        "2 / measured": found.get("measured_lr"),
        "samples": found.get("n_data"),
        "parameters": found.get("n_params"),
        "products with the Hessian": found.get("products"),
    }
    hint = (
        "Plain steps of SGD above 2 / largest eigenvalue grow along its direction. Batches are steeper than all samples; the "
        "theory's rate is an upper estimate at small batches. ± is Lanczos' bound."
    )
    return sections.pairs(shown), hint


def dynamics(record: Mapping[str, Any]) -> tuple[str, str]:
    """Errors of a linear readout on the last features over training time, where there were labels."""
    found = mapping(mapping(record.get("on_data")).get("generalization-dynamics"))
    errors = {key: [number(each) for each in items(found.get(key))] for key in ("times", "train_error", "test_error")}
    rows = [row for row in zip(*errors.values()) if None not in row]
    if not rows:
        return "", ""
    times, train, test = ([float(each or 0.0) for each in column] for column in zip(*rows))
    best = min(test)
    over = test[-1] / best - 1 if best > 0 else 0.0
    said = "The readout does not over-train within these times."
    if over > 0.01:
        stop = times[test.index(best)]
        said = f"Training the readout to time {times[-1]:.3g} raises the held-out error by {percent(over)}: stop at {stop:.3g}."
    shown = {
        "samples": found.get("samples"),
        "features": found.get("features"),
        "directions that never move": found.get("frozen_dim"),
        "held-out error, best": best,
        f"held-out error at time {times[-1]:.3g}": test[-1],
    }
    curves = [("training error", train, True), ("held-out error", test, True)]
    drawn = lines(
        "Error of the readout", curves, f"squared error, over {len(times)} times from {times[0]:.3g} to {times[-1]:.3g}"
    )
    hint = (
        "A linear readout on the features before the head, trained by exact gradient flow; held out is a quarter of the "
        "samples. Exact for these texts; earlier layers, which training moves too, are left as they are."
    )
    return f'<p class="foot">{esc(said)}</p>' + drawn + sections.pairs(shown), hint


def _within(found: Mapping[str, Any], key: str, bound: str) -> str:
    """A number with its bound, or an empty text."""
    value, error = number(found.get(key)), number(found.get(bound))
    return "" if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.1g}")
