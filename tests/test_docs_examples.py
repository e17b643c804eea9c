"""The systems that docs/adding-a-system.md writes go through their shared cases, and the page shows the files as they are."""

import pytest

from examples import FILES, load
from lowdim.adapters.core import method as methods
from snippets import ROOT, blocks

PAGE = ROOT / "docs" / "adding-a-system.md"

for path in FILES:
    for name, found in vars(load(path)).items():
        if name.startswith("Test"):
            globals()[name] = found  # pytest collects it from here


@pytest.fixture(autouse=True)
def _registered():
    """While a test runs, the example's adapter is one of the methods, as it is for whoever imports its module."""
    known = dict(methods._REGISTRY)
    for path in FILES:
        for name, found in vars(load(path)).items():
            if isinstance(found, type) and found.__module__ == path.stem and issubclass(found, methods.Method):
                methods._REGISTRY[name] = found
    yield
    methods._REGISTRY.clear()
    methods._REGISTRY.update(known)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_page_shows_the_file(path):
    shown = [block.body for block in blocks(PAGE, "python")]
    assert path.read_text(encoding="utf-8") in shown, f"write {path.name} into {PAGE.name} as it is"
    assert f"](examples/{path.name})" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_short_and_has_its_case(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 90
    cases = [found for name, found in vars(load(path)).items() if name.startswith("Test")]
    assert cases
    assert all(any(base.__module__.startswith("lowdim.testing.") for base in found.__mro__) for found in cases)
