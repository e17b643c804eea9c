"""What the page begins with: the verdict in its strong type, the reasons below it, and the figures of the pick."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lowdim.report.record import Candidate, Comparison
from lowdim.report.sections import tile_list
from lowdim.report.sentences import headline
from lowdim.report.text import count, duration, esc, ratio, size

__all__ = ["opening", "terms", "verdict"]

_LONG = 70  # characters; a longer verdict is set in smaller type


def opening(comparison: Comparison, doubts: list[str]) -> str:
    """The verdict with its reasons and doubts, beside the figures of the method that is handed over."""
    found = comparison.judgement
    if found:
        words = verdict(found.headline, found.reasons, found.needed, doubts)
    else:
        said, rest = headline(comparison)
        words = verdict(f"{said}.", [rest], "", doubts)
    return f'<div class="opening"><div class="verdict">{words}</div>{_figures(comparison)}</div>'


def verdict(said: str, reasons: Iterable[str], needed: str, doubts: Iterable[str]) -> str:
    """The verdict as a heading, the sentences that carry its numbers, and what speaks against it."""
    entries = "".join(f"<p>{_whole(line)}</p>" for line in reasons if line)
    more = f'<p class="needed">{_whole(needed)}</p>' if needed else ""
    listed = "".join(f"<li>{_whole(line)}</li>" for line in doubts)
    trust = (
        f'<aside aria-labelledby="trust-h"><h3 id="trust-h">How far to trust this</h3><ul>{listed}</ul></aside>'
        if listed
        else ""
    )
    long = " long" if len(said) > _LONG else ""
    return f'<h2 class="answer{long}">{_whole(said)}</h2><div class="reasons">{entries}{more}</div>{trust}'


def _whole(text: str) -> str:
    """Escaped text in which a number stays on one line with its unit, and an interval with its ends."""
    joined = re.sub(
        r"(\d) (?=[KMGT]?i?B\b|ms\b|s\b|%)|(?<=\d,) (?=−?[\d.]+\])|(?<=\d) (?=\[)|(?<=±) (?=\d)|(?<=\d) (?=±)|(\d) (?=x\b)",
        lambda m: f"{m[1] or m[2] or ''}\u00a0",
        text,
    )
    return esc(joined)


def _figures(comparison: Comparison) -> str:
    """The numbers of the method that is handed over, each next to the baseline's, and what the references score."""
    chosen = comparison.chosen or comparison.best
    if chosen is None:
        return ""
    base = comparison.baseline if comparison.baseline is not chosen else None

    def against(key: str) -> str:
        times = ratio(getattr(chosen, key), getattr(base, key)) if base else None
        return f"{times} of {base.label}" if times and base else ""

    memory = "Peak memory" if chosen.measured_peak_bytes is not None else "Peak memory, forecast"
    tiles = [
        (comparison.metric, comparison.score(chosen.mean), _score_remark(comparison, chosen, base)),
        (memory, size(chosen.peak_bytes), against("peak_bytes")),
        ("Time per step", duration(chosen.seconds_per_step), against("seconds_per_step")),
        ("File to hand over", size(chosen.file_bytes), against("file_bytes")),
        ("Trained parameters", count(chosen.trained_parameters), against("trained_parameters")),
    ]
    tiles += [(c.label, comparison.score(c.mean), c.reason or "") for c in comparison.references]
    name = "The pick" if chosen is comparison.chosen else "Best mean"
    return (
        f'<div class="pick"><p class="pick-name"><span>{name}</span> {esc(chosen.label)}'
        f"<small>{esc(', '.join(comparison.chosen_settings(chosen)))}</small></p>"
        f"{tile_list(tiles, f'Numbers of {chosen.label}')}</div>"
    )


def _score_remark(comparison: Comparison, chosen: Candidate, base: Candidate | None) -> str:
    lines = [] if comparison.judgement else [comparison.interval(chosen)]
    if base and base.mean is not None and chosen.mean is not None:
        change = chosen.mean - base.mean
        lines.append(f"{'+' if change >= 0 else '−'}{comparison.score(abs(change))} against {base.label}")
    return "\n".join(line for line in lines if line)


def terms(rows: list[tuple[str, str]]) -> str:
    """What was compared, as names and values in a line."""
    cells = "".join(f"<div><dt>{esc(term)}</dt><dd>{esc(value)}</dd></div>" for term, value in rows)
    return f'<dl class="terms">{cells}</dl>' if cells else ""
