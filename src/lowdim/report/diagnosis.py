"""The page of `lowdim diagnose all`: what a model's weights look like, and what tuning left in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from lowdim.outputs import write_page
from lowdim.report import sections
from lowdim.report.diagnosis_data import curvature, dynamics, limits
from lowdim.report.figures import dots, grid, lines
from lowdim.report.findings import items, mapping
from lowdim.report.frame import record_document
from lowdim.report.opening import terms, verdict
from lowdim.report.text import duration, esc, number, percent, plain, plural
from lowdim.results import json_value

__all__ = ["render_diagnosis", "write_diagnosis_page"]

#: A layer's numbers: key, heading, what it says in a sentence, and its error.
_MEANING = (
    ("alpha", "alpha, FARMS", "Exponent of the spectrum's tail: small means heavy, as in layers that are trained well.",
     "± a cautious standard error, as if singular values were independent; the true one is smaller"),
    ("full_alpha", "alpha, full fit", "The same of the whole matrix: it depends on the shape, so layers cannot be compared.",
     "± standard error of the same kind, which leaves the bias out"),
    ("ks_distance", "distance", "Largest gap between tail and fitted law: above 0.2 or so, alpha means little.", "exact"),
    ("stable_rank", "stable rank", "Directions of full strength that would hold the energy.", "rounding"),
    ("effective_rank", "effective rank", "Exponential of the entropy of the spectrum: directions that are in use.", "rounding"),
    ("half_error", "error at half", "What is lost of the matrix if two thin factors with half of its parameters replace it.",
     "rounding; without data, so a compression that sees data loses less"),
    ("strength", "strength", "Size of the change by tuning, relative to the layer.", "rounding"),
    ("update_rank", "update's rank", "Effective rank of the change: how many directions tuning used.", "rounding"),
    ("intruders", "intruders", "Strong directions that the base does not have; they go along with forgetting.",
     "those of near-equal singular values are counted as doubtful"),
    ("overlap", "overlap", "Mean squared cosine between the leading directions and the base's: 1 means unturned.",
     "rounding; random directions have k / out"),
)  # fmt: skip
_FORMATS: dict[str, Callable[[float], str]] = {
    "half_error": percent, "strength": percent, "intruders": lambda v: f"{v:.0f}", "overlap": lambda v: f"{v:.3f}",
    "stable_rank": lambda v: f"{v:.1f}", "effective_rank": lambda v: f"{v:.0f}", "update_rank": lambda v: f"{v:.1f}",
}  # fmt: skip
_Rows = list[Mapping[str, Any]]


def render_diagnosis(record: Mapping[str, Any]) -> str:
    """The page of a diagnosis.

    Args:
        record: what `lowdim diagnose all` writes as `diagnose.json`. Entries that are missing or of another type are left out.

    Returns:
        One HTML document that loads nothing and runs without scripts.

    Example:
        >>> page = render_diagnosis({"model": "small", "layers": [{"name": "0.weight", "alpha": 2.1}]})
        >>> "What small looks like" in page
        True
    """
    rows = [row for row in map(mapping, items(record.get("layers"))) if number(row.get("alpha")) is not None]
    model, base = plain(record.get("model"), 120), plain(record.get("base"), 120)
    tuned = bool(base)
    section = sections.section
    body = "".join(
        (
            _opening(record, rows, tuned),
            terms(_terms(record, rows)),
            section("alpha", "Exponents by layer", _exponents(rows), _said("alpha")),
            section("spectra", "Spectra", _spectra(rows), "Singular values over the largest, from the first to the last."),
            section("strength", "Strength of the change", _layer_grid(rows, "strength"), _said("strength")),
            section("intruders", "Intruder dimensions", _layer_grid(rows, "intruders"), _said("intruders")),
            section("overlap", "Overlap of leading directions", _layer_grid(rows, "overlap", 0.0, 1.0), _said("overlap")),
            section("redundancy", "Redundancy", _redundancy(rows), _said("half_error")),
            section("limits", "LoRA limits", *limits(record)),
            section("curvature", "Curvature and stable rates", *curvature(record)),
            section("over-training", "Over-training of a readout", *dynamics(record)),
            section("meaning", "What the numbers mean", _meaning(rows), ""),
            section("layers", "All layers", sections.details("Numbers by layer", _all_layers(rows)), ""),
            section("left-out", "Not measured", _left_out(record), ""),
            section("circumstances", "Circumstances", sections.pairs(mapping(record.get("environment"))), ""),
        )
    )
    title = f"What tuning did to {base}" if tuned else f"What {model} looks like"
    view = {"kind": "diagnosis", "metric": {"name": ""}, "costs": [], "methods": [], "record": _kept(record)}
    return record_document(record, title, "lowdim diagnose", body, view)


def write_diagnosis_page(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page to `path`; an old file is replaced only once the new one is complete.

    Raises:
        OSError: no space or no permission; an old file is unchanged.
    """
    return write_page(path, render_diagnosis(record))


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record that the page carries: without the spectra's points, which are drawn."""
    layers = [{key: value for key, value in mapping(row).items() if key != "spectrum"} for row in items(record.get("layers"))]
    return _rounded(json_value({**record, "layers": layers}))


