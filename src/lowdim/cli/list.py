"""`lowdim list`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowdim.cli.options import print_line

if TYPE_CHECKING:
    from lowdim.catalogue import Entry, Variant
    from lowdim.jobs import Option

__all__ = ["list_systems"]


def list_systems(
    name: Annotated[str | None, typer.Argument(help="Only this family; or one system or method, with its options.")] = None,
    available: Annotated[bool, typer.Option("--available", help="Only what works today.")] = False,
    can: Annotated[str | None, typer.Option("--can", help="Only what can do all of this, e.g. merge,conv,int8.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The catalogue: sixty systems, and what each can do; or the options of one system."""
    from lowdim.catalogue import BASELINES, FAMILIES, entries

    if name is not None and name not in FAMILIES:
        _show_system(name, as_json)
        return
    rows = [e for e in entries() if (name is None or e.family == name) and (e.available or not available)]
    baselines, able = list(BASELINES), {}
    if can is not None:
        from lowdim.jobs.capabilities import abilities, parse_capabilities

        wanted = set(parse_capabilities(can))
        able = {entry.slug: abilities(entry) for entry in rows}
        rows = [entry for entry in rows if wanted <= set(able[entry.slug])]
        baselines = [baseline for baseline in baselines if wanted <= set(abilities(baseline))]
    if as_json:
        records = [_record(e) | ({"can": list(able[e.slug])} if able else {}) for e in rows]
        print(json.dumps(records, indent=1, ensure_ascii=False))
    else:
        _show_table(rows, baselines)


def _record(entry: Entry) -> dict[str, Any]:
    return {
        "number": entry.number, "slug": entry.slug, "name": entry.name, "family": entry.family, "paper": entry.paper,
        "arxiv": entry.arxiv, "claim": entry.claim, "works": entry.available, "target": entry.target,
        "methods": [v.name for v in entry.variants],
    }  # fmt: skip


def _show_table(rows: list[Entry], baselines: list[Variant]) -> None:
    from lowdim.catalogue import BY_FARMS
    from lowdim.catalogue.entry import NESTED

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [
        (str(e.number), e.slug, e.family, "works" if e.available else "not yet", ", ".join(v.name for v in e.variants))
        for e in rows
    ]
    heads = ("", "slug", "family", "today", "compare / plan / run")
    room = console.width - sum(max([len(h), *(len(c[i]) for c in cells)]) + 2 for i, h in enumerate(heads))
    wide = room >= 40  # a narrow terminal has only room for the names; the claims are in --json and the docs
    table.add_column("", justify="right", style="dim")
    for head in heads[1:]:
        table.add_column(head, no_wrap=head != heads[-1])  # what to type is never cut
    if wide:
        table.add_column("what it claims", overflow="ellipsis", no_wrap=True, width=room)
    for entry, (number, slug, family, today, names) in zip(rows, cells):
        works = f"[green]{today}[/]" if entry.available else f"[dim]{today}[/]"
        table.add_row(number, slug, family, works, names, *([escape(f"{entry.name}: {entry.claim}")] if wide else []))
    console.print(table)
    nested = " or ".join(f"+{each}" for each in NESTED)
    console.print(
        f"\nafter a method's name: {BY_FARMS} for ranks by layer, {nested} for embeddings of several sizes", highlight=False
    )
    ready = sum(e.available for e in rows)
    names = ", ".join(v.name for v in baselines) or "none"
    console.print(f"{ready} of {len(rows)} work today; baselines: {names}", highlight=False)


def _show_system(name: str, as_json: bool) -> None:
    """One system: its description, and the options of each of its uses."""
    from lowdim.jobs.capabilities import abilities
    from lowdim.jobs.systems import described_system

    entry, options = described_system(name)
    if as_json:
        about = {} if entry is None else _record(entry)
        shown = {use: {o.name: _option_record(o) for o in found.values()} for use, found in options.items()}
        print(json.dumps({**about, "options": shown}, indent=1, ensure_ascii=False))
        return
    console = Console()
    if entry is not None:
        today = "works" if entry.available else "not yet"
        console.print(f"[bold]{escape(entry.name)}[/]  ({entry.slug}, {entry.family}, {today})", highlight=False)
        print_line(console, f"paper   {entry.paper}{f', arXiv {entry.arxiv}' if entry.arxiv else ''}")
        print_line(console, f"claim   {entry.claim}")
        print_line(console, f"can     {', '.join(abilities(entry)) or '-'}")
    for use, found in options.items():
        console.print(f"\n[bold]Options of {escape(use)}[/]" if found else f"\n{escape(use)} has no options", highlight=False)
        for option in found.values():
            console.print(
                f"  [bold]{option.name}[/] = {escape(option.default_text)}   [dim]{escape(option.what)}[/]", highlight=False
            )
            console.print(Padding(Text(option.help), (0, 0, 0, 6)))


def _option_record(option: Option) -> dict[str, Any]:
    return {"default": option.default_text, "value": option.what, "help": option.help}
