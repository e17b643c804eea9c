"""The parts of the page in plain HTML: they need no scripts, and work in print and with screen readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lowdim.report.record import Candidate, Comparison
from lowdim.report.text import MISSING, count, duration, error, esc, number, percent, plain, rate, ratio, size

__all__ = ["SHAPES", "details", "glyph", "key_figures", "left_out", "load", "method_table", "section", "shapes"]

# A marker for each family, distinguishable without colour. Each fits a 16 × 16 box around the origin and has about one area.
SHAPES = {
    "circle": "M0-5.6A5.6 5.6 0 1 1 0 5.6A5.6 5.6 0 1 1 0-5.6Z",
    "square": "M-5-5H5V5H-5Z",
    "triangle": "M0-6.6L6.4 5H-6.4Z",
    "diamond": "M0-7L7 0L0 7L-7 0Z",
    "down": "M0 6.6L6.4-5H-6.4Z",
    "plus": "M-2.3-6.4H2.3V-2.3H6.4V2.3H2.3V6.4H-2.3V2.3H-6.4V-2.3H-2.3Z",
    "hexagon": "M-6.4 0L-3.2-5.6H3.2L6.4 0L3.2 5.6H-3.2Z",
    "star": "M0-7.4L2-2.3L7-2.3L3.2 1.3L4.6 6.4L0 3.5L-4.6 6.4L-3.2 1.3L-7-2.3L-2-2.3Z",
}
_FAMILIES = {"adapters": "circle", "optim": "square", "layers": "triangle", "compress": "diamond", "represent": "down"}
_FAMILIES |= {"diagnose": "plus", "solve": "hexagon"}


def shapes(candidates: Iterable[Candidate]) -> dict[str, str]:
    """The marker of each family, known families first; families beyond the number of markers share the star."""
    chosen: dict[str, str] = {}
    for family in dict.fromkeys(c.family for c in candidates):
        free = [shape for shape in reversed(SHAPES) if shape not in chosen.values() and shape not in _FAMILIES.values()]
        free += [shape for shape in reversed(SHAPES) if shape not in chosen.values()]
        chosen[family] = _FAMILIES.get(family) or (free[0] if free else "star")
    return chosen


def glyph(candidate: Candidate, shape: str) -> str:
    """The method's marker in its colour."""
    mark = f'<use href="#m-{shape}" x="-8" y="-8" width="16" height="16"/>'
    return f'<svg class="glyph {candidate.colour}" viewBox="-8 -8 16 16" aria-hidden="true">{mark}</svg>'


def section(name: str, title: str, body: str, hint: str = "") -> str:
    """One section with its heading; an empty string if the body is empty."""
    if not body:
        return ""
    lead = f'<p class="hint">{esc(hint)}</p>' if hint else ""
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{esc(title)}</h2>{lead}{body}</section>'


def key_figures(comparison: Comparison) -> str:
    """The chosen method's numbers, each next to the baseline's."""
    chosen = comparison.chosen or comparison.best
    if chosen is None:
        return ""
    base = comparison.baseline if comparison.baseline is not chosen else None

    def against_baseline(key: str) -> str:
        times = ratio(getattr(chosen, key), getattr(base, key)) if base else None
        return f"{times} of {base.label}" if times and base else ""

    difference = ""
    if base and base.mean is not None and chosen.mean is not None:
        change = chosen.mean - base.mean
        difference = f"{'+' if change >= 0 else '−'}{comparison.score(abs(change))} against {base.label}"
    interval = comparison.interval(chosen)
    memory = "Peak memory" if chosen.measured_peak_bytes is not None else "Peak memory, forecast"
    tiles = [
        (comparison.metric, comparison.score(chosen.mean), f"{interval}\n{difference}".strip()),
        (memory, size(chosen.peak_bytes), against_baseline("peak_bytes")),
        ("Time per step", duration(chosen.seconds_per_step), against_baseline("seconds_per_step")),
        ("Trained parameters", count(chosen.trained_parameters), against_baseline("trained_parameters")),
        ("Saved file", size(chosen.file_bytes), against_baseline("file_bytes")),
        *_trivial_tiles(comparison),
    ]
    return tile_list(tiles, f"Numbers of {chosen.label}")


def _trivial_tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """What was never trained scores, next to the chosen method's numbers."""
    rows = [c for c in comparison.finished if c.trivial]
    return [(c.label, comparison.score(c.mean), f"{comparison.metric}: {c.reason}" if c.reason else "") for c in rows]


