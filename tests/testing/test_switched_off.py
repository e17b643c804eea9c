"""A shared check that a system switches off says why."""

import ast
import re

import pytest
from planted_source import ROOT

FILES = sorted(p for folder in ("src/lowdim/testing", "tests", "docs/examples") for p in (ROOT / folder).rglob("*.py"))
MARKS = re.compile(r"type: ignore(\[[\w\-, ]*\])?|noqa(: \w+)?|#")


def is_off(node):
    """Whether a statement is `test_… = None`."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    value = getattr(node, "value", None)
    return (
        isinstance(target, ast.Name)
        and target.id.startswith("test_")
        and isinstance(value, ast.Constant)
        and value.value is None
    )


def unexplained(text):
    """Lines that switch a check off without a reason in a comment: on the line, or above it or a block of such lines."""
    lines, found = text.splitlines(), []
    for part in ast.walk(ast.parse(text)):
        if not isinstance(part, ast.ClassDef):
            continue
        off = {node.lineno for node in part.body if is_off(node)}
        for number in sorted(off):
            comment = MARKS.sub("", lines[number - 1].partition("#")[2]).strip()
            above = number - 1
            while above in off:
                above -= 1
            if not comment and not lines[above - 1].strip().startswith("# "):
                found.append(number)
    return found


def test_every_check_that_is_off_has_a_reason():
    found = {str(path.relative_to(ROOT)): unexplained(path.read_text(encoding="utf-8")) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("    test_a = None", [2]),
        ("    test_a = None  # type: ignore[assignment]", [2]),
        ("    test_a = None  # type: ignore[assignment]  # it has none", []),
        ("    # they need a device\n    test_a = None\n    test_b = None  # type: ignore[assignment]", []),
        ("    test_a = None  # no reason for the next\n\n    test_b = None", [4]),
        ("    test_a: None = None", [2]),
    ],
)
def test_what_counts_as_a_reason(body, lines):
    assert unexplained(f"class TestX:\n{body}\n") == lines
