"""The docs as a site: the menu lists every page, links lead somewhere in it, and nothing is loaded from elsewhere."""

import importlib.util
import posixpath
import re
import subprocess
import sys

import pytest
import yaml

from lowdim.catalogue import FAMILIES, entries
from snippets import ROOT

DOCS = ROOT / "docs"


def hook():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = hook()
CONFIG = HOOK.on_config(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
OWN = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
PAGES = [*OWN, *HOOK.PAGES.values()]


def leaves(part):
    """The pages of a part of the menu, in order."""
    if isinstance(part, str):
        return [part]
    return [page for value in (part.values() if isinstance(part, dict) else part) for page in leaves(value)]


def test_the_menu_lists_every_page_once():
    assert sorted(leaves(CONFIG["nav"])) == sorted(PAGES)


def test_the_menu_sorts_systems_by_family():
    (systems,) = [part["Systems"] for part in CONFIG["nav"] if isinstance(part, dict) and "Systems" in part]
    family = {f"systems/{row.slug}.md": row.family for row in entries()} | {"systems/lora.md": "adapters"}
    shown = [{family[page] for page in leaves(part)} for part in systems]
    assert all(len(kinds) == 1 for kinds in shown)
    order = [next(iter(kinds)) for kinds in shown]
    assert order == [name for name in FAMILIES if name in order]
    for part in systems:
        assert leaves(part) == sorted(leaves(part))


@pytest.mark.parametrize("uri", PAGES)
def test_links_lead_to_what_the_site_has(uri):
    files = [*(DOCS / "examples").iterdir(), *DOCS.rglob("*.png")]
    held = {*PAGES, *HOOK.outside(), *(str(path.relative_to(DOCS)) for path in files)}
    text = HOOK.rewritten((ROOT / HOOK.repository_path(uri)).read_text(encoding="utf-8"), uri)
    targets = [match["target"] for match in HOOK._LINK.finditer(text) if match["target"]]
    for target in targets:
        if re.match(r"[a-z]+:|#", target):
            continue
        assert posixpath.normpath(posixpath.join(posixpath.dirname(uri), target.partition("#")[0])) in held, target


def test_what_a_command_writes_is_not_kept():
    """A report is hundreds of kilobytes of scripts and data that stand elsewhere in the repository: a picture shows it."""
    assert not list(DOCS.rglob("*.html"))
    assert [path.name for path in DOCS.rglob("*") if path.is_file() and path.stat().st_size > 150_000] == []


def test_links_are_rewritten():
    assert HOOK.rewritten("[a](../README.md) `[b](../README.md)`", "memory.md") == "[a](start.md) `[b](../README.md)`"
    assert HOOK.rewritten("[r](../../results/galore.json)", "systems/galore.md") == "[r](../results/galore.json)"
    assert HOOK.rewritten("[m](docs/memory.md#measuring-yourself)", "start.md") == "[m](memory.md#measuring-yourself)"
    assert HOOK.rewritten("[all](../results) of [it](https://a.b)", "index.md") == "all of [it](https://a.b)"


def test_nothing_is_loaded_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    assert "repo_url" not in CONFIG  # its stars would be asked for
    assert not {"extra_css", "extra_javascript"} & CONFIG.keys()


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for uri in PAGES:
        assert (tmp_path / re.sub(r"\.md$", ".html", uri)).is_file(), uri
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\bsrc=\"?(https?:)?//|<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?https?:"
    )
    for page in tmp_path.rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8")), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import [\"']https?:", sheet.read_text(encoding="utf-8")), sheet