def tile_list(tiles: list[tuple[str, str, str]], label: str) -> str:
    """Large numbers with a name above and a remark below; missing ones are left out."""
    cells = "".join(
        f'<div class="tile"><dt>{esc(name)}</dt><dd>{esc(value)}</dd><dd class="aside">{esc(remark)}</dd></div>'
        for name, value, remark in tiles
        if value and value != MISSING
    )
    return f'<dl class="tiles" aria-label="{esc(label)}">{cells}</dl>' if cells else ""


def method_table(comparison: Comparison) -> str:
    """All methods that ran, best first."""
    if not comparison.finished:
        return ""
    marks = shapes(comparison.candidates)
    heads = [
        ("Method", "text", ""),
        (comparison.metric, "number", "mean, 95 % interval, seeds"),
        ("Trained", "number", _share_note(comparison)),
        ("Peak memory", "number", "measured"),
        ("Forecast", "number", "and its error"),
        ("Time", "number", "per step"),
        ("File", "number", "saved"),
        ("Pareto", "number", ""),
    ]
    head = "".join(
        f'<th scope="col" data-sort="{kind}"><span class="th">{esc(name)}</span><small>{esc(note)}</small></th>'
        for name, kind, note in heads
    )
    rows = "".join(_row(comparison, candidate, marks[candidate.family]) for candidate in comparison.finished)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of methods">'
        f'<table class="methods"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _share_note(comparison: Comparison) -> str:
    return "of the model" if number(comparison.model.get("parameters")) else "parameters"


def _row(comparison: Comparison, candidate: Candidate, shape: str) -> str:
    chosen = candidate is comparison.chosen
    tag = '<span class="tag win">pick</span>' if chosen else ""
    near = ""
    if candidate.within_noise and candidate is not comparison.best:
        words = "the best is not clearly better" if candidate.trivial else "within noise of the best"
        near = f'<span class="near" title="{words}" aria-hidden="true">≈</span><span class="sr">{words}</span>'
    total, trained = number(comparison.model.get("parameters")), candidate.trained_parameters
    share = percent(trained / total) if total and trained is not None and trained <= total else ""
    off = error(candidate.forecast_peak_bytes, candidate.measured_peak_bytes)
    kind = "not trained" if candidate.trivial else "baseline" if candidate.baseline else ""
    under = [esc(part) for part in dict.fromkeys([kind, "" if candidate.trivial else candidate.family]) if part]
    under += [f'<span class="nb">lr {rate(candidate.lr)}</span>'] if candidate.lr is not None else []
    cells = [
        _cell(candidate.mean, f'<div class="scored"><div><b>{comparison.score(candidate.mean)}</b>{near}'
                              f"<small>{comparison.interval(candidate)}</small></div>{_interval(comparison, candidate)}</div>"),
        _cell(trained, f"{count(trained)}<small>{share}</small>"),
        _cell(candidate.measured_peak_bytes, size(candidate.measured_peak_bytes)),
        _cell(candidate.forecast_peak_bytes, f"{size(candidate.forecast_peak_bytes)}<small>{off or ''}</small>"),
        _cell(candidate.seconds_per_step, duration(candidate.seconds_per_step)),
        _cell(candidate.file_bytes, size(candidate.file_bytes)),
        _cell(1 if candidate.pareto else 0, '<span class="yes" title="on the Pareto front">★</span>'
                                            '<span class="sr">on the front</span>' if candidate.pareto else ""),
    ]  # fmt: skip
    return (
        f'<tr{" class=chosen" if chosen else ""}><th scope="row" data-v="{esc(candidate.label)}"><div class="name">'
        f"{glyph(candidate, shape)}<div><span>{esc(candidate.label)}</span>{tag}<small>{' · '.join(under)}</small></div></div>"
        f"</th>{''.join(cells)}</tr>"
    )


def _cell(value: float | None, body: str) -> str:
    return f'<td data-v="{"" if value is None else f"{value:.9g}"}">{body}</td>'


