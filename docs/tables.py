"""Write what the docs show from elsewhere: tables from the catalogue, and the files of docs/examples; `make tables` runs this.

A table stands between `<!-- NAME: from the catalogue -->` and `<!-- end of NAME -->`, an example between `<!-- FILE -->` and
`<!-- end of FILE -->`; nothing there is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lowdim.catalogue import FAMILIES, Entry, entries

ROOT = Path(__file__).resolve().parents[1]
WHAT = {
    "adapters": "the update of a frozen weight",
    "optim": "the gradient and the optimizer state",
    "layers": "the weight itself, from the start of training",
    "compress": "trained weights, activations, the KV cache",
    "represent": "features, labels and prediction heads",
    "diagnose": "what is measured: spectra, landscapes, dynamics",
    "solve": "linear systems, regression, matrix completion",
    "train": "the training loop",
}


def families(place: str) -> str:
    """One row for each family: what it makes low-dimensional, and its systems that work today."""
    lines = ["| family | what is made low-dimensional | systems that work today |", "| --- | --- | --- |"]
    for family in FAMILIES:
        names = ", ".join(_link(row, place) for row in entries() if row.family == family and row.available)
        if names:
            lines.append(f"| `lowdim.{family}` | {WHAT[family]} | {names} |")
    return "\n".join(lines)


def systems(place: str) -> str:
    """One row for each system that works today: its page, what to type, and what its paper claims; then the others by name."""
    lines = ["| system | family | what to type | what its paper claims |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        for row in entries():
            if row.family == family and row.available:
                claim = row.claim.replace("|", r"\|")
                lines.append(f"| {_link(row, place)} | {family} | {_typed(row)} | {claim} |")
    waiting = [row.name for row in entries() if not row.available]
    return "\n".join([*lines, "", f"Not built yet: {', '.join(waiting)}." if waiting else "All sixty are built."])


def _link(row: Entry, place: str) -> str:
    return f"[{row.name}]({place}{row.slug}.md)"


def _typed(row: Entry) -> str:
    """Method names where it can be trained by name, else the command or the public name."""
    if row.variants:
        return ", ".join(f"`{variant.name}`" for variant in row.variants)
    if row.family == "compress":
        return f"`lowdim compress --method {row.slug}`"
    if row.family == "diagnose":
        return f"`lowdim diagnose {row.slug}`"
    return f"`{row.target.replace(':', '.')}`"


#: Page, name of the table, how it is made, and where the systems' pages lie from there.
TABLES: tuple[tuple[Path, str, Callable[[str], str], str], ...] = (
    (ROOT / "README.md", "families", families, "docs/systems/"),
    (ROOT / "docs" / "choosing.md", "systems", systems, "systems/"),
)


#: The page that shows the files of docs/examples.
EXAMPLES = ROOT / "docs" / "adding-a-system.md"


def pages() -> dict[Path, str]:
    """Each page with its tables and examples as they should be.

    Raises:
        ValueError: a page lacks the lines that a table or an example stands between.
    """
    found: dict[Path, str] = {}
    for path, name, make, place in TABLES:
        text = found.get(path) or path.read_text(encoding="utf-8")
        found[path] = _filled(path, text, f"{name}: from the catalogue", name, make(place))
    text = EXAMPLES.read_text(encoding="utf-8")
    for file in sorted((ROOT / "docs" / "examples").glob("adding_a*.py")):
        code = file.read_text(encoding="utf-8")
        text = _filled(
            EXAMPLES, text, file.name, file.name, f"[examples/{file.name}](examples/{file.name})\n\n```python\n{code}```"
        )
    return {**found, EXAMPLES: text}


def _filled(path: Path, text: str, begin: str, end: str, content: str) -> str:
    begin, end = f"<!-- {begin} -->", f"<!-- end of {end} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must have one line {begin} and one line {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda match: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def outdated() -> list[Path]:
    """Pages whose tables or examples are not as they should be."""
    return [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]


if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
