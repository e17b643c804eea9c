"""The worked examples of the documentation, and the same with one wrong place, to see that a shared case notices."""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]


def example(name: str) -> types.ModuleType:
    """A file of docs/examples as a module that a new process finds, too."""
    folder = str(ROOT / "docs" / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def planted(path: str, old: str, new: str) -> types.ModuleType:
    """The module of that file (from the root of the repository) with `new` in the place of `old`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path}"
    module = types.ModuleType("planted")
    exec(compile(text.replace(old, new), path, "exec"), module.__dict__)
    return module