def _interval(comparison: Comparison, candidate: Candidate) -> str:
    """Mean and interval on one scale for all rows, over a band that is the best method's interval."""
    low, high = _fences(comparison)
    if candidate.mean is None or high <= low:
        return ""

    def x(value: float) -> float:
        return round(6 + 118 * (min(max(value, low), high) - low) / (high - low), 1)

    best = comparison.best
    band = line = ""
    if best and best.interval:
        start, end = x(best.interval[0]), x(best.interval[1])
        band = f'<rect class="band" x="{start}" y="0" width="{end - start:.1f}" height="18" rx="2"/>'
    if not low <= candidate.mean <= high:  # far from the rest: an arrow at the edge, so that the rest stays readable
        tip = "M1 9L8 5V13Z" if candidate.mean < low else "M129 9L122 5V13Z"
        body = f'<path class="beyond" d="{tip}"/>'
    else:
        if candidate.interval:
            line = f'<line x1="{x(candidate.interval[0])}" x2="{x(candidate.interval[1])}" y1="9" y2="9"/>'
        inside = [s for s in candidate.scores[:20] if low <= s <= high]
        dots = "".join(f'<circle class="seed" cx="{x(s)}" cy="9" r="1.6"/>' for s in inside)
        body = f'{line}{dots}<circle class="mean" cx="{x(candidate.mean)}" cy="9" r="4"/>'
    return f'<svg class="interval {candidate.colour}" viewBox="0 0 130 18" aria-hidden="true">{band}{body}</svg>'


def _fences(comparison: Comparison) -> tuple[float, float]:
    """Ends of the scale: all means but those 1.5 interquartile ranges away from the middle half, with their intervals."""
    means = sorted(c.mean for c in comparison.ranked if c.mean is not None)
    if not means:
        return 0.0, 0.0
    lower, upper = means[len(means) // 4], means[-1 - len(means) // 4]
    reach = 1.5 * (upper - lower)
    near = [c for c in comparison.ranked if c.mean is not None and lower - reach <= c.mean <= upper + reach]
    ends = [end for c in near for end in (c.mean, *c.scores, *(c.interval or ())) if end is not None]
    return min(ends), max(ends)


def left_out(comparison: Comparison) -> str:
    """Skipped and failed methods, with the reason."""
    marks = shapes(comparison.candidates)
    rows = []
    for candidate in comparison.left_out:
        forecast = candidate.forecast_peak_bytes
        note = f"<small>forecast {size(forecast)}</small>" if forecast is not None else ""
        kind = "skipped" if candidate.status == "skipped" else "failed"
        rows.append(
            f'<li><div class="name">{glyph(candidate, marks[candidate.family])}<div><span>{esc(candidate.label)}</span>'
            f'<span class="tag {kind}">{esc(candidate.status, 40)}</span>{note}</div></div>'
            f'<p class="reason">{esc(candidate.reason, 4000) or "No reason was recorded."}</p></li>'
        )
    return f'<ul class="left-out">{"".join(rows)}</ul>' if rows else ""


def load(comparison: Comparison) -> str:
    """The folder of the winner, and the code that loads it."""
    winner = comparison.winner
    code = plain(winner.get("how_to_load"), 8000)
    facts = pairs({"Folder": winner.get("folder"), "Format": winner.get("format")})
    why = f"<p>{esc(winner.get('why'))}</p>" if plain(winner.get("why")) else ""
    block = f'<div class="code"><pre tabindex="0"><code>{esc(code, 8000)}</code></pre></div>' if code else ""
    return f"{why}{facts}{block}" if code or facts else why


def details(title: str, body: str, opened: bool = False) -> str:
    """A collapsible block."""
    return f"<details{' open' if opened else ''}><summary>{esc(title)}</summary>{body}</details>" if body else ""


def pairs(values: Mapping[Any, Any], skip: Iterable[str] = ()) -> str:
    """Names and values; nested ones are written out, empty ones left out."""
    rows = "".join(
        f"<div><dt>{esc(str(key).removesuffix('_bytes').replace('_', ' '), 120)}</dt><dd>{shown}</dd></div>"
        for key, value in list(values.items())[:200]
        if key not in skip and (shown := _value(str(key), value))
    )
    return f'<dl class="pairs">{rows}</dl>' if rows else ""


def _value(key: str, value: Any, depth: int = 0) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    amount = number(value)
    if amount is not None:
        if key.endswith("_bytes"):
            return size(amount)
        return esc(f"{amount:,.0f}" if isinstance(value, int) else rate(amount))
    if isinstance(value, Mapping) and depth < 3:
        inner = (f"{esc(k, 120)} {_value(str(k), v, depth + 1)}" for k, v in list(value.items())[:100])
        return ", ".join(inner)
    if isinstance(value, (list, tuple)) and depth < 3:
        inner = [_value(key, v, depth + 1) for v in value[:100]]
        return ", ".join(v for v in inner if v)
    return esc(value)
