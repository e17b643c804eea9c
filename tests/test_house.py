"""The house around the code: what must stay true of the whole. What one system owes is in `test_catalogue.py`."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
import warnings
from functools import cache
from pathlib import Path

import pytest

import lowdim
from lowdim.catalogue import FAMILIES, entries

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lowdim"
CODE = sorted(path for folder in ("src", "tests", "bench") for path in (ROOT / folder).rglob("*.py"))
PACKAGES = [family for family in FAMILIES if family != "train"]
ROWS = {row.arxiv: row for row in entries()}


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def shipped() -> tuple[Path, ...]:
    """Every text file that is in the repository, or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return tuple(p for p in paths if p.is_file() and p.suffix not in (".safetensors", ".png"))


def local(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- systems and their catalogue rows, from the code's side -----------------------------------------------------------


def papers(family: str) -> dict[str, str]:
    """arXiv number -> the public name of the family whose docstring gives it as its source."""
    module = importlib.import_module(f"lowdim.{family}")
    found = {}
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", "").startswith(f"lowdim.{family}."):
            _, _, source = (inspect.getdoc(thing) or "").partition("Source:")
            found.update(dict.fromkeys(re.findall(r"\d{4}\.\d{5}", source), name))
    return found


@pytest.mark.parametrize("family", PACKAGES)
def test_what_is_built_is_in_the_catalogue(family):
    """A public name whose paper has a row that says "not yet" was finished and not listed."""
    for number, name in papers(family).items():
        row = ROWS.get(number)
        assert row is None or row.family != family or row.available, f"{name} is built, but {row.slug} is not listed as working"


@pytest.mark.parametrize("row", [row for row in entries() if row.available], ids=lambda row: row.slug)
def test_the_docstring_names_the_paper_of_the_row(row):
    module, _, name = row.target.partition(":")
    doc = inspect.getdoc(getattr(importlib.import_module(module), name)) or ""
    source = doc.partition("Source:")[2]
    assert row.arxiv in source or row.paper.lower() in " ".join(source.lower().split()), f"Source of {name}: {source or 'none'}"


def test_a_result_names_its_circumstances():
    slugs = {row.slug for row in entries() if row.available}
    for path in sorted((ROOT / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert "environment" in record, local(path)
        if "verdict" in record:  # a reproduction; the others are measurements of `bench/`
            assert path.stem == record["slug"], local(path)
            assert path.stem in slugs, local(path)
            assert {"claim", "setting", "checks", "seconds"} <= set(record), local(path)


# --- code ----------------------------------------------------------------------------------------------------------------


def test_no_pickled_weights_are_read():
    bad = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if {"pickle", "dill", "cloudpickle"} & {name.split(".")[0] for name in names}:
                    bad.append(f"{local(path)}:{node.lineno}: imports {names}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: k.value for k in node.keywords}
                safe = isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True
                bad += [] if safe else [f"{local(path)}:{node.lineno}: torch.load without weights_only=True"]
    assert not bad


def test_type_checkers_see_the_types():
    """PEP 561: without the marker, annotations of an installed package are ignored."""
    assert (SOURCE / "py.typed").is_file()
    assert "Typing :: Typed" in project()["project"]["classifiers"]


def test_long_files_are_reported():
    """Advice and not a limit: a file above 350 lines may hold more than one idea. Split it by idea, never by length."""
    long = {local(p): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 350}
    if long:
        listed = ", ".join(f"{name} ({n})" for name, n in sorted(long.items(), key=lambda item: -item[1]))
        warnings.warn(f"files above 350 lines, each still one idea? {listed}", stacklevel=1)


def test_imports_are_light():
    """A family brings in torch and numpy; what trains, plots or solves for it is imported when it is called."""
    names = [*PACKAGES, "linalg", "surgery", "calibrate", "ranks", "modules", "plan", "train", "export", "report", "models"]
    heavy = ("transformers", "scipy", "sklearn", "matplotlib", "pandas", "peft", "datasets", "accelerate")
    code = (
        "import sys, importlib, lowdim\n"
        "assert 'torch' not in sys.modules, 'import lowdim brings in torch'\n"
        "import lowdim.cli, lowdim.catalogue, lowdim.results, lowdim.lazy\n"
        "assert 'torch' not in sys.modules, 'import lowdim.cli brings in torch'\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('lowdim.' + name)\n"
        f"    found = [m for m in {heavy!r} if m in sys.modules]\n"
        "    assert not found, f'import lowdim.{name} brings in {found}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def contracts() -> dict[str, dict]:
    return {contract["id"]: contract for contract in project()["tool"]["importlinter"]["contracts"]}


def test_the_layers_are_a_contract():
    contract = contracts()["layers"]
    assert contract["type"] == "layers"
    assert contract["containers"] == ["lowdim"]
    assert contract["exhaustive"] is True
    families = next(layer for layer in contract["layers"] if "adapters" in layer)
    assert {part.strip() for part in families.split("|")} == set(PACKAGES)  # `|`: side by side, none imports another
    placed = {part.strip() for layer in contract["layers"] for part in re.split(r"[|:]", layer)}
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert placed == there - {"__init__"}


def test_systems_are_independent_by_contract():
    """import-linter holds that no system imports another; it must look at every family, and excuse nothing but `core`."""
    contract = contracts()["systems"]
    assert contract["type"] == "independence"
    assert contract["modules"] == [f"lowdim.{family}.*" for family in PACKAGES]
    assert contract["ignore_imports"] == [f"lowdim.{family}.** -> lowdim.{family}.core.**" for family in PACKAGES]


#: Names in a family folder that no row of the catalogue has.
WITHOUT_A_ROW = {("adapters", "lora"): "the baseline of every comparison"}


@pytest.mark.parametrize("family", PACKAGES)
def test_in_a_family_every_name_is_a_system(family):
    folder = SOURCE / family
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    systems = set()
    for row in entries():
        if row.available and row.family == family:
            made = getattr(importlib.import_module(f"lowdim.{family}"), row.target.partition(":")[2])
            systems.add(made.__module__.split(".")[2])
    allowed = {name for where, name in WITHOUT_A_ROW if where == family}
    assert names - {"__init__", "core"} - allowed == systems


# --- repository ------------------------------------------------------------------------------------------------------------


def test_nothing_names_the_place_where_it_was_written():
    # In pieces, so that this file does not hold what it looks for.
    places = ["/" + name for name in ("work/", "farm/", "root/\\.")]
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js", "deb.deb" + "ian.org"]
    pattern = re.compile(r"(?<![\w.\-/])(?:" + "|".join(places) + ")|" + "|".join(map(re.escape, hosts)))
    bad = []
    for path in shipped():
        text = path.read_text(encoding="utf-8", errors="replace")
        bad += [f"{local(path)}:{text.count(chr(10), 0, m.start()) + 1}: {m.group()}" for m in pattern.finditer(text)]
    assert not bad


def test_no_unfinished_business():
    pattern = re.compile("TO" + "DO|FIX" + "ME|XX" + "X|<<<<<" + "<<|breakpoint\\(\\)")
    code = [p for p in shipped() if p.suffix in (".py", ".toml", ".yaml", ".js", ".css", ".html") or p.name == "Makefile"]
    bad = [local(p) for p in code if pattern.search(p.read_text(encoding="utf-8"))]
    assert not bad


def test_the_version_is_the_same_everywhere():
    version = project()["project"]["version"]
    assert lowdim.__version__ == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == version


def test_constraints_pin_what_is_needed():
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert pinned["torch"] == "2.13.0"
    needs = [*project()["project"]["dependencies"]]
    for extra in project()["project"]["optional-dependencies"].values():
        needs += extra
    names = {re.match(r"[\w-]+", need)[0].lower() for need in needs} - {"lowdim"}
    assert names <= set(pinned), f"not pinned: {names - set(pinned)}"


def test_what_is_shipped_is_credited():
    credits = (SOURCE / "assets" / "LICENSES.md").read_text(encoding="utf-8")
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for folder in sorted(path.name for path in (SOURCE / "assets").iterdir() if path.is_dir()):
        assert f"`{folder}`" in credits
        assert folder in notice
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]


def test_ci_calls_the_command_of_the_readme_and_runs_every_test():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line.strip() for line in script.splitlines()]
    assert lines[0] == "#!/usr/bin/env bash"
    assert {"make test", "make test-slow", "make lint types layers"} <= set(lines)
    pytest_options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert pytest_options["addopts"].endswith("-m 'not slow and not llamacpp'"), "what `make test` leaves out"
    (slow,) = re.findall(r"^test-slow:.*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert slow.endswith(' -m "slow and not llamacpp"'), "and `make test-slow` runs"
    (engine,) = re.findall(r"^test-llamacpp:.*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert " -m llamacpp " in engine, "what needs a compiler for ten minutes has a word of its own"


def test_hooks_are_local():
    import yaml

    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["id"] for hook in config["repos"][0]["hooks"]} == {"ruff", "ruff-format", "pyright", "lint-imports"}


def test_no_page_has_a_gap_to_be_filled():
    pages = [path for path in shipped() if path.suffix == ".md"]
    assert not [local(path) for path in pages if re.search(r"@[A-Z]{4,}@", path.read_text(encoding="utf-8"))]
