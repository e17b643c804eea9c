"""Keeps old module names importable after a move."""

from __future__ import annotations

import importlib
import sys

__all__ = ["keep_importable"]


def keep_importable(package: str, **homes: str) -> None:
    """Let `package.old` name the module `package.home`, for each `old="home"`.

    Example:
        >>> import lowdim.adapters
        >>> from lowdim.adapters.diffora_search import DiffoRAAdapted
        >>> DiffoRAAdapted.__module__
        'lowdim.adapters.diffora.search'
    """
    for old, home in homes.items():
        module = importlib.import_module(f"{package}.{home}")
        sys.modules[f"{package}.{old}"] = module
        setattr(sys.modules[package], old, module)
