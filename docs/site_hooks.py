"""Hooks of `mkdocs build`: the menu of systems, and links to files outside docs (README, recipes, results).

In the repository every link is relative to its file, so that it works where the files are read as they are. The site has
another tree: what is in docs lies at its top, the README is `start.md`, everything else keeps its path. A link to a folder,
which a site does not have, becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Pages from outside docs: their path in the repository, and in the site.
PAGES = {
    "README.md": "start.md",
    "recipes/README.md": "recipes/index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "src/lowdim/assets/LICENSES.md": "licenses.md",
}
#: What names a file without an extension, which a browser would not show.
TEXTS = {"LICENSE": "LICENSE.txt", "NOTICE": "NOTICE.txt"}
_LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```|`[^`\n]*`)|(?P<text>\[[^\[\]]*\])\((?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE
)


def site_path(path: str) -> str | None:
    """Where a file of the repository lies in the site; None for a folder."""
    if path in PAGES or path in TEXTS:
        return PAGES.get(path) or TEXTS[path]
    if not (ROOT / path).is_file():
        return None
    return path.removeprefix("docs/")


def repository_path(uri: str) -> str:
    """The file of the repository that is this page of the site."""
    outside = {site: path for path, site in PAGES.items()}
    return outside.get(uri, f"docs/{uri}")


def rewritten(text: str, uri: str) -> str:
    """The page with its links as they are in the site."""
    here = posixpath.dirname(repository_path(uri))

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        place = site_path(posixpath.normpath(posixpath.join(here, path)))
        if place is None:
            return match["text"][1:-1]
        to = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"{match['text']}({to}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(link, text)


def linked_files(text: str, page: str) -> set[str]:
    """The files of the repository, not in docs and no pages, that this file of it links to."""
    here, found = posixpath.dirname(page), set()
    for match in _LINK.finditer(text):
        target = match["target"]
        if target and not re.match(r"[a-z]+:|#", target):
            path = posixpath.normpath(posixpath.join(here, target.partition("#")[0]))
            if site_path(path) is not None and not path.startswith("docs/") and path not in PAGES:
                found.add(path)
    return found


def outside() -> dict[str, str]:
    """Every file that the site shows from outside docs: its path in the site, and in the repository."""
    sources = [*PAGES, *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    files = {file for page in sources for file in linked_files((ROOT / page).read_text(encoding="utf-8"), page)}
    return {str(site_path(path)): path for path in [*PAGES, *sorted(files)]}


#: The menu's names of the families.
FAMILIES = {
    "adapters": "Adapters",
    "optim": "Optimizers",
    "layers": "Layers",
    "compress": "Compression",
    "represent": "Representations",
    "diagnose": "Diagnostics",
    "solve": "Solvers",
    "train": "Training",
}


def systems() -> list[dict[str, list[str]]]:
    """The pages of systems by family; a page without a row of the catalogue is that of LoRA, an adapter."""
    from lowdim.catalogue import entries

    family = {row.slug: row.family for row in entries()}
    found: dict[str, list[str]] = {title: [] for title in FAMILIES.values()}
    for path in sorted((ROOT / "docs" / "systems").glob("*.md")):
        found[FAMILIES[family.get(path.stem, "adapters")]].append(f"systems/{path.name}")
    return [{title: pages} for title, pages in found.items() if pages]


def on_config(config: Any) -> Any:
    """Called by mkdocs with its settings: fills the menu of systems."""
    for part in config["nav"]:
        if isinstance(part, dict) and "Systems" in part:
            part["Systems"] = systems()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the files of the site."""
    from mkdocs.structure.files import File

    for uri, path in outside().items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return rewritten(markdown, page.file.src_uri)
