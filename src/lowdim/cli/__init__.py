"""The command line. Importing this imports neither torch nor transformers; each command imports what it needs."""

from lowdim.cli.main import app, main

__all__ = ["app", "main"]