def _rounded(value: Any) -> Any:
    """Six digits: the page is small, and the JSON beside it has them all."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _opening(record: Mapping[str, Any], rows: _Rows, tuned: bool) -> str:
    if not rows:
        return ""
    alphas = [float(row["alpha"]) for row in rows]
    poor = sum((number(row.get("ks_distance")) or 0) > 0.2 for row in rows)
    reasons = [
        f"FARMS' exponents go from {min(alphas):.2f} to {max(alphas):.2f}, median {median(alphas):.2f}, over "
        f"{plural(len(rows), 'layer')}; the heaviest tail is {_extreme(rows, 'alpha', min)}, the lightest "
        f"{_extreme(rows, 'alpha', max)}."
    ]
    said = f"{plural(len(rows), 'layer')} with exponents of {min(alphas):.2f} to {max(alphas):.2f}."
    changed = _known(rows, "strength")
    tiles = [("Median alpha", f"{median(alphas):.2f}", f"{min(alphas):.2f} to {max(alphas):.2f}")]
    if tuned and changed:
        count = sum(int(v) for v in _known(rows, "intruders"))
        moved = sum(v > 0 for v in changed)
        said = f"Tuning changed {moved} of {plural(len(rows), 'layer')} and left {plural(count, 'intruder dimension')}."
        reasons.append(
            f"The change is {percent(median(changed))} of a layer in the median and {percent(max(changed))} at most "
            f"({_extreme(rows, 'strength', max)}); the least overlap of leading directions with the base's is "
            f"{min(_known(rows, 'overlap')):.3f}."
        )
        tiles += [
            ("Largest change", percent(max(changed)), "of the layer's norm"),
            ("Intruders", f"{count}", f"{sum(int(v) for v in _known(rows, 'doubtful'))} doubtful"),
        ]
    half = _known(rows, "half_error")
    if half:
        reasons.append(
            f"Two factors with half of the parameters would lose {percent(min(half))} to {percent(max(half))} of a layer."
        )
        tiles.append(("Error at half", percent(median(half)), "median, without data"))
    doubts = [f"The law does not fit {plural(poor, 'layer')} well: their distance is above 0.2."] if poor else []
    doubts.append("Exponents compare layers of one model measured with one set of options; they are no measure of quality.")
    if tuned:
        doubts.append("Intruders on flat spectra can be arbitrary: see the doubtful ones.")
    words = verdict(said, reasons, "", doubts)
    shown = sections.tile_list(tiles, "Numbers of this model")
    return f'<div class="opening"><div class="verdict">{words}</div><div class="pick">{shown}</div></div>'


def _terms(record: Mapping[str, Any], rows: _Rows) -> list[tuple[str, str]]:
    data = ", ".join(plain(name, 80) for name in items(record.get("data")))
    found = [("Model", plain(record.get("model"), 120)), ("Base", plain(record.get("base"), 120)), ("Data", data)]
    found += [("Layers", str(len(rows))), ("Time", duration(number(record.get("seconds"))))]
    return [(name, value) for name, value in found if value]


def _exponents(rows: _Rows) -> str:
    farms = [(float(r["alpha"]), number(r.get("alpha_error")), f"{r.get('name')}: {_with_error(r, 'alpha')}") for r in rows]
    full = [(v, None, f"{r.get('name')}: {v:.2f}, full fit") for r in rows if (v := number(r.get("full_alpha"))) is not None]
    drawn = dots("Exponents by layer", [("FARMS, with its error", farms), ("full fit", full)], "alpha, layers in order")
    return drawn + _layer_grid(rows, "alpha")


def _spectra(rows: _Rows) -> str:
    kept = [row for row in rows if len(items(row.get("spectrum"))) > 1]
    if not kept:
        return ""
    ends = {min(kept, key=lambda r: number(r.get("effective_rank")) or 0)["name"]}
    ends.add(max(kept, key=lambda r: (number(r.get("effective_rank")) or 0) / (number(r.get("half_rank")) or 1))["name"])
    curves = []
    for row in kept:
        values = [number(v) or 0.0 for v in items(row["spectrum"])]
        curves.append((plain(row.get("name"), 120), values, row["name"] in ends))
    return lines("Spectra of all layers", curves, "singular value over the largest")


def _redundancy(rows: _Rows) -> str:
    half = _known(rows, "half_error")
    if not half:
        return ""
    best = sorted((row for row in rows if number(row.get("half_error")) is not None), key=lambda r: r["half_error"])[:5]
    names = ", ".join(f"{_short(row)} {percent(float(row['half_error']))}" for row in best)
    said = f"Least is lost in {names}: a compression can take most there."
    return f'<p class="foot">{esc(said)}</p>' + _layer_grid(rows, "half_error")


def _meaning(rows: _Rows) -> str:
    known = [entry for entry in _MEANING if _known(rows, entry[0])]
    table = sections.numbers(("Number", "What it says", "Error"), [entry[1:] for entry in known], "What the numbers mean")
    return f'<div class="texts">{table}</div>' if table else ""


def _all_layers(rows: _Rows) -> str:
    known = [entry for entry in _MEANING if _known(rows, entry[0])]
    cells = [[plain(row.get("name"), 120), _shape(row), *(_with_error(row, key) for key, *_ in known)] for row in rows]
    return sections.numbers(("Layer", "Shape", *(entry[1] for entry in known)), cells, "Numbers by layer")


def _left_out(record: Mapping[str, Any]) -> str:
    reasons = {**mapping(record.get("not_measured")), **mapping(record.get("skipped"))}
    table = sections.numbers(("", "Why"), [(plain(k, 120), plain(v, 400)) for k, v in reasons.items()], "Not measured")
    return f'<div class="texts">{table}</div>' if table else ""


def _layer_grid(rows: _Rows, key: str, low: float | None = None, high: float | None = None) -> str:
    """One cell for each layer: blocks from top to bottom, kinds of layers from left to right."""
    blocks: list[str] = []
    kinds: list[str] = []
    cells: dict[tuple[int, int], tuple[float, str, str]] = {}
    for row in rows:
        value = number(row.get(key))
        if value is None:
            continue
        block, kind = _place(plain(row.get("name"), 200))
        blocks += [] if block in blocks else [block]
        kinds += [] if kind in kinds else [kind]
        tip = f"{row.get('name')} ({_shape(row)}): {_with_error(row, key)}"
        cells[blocks.index(block), kinds.index(kind)] = (value, _text(key, value), tip)
    short = [
        kind.rpartition(".")[2] if [k.rpartition(".")[2] for k in kinds].count(kind.rpartition(".")[2]) == 1 else kind[-12:]
        for kind in kinds
    ]
    return grid(next(entry[1] for entry in _MEANING if entry[0] == key), blocks, short, cells, low=low, high=high)


def _place(name: str) -> tuple[str, str]:
    """The number of the block and the kind of the layer."""
    parts = name.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return "", ".".join(parts)
    return ".".join(parts[at : at + 1]), ".".join(parts[at + 1 :]) or "layer"


def _short(row: Mapping[str, Any]) -> str:
    block, kind = _place(plain(row.get("name"), 200))
    return f"{block} {kind}".strip()


def _extreme(rows: _Rows, key: str, pick: Callable[..., Mapping[str, Any]]) -> str:
    return _short(pick((row for row in rows if number(row.get(key)) is not None), key=lambda row: row[key]))


def _known(rows: _Rows, key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _shape(row: Mapping[str, Any]) -> str:
    return " x ".join(plain(size, 12) for size in items(row.get("shape")))


def _text(key: str, value: float) -> str:
    return _FORMATS.get(key, lambda v: f"{v:.2f}")(value)


def _with_error(row: Mapping[str, Any], key: str) -> str:
    value, error = number(row.get(key)), number(row.get(f"{key}_error"))
    if value is None:
        return ""
    doubtful = number(row.get("doubtful")) if key == "intruders" else None
    text = _text(key, value) + (f" ({doubtful:.0f} doubtful)" if doubtful else "")
    return text if error is None else f"{text} ± {error:.2f}"


def _said(key: str) -> str:
    """The sentence of a number, and its error."""
    entry = next(entry for entry in _MEANING if entry[0] == key)
    return f"{entry[2]} Error: {entry[3]}."
