"""`lowdim list`."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from lowdim.catalogue import BASELINES, FAMILIES, entries
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
    wide = console.width >= 120  # a narrow terminal gets what the names need; the claims are in --json and the docs
    table.add_column("", justify="right", style="dim")
    for name in ("slug", "family", "today", "compare / plan / run"):
        table.add_column(name, no_wrap=True)
    if wide:
        table.add_column("what it claims", overflow="ellipsis", no_wrap=True, ratio=1)
    for entry in rows:
        works = "[green]works[/]" if entry.available else "[dim]not yet[/]"
        names = ", ".join(v.name for v in entry.variants)
        table.add_row(str(entry.number), entry.slug, entry.family, works, names, *([entry.claim] if wide else []))
    console.print(table)
    ready = sum(e.available for e in rows)
    console.print(f"\n{ready} of {len(rows)} work today; baselines: {', '.join(v.name for v in BASELINES)}", highlight=False)
