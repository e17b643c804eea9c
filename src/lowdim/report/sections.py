"""The parts of the page in plain HTML: they need no scripts, and work in print and with screen readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowdim.report.record import Candidate
from lowdim.report.text import MISSING, esc, number, plain, rate, size

__all__ = ["SHAPES", "details", "glyph", "load", "numbers", "pairs", "section", "shapes", "tile_list"]

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


def tile_list(tiles: list[tuple[str, str, str]], label: str) -> str:
    """Large numbers with a name above and a remark below; missing ones are left out."""
    cells = "".join(
        f'<div class="tile"><dt>{esc(name)}</dt><dd>{esc(value)}</dd><dd class="aside">{esc(remark)}</dd></div>'
        for name, value, remark in tiles
        if value and value != MISSING
    )
    return f'<dl class="tiles" aria-label="{esc(label)}">{cells}</dl>' if cells else ""


def numbers(heads: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A small table of texts, the first column being the name of the row; an empty string without rows."""
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{"".join(f"<td>{esc(cell)}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    if not body:
        return ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}">'
        f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def load(winner: Mapping[str, Any]) -> str:
    """The folder of the winner, and the code that loads it."""
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
