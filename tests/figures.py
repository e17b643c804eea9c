"""Measured numbers of the documentation, and the JSON files that they are said to come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What makes a number a measurement: its unit, or the heading of its column.
UNITS = r"ms|µs|s|seconds|minutes|min|h|KiB|MiB|GiB|times|x(?! [\dk])"
_NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
_IN_TEXT = re.compile(
    rf"(?<![\w./^×-])(?P<number>{_NUMBER}) (?:{UNITS})\b|\b(?:perplexity|accuracy|F1|loss) (?:of |is )?(?P<score>\d+\.\d+)"
)
_CELL = re.compile(r"(?<![\w.])-?(?P<number>\d[\d,]*\.\d+(?:e-?\d+)?)(?![\w.])")
_HEADS = re.compile(
    r"\b(ms|s|seconds|MiB|GiB|KiB|time|times|accuracy|perplexity|loss|peak|measured|memory|ratio|error|step|kept|score)\b"
)
_SOURCE = re.compile(r"[\w./-]+\.json\b")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
#: Unit on a page -> scale from the unit of a record (seconds, bytes, shares).
SCALES = {"ms": 1e3, "k": 1e-3, "M": 1e-6, "G": 1e-9, "KiB": 2.0**-10, "MiB": 2.0**-20, "GiB": 2.0**-30, "%": 1e2}
#: A load average from which on the clock, and less so processor time, say little.
BUSY = 3.0
_BUSY = re.compile(r"\bbusy\b|\bloads?\b|\bother work\b", re.IGNORECASE)
_TIME = re.compile(r"\d (?:ms|µs|s|seconds|milliseconds|minutes)\b")
_TIME_HEAD = re.compile(r"\b(?:ms|µs|seconds|milliseconds|time)\b")
_RATIO = re.compile(r"ratio|times|relative|faster|/|\bto\b|mean|average|deviation")


@dataclass(frozen=True)
class Figure:
    """A measured number of a page: where it stands, as it is printed, and the JSON files that its section names."""

    page: str
    line: int
    text: str
    sources: tuple[str, ...]
    scales: tuple[float, ...] = (1.0,)
    derived: bool = False  # a ratio or a mean: of numbers of one object

    @property
    def value(self) -> float:
        return float(self.text.replace(",", ""))

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def figures(page: Path) -> Iterator[Figure]:
    """The measured numbers of a page, section by section; code is no text."""
    text = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    for start, end in zip([0, *starts], [*starts, len(lines)]):
        body = "\n".join(lines[start:end])
        sources = tuple(dict.fromkeys(name for name in _SOURCE.findall(body) if _file(page, name)))
        scales = (1.0, *(scale for unit, scale in SCALES.items() if re.search(rf"(?<![a-z]){unit}(?![a-z])", body)))
        head: list[str] = []
        for number, line in enumerate(lines[start:end], start + 1):
            cells = line.split("|")
            if line.startswith("|"):
                head = head or cells
                if cells is head or set(line) <= set("|-: ") or not _HEADS.search("|".join(head)):
                    continue
                for title, cell in zip(head, cells):
                    for found in _CELL.finditer(cell):
                        yield Figure(_name(page), number, found["number"], sources, scales, bool(_RATIO.search(title)))
                continue
            head = []
            for found in _IN_TEXT.finditer(line):
                text_ = found["number"] or found["score"]
                yield Figure(_name(page), number, text_, sources, scales, bool(_RATIO.search(line)))


def traced(figure: Figure, page: Path) -> bool:
    """Whether the number, at its printed precision, stands in a named JSON, or is the ratio or mean of neighbours there."""
    return any(_stands_in(figure, _file(page, name)) for name in figure.sources)


def unmarked_times(page: Path) -> Iterator[str]:
    """Sections with times from a record of a busy machine that do not say so."""
    lines = page.read_text(encoding="utf-8").split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("## ")]
    for start, end in zip([0, *starts], [*starts, len(lines)]):
        body = "\n".join(lines[start:end])
        files = [file for name in _SOURCE.findall(body) if (file := _file(page, name))]
        text = _FENCE.sub("", body)
        heads = re.findall(r"^\|.*\|$(?=\n\| *-)", text, re.MULTILINE)
        timed = _TIME.search(text) or any(_TIME_HEAD.search(head) for head in heads)
        if timed and not _BUSY.search(text) and any(_load(file) > BUSY for file in files):
            yield f"{_name(page)}:{start + 1}: {lines[start]}"


@cache
def _load(file: Path) -> float:
    """The largest load average of a record."""

    def visit(node: object) -> Iterator[float]:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if isinstance(key, str) and key.startswith("load") and isinstance(value, (int, float)):
                yield float(value)
            yield from visit(value)

    return max(visit(json.loads(file.read_text(encoding="utf-8"))), default=0.0)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _file(page: Path, name: str) -> Path | None:
    """The committed file of that name, relative to the page or to the repository."""
    found = (place for place in (page.parent / name, ROOT / name) if place.is_file())
    return next((place.resolve() for place in found), None)


def _stands_in(figure: Figure, file: Path | None) -> bool:
    if file is None:
        return False
    value, digits = figure.value, len(figure.text.partition("e")[0].partition(".")[2])
    half = 0.5000001 * 10.0**-digits if "e" not in figure.text else 0.05 * value
    plain, derived = _numbers(file)
    if any(abs(n * scale - value) <= half for n in plain for scale in figure.scales):
        return True
    return figure.derived and any(abs(n - value) <= half for n in derived)


@cache
def _numbers(file: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """All numbers of a JSON file; and the ratios of those in one object, and the means of one or of a group of rows."""
    plain: set[float] = set()
    derived: set[float] = set()

    def visit(node: object) -> list[float]:
        if isinstance(node, bool) or node is None:
            return []
        if isinstance(node, (int, float)):
            return [abs(float(node))]
        if isinstance(node, str):
            return [float(found.replace(",", "")) for found in re.findall(_NUMBER, node)]
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        groups = [visit(child) for child in children]
        own = [v for child, group in zip(children, groups) for v in group if not isinstance(child, (list, dict))]
        plain.update(v for group in groups for v in group)
        derived.update(_means_of_rows(node))
        if own and len(own) <= 12:
            derived.add(sum(own) / len(own))
            derived.update(a / b for a in own for b in own if b)
        return [] if isinstance(node, (dict, list)) else own

    visit(json.loads(file.read_text(encoding="utf-8")))
    return tuple(plain), tuple(derived)


def _means_of_rows(node: object) -> Iterator[float]:
    """The means over rows (of seeds) that share a text, such as the method's name."""
    rows = [row for row in node if isinstance(row, dict)] if isinstance(node, list) else []
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        names = [value for value in row.values() if isinstance(value, str)]
        for key, value in row.items():
            if isinstance(value, float):
                for name in names:
                    groups.setdefault((name, key), []).append(value)
    yield from (sum(group) / len(group) for group in groups.values() if len(group) > 1)
