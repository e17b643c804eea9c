"""What README and docs show a reader to run: Python blocks, `lowdim` command lines, links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Every page of the repository itself.
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/*.md", "bench/*.md", "src/**/*.md")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it starts, and what is in it."""

    page: Path
    line: int
    language: str
    body: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of these languages."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent = match["indent"]
        body = "".join(line.removeprefix(indent) for line in match["body"].splitlines(keepends=True))
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, match["language"], body))
    return [block for block in found if block.language in languages]


def run_python(block: Block) -> None:
    """Execute a block as a program of its own; a failure names the page and the line."""
    from lowdim.adapters.core import method as methods

    source = "\n" * block.line + block.body  # so that a traceback's line is the page's
    known = dict(methods._REGISTRY)
    try:
        exec(compile(source, str(block.page), "exec"), {"__name__": "__main__"})
    finally:  # a method that an example defines is not one of ours
        methods._REGISTRY.clear()
        methods._REGISTRY.update(known)


def exit_code(arguments: list[str]) -> int:
    """What `lowdim ARGUMENTS` ends with, in this process."""
    from lowdim.cli import main

    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """`(where, arguments after "lowdim")` for every command line in console and bash blocks; `\\` continues a line."""
    found = []
    for block in blocks(page, "console", "bash", "sh", "shell"):
        for offset, line in enumerate(block.body.replace("\\\n", "  ").splitlines(), 1):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["lowdim"]:
                found.append((f"{page.relative_to(ROOT)}:{block.line + offset}", words[1:]))
    return found


def links(page: Path) -> list[str]:
    """Targets of inline links and images, without those inside code."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The names that headings get."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(plain.strip().replace(" ", "-"))
    return names
