"""The systems that docs/adding-a-system.md writes: each file of docs/examples as a module."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from lowdim.adapters.core import method as methods
from snippets import ROOT

FILES = sorted((ROOT / "docs" / "examples").glob("adding_a*.py"))
sys.path.append(str(ROOT / "docs" / "examples"))  # other processes that a case starts import them, too


def load(path: Path) -> ModuleType:
    """The module, without a trace of its adapter among the methods of the package."""
    known = dict(methods._REGISTRY)
    try:
        return importlib.import_module(path.stem)
    finally:
        methods._REGISTRY.clear()
        methods._REGISTRY.update(known)


def example(kind: str) -> ModuleType:
    """The example of this kind: `"adapter"`, `"diagnostic"`, …"""
    (path,) = (path for path in FILES if path.stem.endswith(f"_{kind}"))
    return load(path)
