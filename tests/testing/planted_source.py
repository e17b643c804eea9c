"""A source file with one wrong place, to see that a shared case notices. Right ones run in test_docs_examples."""

import types
from pathlib import Path

ROOT = Path(__file__).parents[2]


def planted(path: str, old: str, new: str) -> types.ModuleType:
    """The module of that file (from the root of the repository) with `new` in the place of `old`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path}"
    module = types.ModuleType("planted")
    exec(compile(text.replace(old, new), path, "exec"), module.__dict__)
    return module
