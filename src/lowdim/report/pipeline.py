"""The HTML page of a pipeline of compressions: what each step made of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.records import metric_title
from lowdim.report import sections
from lowdim.report.findings import items, mapping
from lowdim.report.frame import chart, record_document
from lowdim.report.opening import terms, verdict
from lowdim.report.text import MISSING, count, duration, esc, number, percent, plain, size

__all__ = ["point_view", "render_pipeline", "write_pipeline"]

_COSTS = (
    ("disk", "Bytes on disk", "bytes"),
    ("memory", "Bytes in memory", "bytes"),
    ("cache", "Cache per token", "bytes"),
)
_COLOURS = 8


def render_pipeline(record: Mapping[str, Any]) -> str:
    """The page of a pipeline.

    Args:
        record: what `pipeline.json` holds; entries that are missing or of another type are left out.

    Returns:
        One HTML document that loads nothing.

    Example:
        >>> step = {"step": "dense", "what": "the model as it is", "score": 20.0, "disk_bytes": 2**20}
        >>> page = render_pipeline({"title": "Small", "metric": "perplexity", "steps": [step]})
        >>> "1.00 MiB" in page
        True
    """
    record = mapping(record)
    steps = [mapping(step) for step in items(record.get("steps"))]
    metric = metric_title(plain(record.get("metric"), 60) or "score")
    section, details = sections.section, sections.details
    recipe = mapping(record.get("recipe"))
    body = "".join(
        (
            _opening(record, steps, metric),
            terms(_terms(record)),
            section("steps", "Step by step", _table(steps, metric), _hint(metric)),
            _chart(steps, metric),
            section("errors", "Error by block", _errors(steps), _ERRORS),
            section("layers", "What each layer got", _layers(steps)),
            section("the-data", "Data", sections.pairs(mapping(record.get("data")), skip=("columns",))),
            section(
                "circumstances",
                "Circumstances",
                details("Recipe", sections.pairs(recipe, skip=("steps",)) + _options(steps), opened=True)
                + details("Model", sections.pairs(mapping(record.get("model"))))
                + details("Machine and versions", sections.pairs(mapping(record.get("environment")))),
            ),
        )
    )
    points = [
        point_view(_name(i, step), step, i == len(steps) - 1, costs=_costs(step), colour=i) for i, step in enumerate(steps)
    ]
    view = {
        "kind": "pipeline",
        "title": plain(record.get("title"), 300),
        "metric": {"name": metric, "higher": bool(record.get("higher_is_better")), "decimals": 4},
        "costs": [{"key": key, "title": title, "unit": unit} for key, title, unit in _COSTS],
        "methods": points,
    }
    return record_document(record, plain(record.get("title"), 300) or "A pipeline", "lowdim compress", body, view)


def write_pipeline(record: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page to `path`; an old file is replaced only once the new one is complete.

    Raises:
        OSError: no space or no permission; an old file is unchanged.
    """
    return write_page(path, render_pipeline(record))


def point_view(
    label: str,
    row: Mapping[str, Any],
    chosen: bool,
    *,
    costs: Mapping[str, float | None],
    colour: int,
    family: str = "compress",
) -> dict[str, Any]:
    """A point of the chart, as the script reads methods."""
    ends = [number(end) for end in items(row.get("interval"))]
    return {
        "name": label,
        "label": label,
        "family": family,
        "shape": "diamond",
        "colour": f"c{colour % _COLOURS}",
        "dash": 0,
        "baseline": False,
        "chosen": chosen,
        "near": None,
        "trivial": False,
        "may": None,
        "marked": "",
        "behind": None,
        "half": None,
        "mean": number(row.get("score")),
        "interval": ends if len(ends) == 2 and None not in ends else None,
        "seeds": 0,
        "costs": dict(costs),
        "forecast": False,
        "lr": None,
        "size": None,
        "edge": False,
        "trials": [],
        "curves": [],
    }


def _name(index: int, step: Mapping[str, Any]) -> str:
    return f"{index}. {plain(step.get('step'), 40)}" if index else plain(step.get("step"), 40) or "dense"


def _costs(step: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: number(step.get(f"{key}_bytes")) for key, _, _ in _COSTS}


def _opening(record: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], metric: str) -> str:
    """What came out of it in a sentence, what speaks against it, and the figures of the last step."""
    if not steps:
        return ""
    first, last = steps[0], steps[-1]
    before, after = number(first.get("disk_bytes")), number(last.get("disk_bytes"))
    said = "No step is finished yet."
    if len(steps) > 1 and before and after:
        said = f"{size(before)} became {size(after)}: {after / before:.2f} of the dense model."
    scores = f"{metric} {_score(first)} before, {_score(last)} after{_change_text(last, record)}"
    doubts = [plain(note) for step in steps for note in items(step.get("notes")) if note is not None]
    if not record.get("finished"):
        wanted = len(items(mapping(record.get("recipe")).get("steps")))
        doubts.insert(0, f"{len(steps) - 1} of {wanted} steps are finished; --resume goes on.")
    tiles = [
        (metric, _score(last), f"{_score(first)} before"),
        ("On disk", size(after), f"{size(before)} before"),
        ("In memory", size(number(last.get("memory_bytes"))), f"{size(number(first.get('memory_bytes')))} before"),
        ("Cache per token", size(number(last.get("cache_bytes"))), f"{size(number(first.get('cache_bytes')))} before"),
        *((f"Tokens a second, batch {b}", _speed(last, b), f"{_speed(first, b)} before") for b in ("1", "8")),
    ]
    words = verdict(said, [f"{scores[:1].upper()}{scores[1:]}."], "", doubts)
    figures = sections.tile_list(tiles, "Numbers of the last step")
    return f'<div class="opening"><div class="verdict">{words}</div><div class="pick">{figures}</div></div>'


