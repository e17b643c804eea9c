"""The commands of `lowdim`, one module for each."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lowdim import __version__
from lowdim.cli.compare import compare
from lowdim.cli.compress import compress
from lowdim.cli.diagnose import diagnose
from lowdim.cli.errors import clear_errors, short_warnings
from lowdim.cli.export import export
from lowdim.cli.index_check import index_check
from lowdim.cli.list import list_systems
from lowdim.cli.once import OnceCommand
from lowdim.cli.plan import plan
from lowdim.cli.report import report
from lowdim.cli.reproduce import reproduce
from lowdim.cli.run import run
from lowdim.cli.sizes import sizes
from lowdim.cli.terminal import forgiving_output
from lowdim.interrupts import interruptible

__all__ = ["app", "main"]

app = typer.Typer(
    name="lowdim",
    help="Train, adapt, compress and explain neural networks in few dimensions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)
app.command("list", cls=OnceCommand)(list_systems)
for command in (plan, compare, run, export, compress, diagnose, sizes, index_check, report, reproduce):
    app.command(cls=OnceCommand)(command)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"lowdim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train, adapt, compress and explain neural networks in few dimensions."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: usage errors and errors that the user can fix exit with code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that busy-wait make a shared machine up to eight times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = sys.argv[1:] if arguments is None else arguments
    with forgiving_output(), interruptible(words), clear_errors(), short_warnings():
        _quiet_libraries()
        try:
            app(args=words, prog_name="lowdim")
        finally:
            sys.stdout.flush()  # here a full disk behind it is an error like any other


def _quiet_libraries() -> None:
    """Hide other libraries' messages about optional speed-ups."""
    import logging
    import warnings

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("peft", "transformers", "accelerate", "bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*Redirects are currently not supported.*")
