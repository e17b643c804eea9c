"""`lowdim list`."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.catalogue import BASELINES, FAMILIES, Entry, entries
from lowdim.errors import check_choice

__all__ = ["show"]


def show(family: str | None, available: bool, as_json: bool) -> None:
    """Print the catalogue as a table or as JSON."""
    if family is not None:
        check_choice("family", family, FAMILIES)
    rows = [e for e in entries() if (family is None or e.family == family) and (e.available or not available)]
    if as_json:
        record = [
            {
                "number": e.number, "slug": e.slug, "name": e.name, "family": e.family, "paper": e.paper, "arxiv": e.arxiv,
                "claim": e.claim, "works": e.available, "target": e.target, "methods": [v.name for v in e.variants],
            }
            for e in rows
        ]  # fmt: skip
        print(json.dumps(record, indent=1, ensure_ascii=False))
        return
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [(str(e.number), e.slug, e.family, "works" if e.available else "not yet", _names(e)) for e in rows]
    heads = ("", "slug", "family", "today", "compare / plan / run")
    room = console.width - sum(max(len(h), *(len(c[i]) for c in cells)) + 2 for i, h in enumerate(heads))
    wide = room >= 40  # a narrow terminal gets what the names need; the claims are in --json and the docs
    table.add_column("", justify="right", style="dim")
    for name in heads[1:]:
        table.add_column(name, no_wrap=True)
    if wide:
        table.add_column("what it claims", overflow="ellipsis", no_wrap=True, width=room)
    for entry, (number, slug, family, today, names) in zip(rows, cells):
        works = f"[green]{today}[/]" if entry.available else f"[dim]{today}[/]"
        table.add_row(number, slug, family, works, names, *([escape(entry.claim)] if wide else []))
    console.print(table)
    ready = sum(e.available for e in rows)
    console.print(f"\n{ready} of {len(rows)} work today; baselines: {', '.join(v.name for v in BASELINES)}", highlight=False)


def _names(entry: Entry) -> str:
    return ", ".join(v.name for v in entry.variants)
