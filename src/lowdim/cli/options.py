"""Shared by the commands: common options, parsing of values, and printing of lines."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["Methods", "Model", "Pairs", "parse_seconds", "print_line"]

Model = Annotated[str, typer.Option("--model", help="A folder, a hub id, or minilm, stories260k, smollm2-135m, llama-7b.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", help="Names, families (adapters, optim, layers) or all, with commas; repeatable."),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of its own, as `lowdim list` shows them; repeatable."),
]

_UNITS = {"s": 1, "m": 60, "h": 3600, "": 1}


def parse_seconds(text: str) -> float:
    """`90`, `90s`, `10m` or `2h` in seconds.

    Raises:
        ValueError: anything else.

    Example:
        >>> from lowdim.cli.options import parse_seconds
        >>> parse_seconds("10m")
        600.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"--time-limit must be a positive number with unit s, m or h, such as 90s or 10m; got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def print_line(console: Console, text: str) -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
