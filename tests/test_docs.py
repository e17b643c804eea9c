"""The docs cannot rot: their Python runs, their commands parse, their links lead somewhere, docstrings' examples hold."""

import doctest
import importlib
import pkgutil

import pytest
import typer.main

import lowdim
from lowdim.cli import app
from snippets import PAGES, ROOT, anchors, blocks, commands, links, run_python

README = ROOT / "README.md"
PYTHON = [block for page in PAGES if page != README for block in blocks(page, "python")]
COMMANDS = [found for page in PAGES for found in commands(page)]
MODULES = sorted(m.name for m in pkgutil.walk_packages(lowdim.__path__, "lowdim.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(block)


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_commands_parse(where, arguments):
    group = typer.main.get_command(app)
    if arguments[:1] in (["--help"], ["--version"]):
        return
    name, command, rest = group.resolve_command(group.make_context("lowdim", [], resilient_parsing=True), arguments)
    command.make_context(name, rest)  # raises where an option or argument does not exist or is missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_a_target(page):
    broken = []
    for target in links(page):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), report=True)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail; see above"
