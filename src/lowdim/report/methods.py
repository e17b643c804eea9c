"""The table of all methods, what left the search, and what was never run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lowdim.report.axis import Scale, fences
from lowdim.report.record import Candidate, Comparison
from lowdim.report.sections import details, glyph, shapes
from lowdim.report.text import count, duration, error, esc, number, percent, plain, plural, rate, size

__all__ = ["departed", "forecast_sentence", "forecasts_shown", "left_out", "method_table", "table_hint"]

_AGREES = 0.1  # a forecast that is off by less agrees with the measurement


@dataclass(frozen=True)
class _Column:
    """A column: its head, a value to sort by, and its cell as HTML."""

    title: str
    note: str
    value: Callable[[Candidate], float | None]
    cell: Callable[[Candidate], str]
    kind: str = ""
    axis: str = ""


def method_table(comparison: Comparison) -> str:
    """All rows that have a result, best first; on a phone each row is a card."""
    rows = comparison.finished
    if not rows:
        return ""
    marks = shapes(comparison.candidates)
    columns = _columns(comparison)
    head = "".join(_head(column) for column in columns)
    body = "".join(_row(comparison, c, "circle" if c.trivial else marks[c.family], columns) for c in rows)
    axis = next((column for column in columns if column.axis), None)
    scale = f'<div class="phone-axis"><span>{esc(axis.title)}, {esc(axis.note)}</span>{axis.axis}</div>' if axis else ""
    return (
        f'{scale}<div class="scroll cards" tabindex="0" role="region" aria-label="Table of methods">'
        f'<table class="methods" role="table"><thead role="rowgroup"><tr role="row">'
        f'<th scope="col" role="columnheader" data-sort="text"><span class="th">Method</span></th>{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></div>'
    )


def table_hint(comparison: Comparison) -> str:
    """How to read the table."""
    if not comparison.judgement:
        return (
            "Best first; click a column’s name to sort by it. ≈ marks scores within noise of the best, and the band behind the "
            "intervals is the best method’s."
        )
    if comparison.judgement.half_width is None:
        return "Best first; click a column’s name to sort by it."
    return (
        "Best first; click a column’s name to sort by it. Each interval is that of the difference to the best mean; where it "
        "reaches the line at 0 (filled points), the row may be the best."
    )


def _columns(comparison: Comparison) -> list[_Column]:
    rows = comparison.finished
    columns = [
        _Column(comparison.metric, _seeds(comparison), lambda c: c.mean, lambda c: _score(comparison, c), "score"),
        _difference(comparison),
        _Column("Peak memory", "measured", lambda c: c.measured_peak_bytes, lambda c: size(c.measured_peak_bytes)),
        _Column("Time", "per step", lambda c: c.seconds_per_step, lambda c: duration(c.seconds_per_step)),
        _Column("File", "to hand over", lambda c: c.file_bytes, lambda c: size(c.file_bytes)),
        _Column(
            "Trained",
            _share_note(comparison),
            lambda c: None if c.trivial else c.trained_parameters,
            lambda c: _trained(comparison, c),
        ),
    ]
    if any(c.flops_per_token for c in rows):
        columns.append(_Column("FLOPs", "a token", lambda c: c.flops_per_token, lambda c: count(c.flops_per_token)))
    if any(c.kept for c in rows):
        columns.insert(2, _Column("Kept", "loss", lambda c: c.kept[1] if c.kept else None, _kept))
    if forecasts_shown(comparison):
        columns.append(_Column("Forecast", "of the peak", lambda c: c.forecast_peak_bytes, _forecast))
    return [c for c in columns if c.axis or c.kind == "score" or any(c.value(row) is not None for row in rows)]


def _difference(comparison: Comparison) -> _Column:
    """The difference to the best with its interval; in records without a judgement the interval of the score itself."""
    if comparison.judgement is None:
        scale = _score_scale(comparison)
        axis = scale.head() if scale else ""
        return _Column(
            "95 % interval", "of the mean", lambda c: c.mean, lambda c: _interval(comparison, c, scale), "wide", axis
        )
    scale = _behind_scale(comparison)
    axis = scale.head() if scale else ""
    note = f"{comparison.difference_unit}, {percent(comparison.judgement.level)} interval"
    return _Column("Behind the best", note, lambda c: c.behind, lambda c: _behind(comparison, c, scale), "wide", axis)


def _behind_scale(comparison: Comparison) -> Scale | None:
    found = comparison.judgement
    known = [comparison.points * c.behind for c in comparison.ranked if c.behind is not None]
    if found is None or not known:
        return None
    half = comparison.points * (found.half_width or 0.0)
    high = max(fences(known)[1] + half, 2 * half)
    band = (0.0, half) if half else None
    return Scale.over(-0.12 * high, 1.04 * high, band, 0.0)


def _behind(comparison: Comparison, candidate: Candidate, scale: Scale | None) -> str:
    if candidate.behind is None:
        return ""
    half = comparison.half_width(candidate)
    leads = candidate.behind == 0
    ends = None if half is None or leads else (candidate.behind - half, candidate.behind + half)
    text = "best mean" if leads else comparison.difference(candidate.behind)
    text += f" <small>± {comparison.difference(half)}</small>" if ends and half else ""
    if scale is None:
        return text
    filled, times = candidate.may_be_best is True, comparison.points
    shown = [times * end for end in ends] if ends else None
    drawn = scale.row(times * candidate.behind, shown, colour=candidate.colour, filled=filled)
    return f'<div class="apart"><span>{text}</span>{drawn}</div>'


def _score_scale(comparison: Comparison) -> Scale | None:
    ranked = [c for c in comparison.ranked if c.mean is not None]
    if not ranked:
        return None
    low, high = fences(c.mean for c in ranked if c.mean is not None)
    near = [c for c in ranked if c.mean is not None and low <= c.mean <= high]
    ends = [end for c in near for end in (c.mean, *c.scores, *(c.interval or ())) if end is not None]
    best = comparison.best
    band = (best.interval[0], best.interval[1]) if best and best.interval else None
    return Scale.over(min(ends), max(ends), band)


def _interval(comparison: Comparison, candidate: Candidate, scale: Scale | None) -> str:
    if candidate.mean is None:
        return ""
    seeds = candidate.scores[:20]
    drawn = scale.row(candidate.mean, candidate.interval, colour=candidate.colour, filled=True, seeds=seeds) if scale else ""
    return f'<div class="apart"><span><small>{comparison.interval(candidate)}</small></span>{drawn}</div>'


def _score(comparison: Comparison, candidate: Candidate) -> str:
    near = ""
    if comparison.judgement is None and candidate.within_noise and candidate is not comparison.best:
        words = "the best is not clearly better" if candidate.trivial else "within noise of the best"
        near = f'<span class="near" title="{words}" aria-hidden="true">≈</span><span class="sr">{words}</span>'
    return f"<b>{comparison.score(candidate.mean)}</b>{near}"


def _seeds(comparison: Comparison) -> str:
    amounts = {len(c.scores) for c in comparison.ranked if c.scores}
    low, high = min(amounts, default=0), max(amounts, default=0)
    return "" if not high else f"mean of {plural(high, 'seed')}" if low == high else f"mean of {low} to {high} seeds"


def _kept(candidate: Candidate) -> str:
    if not candidate.kept:
        return ""
    before, after = candidate.kept
    change = after - before
    sign = "+" if change > 0 else "−"
    return f"{after:.3f}<small>{f'{sign}{abs(change):.3f}' if abs(change) >= 0.0005 else 'unchanged'}</small>"


def _trained_count(candidate: Candidate) -> int | None:
    return None if candidate.trivial else candidate.trained_parameters


def _trained(comparison: Comparison, candidate: Candidate) -> str:
    total, trained = number(comparison.model.get("parameters")), candidate.trained_parameters
    share = percent(trained / total) if total and trained is not None and trained <= total else ""
    return f"{count(trained)}<small>{share}</small>"


def _share_note(comparison: Comparison) -> str:
    return "of the model" if number(comparison.model.get("parameters")) else "parameters"


def _forecast(candidate: Candidate) -> str:
    off = error(candidate.forecast_peak_bytes, candidate.measured_peak_bytes)
    return f"{size(candidate.forecast_peak_bytes)}<small>{off or ''}</small>"


def worst_forecast(comparison: Comparison) -> float | None:
    """The largest error of a forecast of the peak, as a share of the measurement; None where there is nothing to compare."""
    both = [(c.forecast_peak_bytes, c.measured_peak_bytes) for c in comparison.finished if c.forecast_peak_bytes is not None]
    return max((abs(forecast / measured - 1) for forecast, measured in both if measured), default=None)


def forecasts_shown(comparison: Comparison) -> bool:
    """Whether forecasts say something that the measurements do not: they are off, or stand in for them."""
    worst = worst_forecast(comparison)
    alone = any(c.forecast_peak_bytes is not None and not c.measured_peak_bytes for c in comparison.finished)
    return alone or (worst is not None and worst >= _AGREES)


def forecast_sentence(comparison: Comparison) -> str:
    """What the forecasts say where they are folded away."""
    worst = worst_forecast(comparison)
    if worst is None or forecasts_shown(comparison):
        return ""
    return (
        f"Peak memory was forecast before training; every forecast is within {percent(max(0.01, worst))} of what was measured."
    )


def _head(column: _Column) -> str:
    name = f' class="{column.kind}"' if column.kind else ""
    note = f"<small>{esc(column.note)}</small>" if column.note else ""
    return (
        f'<th scope="col" role="columnheader" data-sort="number"{name}><span class="th">{esc(column.title)}</span>'
        f"{note}{column.axis}</th>"
    )


def _row(comparison: Comparison, candidate: Candidate, shape: str, columns: list[_Column]) -> str:
    chosen = candidate is comparison.chosen
    tags = "".join(f'<span class="tag {name}">{esc(text)}</span>' for name, text in _tags(comparison, candidate))
    under = [esc(part) for part in [candidate.family if not candidate.trivial else plain(candidate.reason, 200)] if part]
    under += [f'<span class="nb">{esc(text)}</span>' for text in comparison.chosen_settings(candidate)]
    kind = " ".join(name for name, on in (("chosen", chosen), ("reference", candidate.trivial)) if on)
    cells = "".join(_cell(column, candidate) for column in columns)
    return (
        f'<tr role="row" class="{kind}">'
        f'<th scope="row" role="rowheader" data-v="{esc(candidate.label)}"><div class="name">{glyph(candidate, shape)}'
        f"<div><span>{esc(candidate.label)}</span>{tags}<small>{' · '.join(under)}</small></div></div></th>{cells}</tr>"
    )


def _tags(comparison: Comparison, candidate: Candidate) -> list[tuple[str, str]]:
    found = comparison.judgement
    tags = [("win", "pick")] if candidate is comparison.chosen else []
    if candidate.trivial:
        tags.append(("ref", "reference"))
    if found and found.best == candidate.name:
        tags.append(("may", "best"))
    elif candidate.may_be_best:
        tags.append(("may", comparison.marked_as))
    if found and candidate.name in found.apart:
        tags.append(("skipped", "own variance"))
    return tags


def _cell(column: _Column, candidate: Candidate) -> str:
    value = column.value(candidate)
    name = f' class="{column.kind}"' if column.kind else ""
    body = column.cell(candidate) if value is not None or column.kind == "score" else ""
    shown = "" if value is None else f"{value:.9g}"
    label = esc(column.title.removeprefix("Peak ").capitalize())
    return f'<td role="cell" data-v="{shown}" data-label="{label}"{name}>{body}</td>'


def departed(comparison: Comparison) -> str:
    """The methods that left in the search, folded away: when, with which score, and why."""
    rows = []
    for candidate in comparison.departed:
        last = comparison.departure(candidate)
        score = comparison.score(last.score) if last and last.score is not None else ""
        settings = ", ".join(comparison.chosen_settings(candidate) or ([f"lr {rate(last.lr)}"] if last else []))
        when = f"after {plural(last.steps, 'step')}" if last else ""
        why = candidate.reason or (last.reason if last else "")
        cells = [esc(settings), when, score, size(candidate.peak_bytes), esc(why)]
        rows.append(f'<tr><th scope="row">{esc(candidate.label)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    if not rows:
        return ""
    heads = ("Method", "Its best candidate", "Left", f"Validation {comparison.metric}", "Peak memory", "Why")
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in heads)
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Methods that left in the search">'
        f'<table class="numbers prose"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    were = "was" if len(rows) == 1 else "were"
    return details(f"{plural(len(rows), 'method')} left in the search and {were} not scored on the test part", table)


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