def _terms(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, data = mapping(record.get("model")), mapping(record.get("data"))
    rows = [
        ("Model", plain(model.get("label"), 80)),
        ("Parameters", count(number(model.get("parameters")))),
        ("Data", plain(data.get("name"), 80)),
        ("Held-out rows", plain(data.get("test"), 20)),
    ]
    return [(name, value) for name, value in rows if value and value != MISSING]


def _hint(metric: str) -> str:
    against = "as a factor" if metric == "perplexity" else "as a difference"
    return (
        f"Each row is the model after that step. Intervals are at 95 % over the held-out rows; the change is against the dense "
        f"model, {against}, on the same rows. Speeds are by the clock on this machine."
    )


def _table(steps: Sequence[Mapping[str, Any]], metric: str) -> str:
    heads = ("Step", metric, "95 % interval", "Change", "Disk", "Memory", "Cache / token", "Tokens/s, 1", "Tokens/s, 8", "Took")
    rows = [
        (
            _name(i, step),
            _score(step),
            _ends(step.get("interval")),
            _ends(step.get("change"), signed=True) if i else "",
            *(size(value) for value in _costs(step).values()),
            _speed(step, "1"),
            _speed(step, "8"),
            duration(number(step.get("seconds"))) if i else "",
        )
        for i, step in enumerate(steps)
    ]
    said = "".join(f"<li>{esc(_name(i, step))}: {esc(step.get('what'))}</li>" for i, step in enumerate(steps) if i)
    return sections.numbers(heads, rows, "The steps") + (f'<ul class="notes">{said}</ul>' if said else "")


def _chart(steps: Sequence[Mapping[str, Any]], metric: str) -> str:
    if len([step for step in steps if number(step.get("score")) is not None]) < 2:
        return ""
    return chart("costs", f"What {metric} costs", "Each point is the model after a step, with its interval.", "scatter", "")


_ERRORS = (
    "The distance of each block's output to the dense model's on the same few samples, as a share of its size. Errors of "
    "earlier blocks are in the inputs of later ones."
)


def _errors(steps: Sequence[Mapping[str, Any]]) -> str:
    later = [(i, mapping(step.get("block_errors"))) for i, step in enumerate(steps) if i]
    names = list(dict.fromkeys(name for _, errors in later for name in errors))
    rows = [
        (name, *("" if (value := number(errors.get(name))) is None else f"{value:.3f}" for _, errors in later))
        for name in names[:500]
    ]
    return sections.numbers(("Block", *(_name(i, steps[i]) for i, _ in later)), rows, "Errors by block") if later else ""


def _layers(steps: Sequence[Mapping[str, Any]]) -> str:
    """A block for each step that replaced layers."""
    parts = []
    for i, step in enumerate(steps):
        rows = [
            (plain(row.get("name"), 120), plain(row.get("what") or row.get("note"), 120), _error_text(row))
            for row in map(mapping, items(step.get("layers"))[:2000])
        ]
        parts.append(
            sections.details(
                f"{_name(i, step)}: {len(rows)} layers", sections.numbers(("Layer", "Became", "Relative error"), rows, "Layers")
            )
            if rows
            else ""
        )
    return "".join(parts)


def _error_text(row: Mapping[str, Any]) -> str:
    value = number(row.get("relative_error"))
    return "" if value is None or not row.get("replaced") else f"{value:.4f}"


def _options(steps: Sequence[Mapping[str, Any]]) -> str:
    found = {
        _name(i, step): {
            key: value
            for key, value in mapping(step.get("options")).items()
            if not isinstance(value, Mapping) and value is not None
        }
        for i, step in enumerate(steps)
    }
    return sections.pairs({name: options for name, options in found.items() if options})


def _score(step: Mapping[str, Any]) -> str:
    value = number(step.get("score"))
    return MISSING if value is None else f"{value:.4g}"


def _speed(step: Mapping[str, Any], batch: str) -> str:
    value = number(mapping(step.get("tokens_per_second")).get(batch))
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ends(value: Any, signed: bool = False) -> str:
    """`1.21 [1.19, 1.23]`, or the two ends alone."""
    found = [number(part) for part in items(value)]
    known = [part for part in found if part is not None and math.isfinite(part)]
    if len(known) != len(found) or len(found) not in (2, 3):
        return MISSING
    texts = [f"{part:.4g}".replace("-", "−") for part in known]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]" if signed and len(texts) == 3 else f"{texts[0]} to {texts[1]}"


def _change_text(step: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    found = [number(part) for part in items(step.get("change"))]
    if len(found) != 3 or None in found:
        return ""
    if record.get("metric") == "perplexity":
        return f", {percent(abs((found[0] or 1.0) - 1))} {'more' if (found[0] or 1.0) >= 1 else 'less'}"
    return f" ({_ends(found, signed=True)})"
