"""Shared by the commands: common options, parsing of values, and printing of lines."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

__all__ = ["MODEL_HELP", "Methods", "Model", "Pairs", "print_line", "rates_of"]

MODEL_HELP = "A folder, a hub id, or minilm, stories260k, smollm2-135m, llama-7b."
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", help="Names, families (adapters, optim, layers) or all, with commas; repeatable."),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of its own, as `lowdim list` shows them; repeatable."),
]


def rates_of(text: str | None) -> int | str | None:
    """`--rates`: a number, or a word as it stands, which the settings check.

    Example:
        >>> from lowdim.cli.options import rates_of
        >>> rates_of("3"), rates_of("curvature"), rates_of(None)
        (3, 'curvature', None)
    """
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def print_line(console: Console, text: str) -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
