"""The catalogue is complete, and every row that says "available" has all that a system owes."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowdim.catalogue import BASELINES, FAMILIES, Entry, entries, find, methods, variant, variants
from lowdim.catalogue.entry import KINDS
from lowdim.errors import UnknownNameError

ROOT = Path(__file__).parents[1]
AVAILABLE = [row for row in entries() if row.available]

available = pytest.mark.parametrize("row", AVAILABLE, ids=[row.slug for row in AVAILABLE])


def test_sixty_rows_in_order():
    assert [row.number for row in entries()] == list(range(1, 61))


def test_names_are_unique_and_slugs_kebab_case():
    rows = entries()
    names = [v.name for v in BASELINES] + [v.name for row in rows for v in row.variants]
    for values in ([row.slug for row in rows], [row.name for row in rows], names):
        assert len(set(values)) == len(values)
    for row in rows:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug), row.slug


@pytest.mark.parametrize("row", entries(), ids=lambda row: row.slug)
def test_row_says_what_it_is(row):
    assert row.family in FAMILIES
    assert row.paper
    assert re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
    assert row.claim.endswith(".")
    assert len(row.claim) <= 120  # one line of `lowdim list`
    assert row.available or not (row.variants or row.reproduction), "a row that cannot be built promises something"


def test_a_row_says_only_what_its_place_does_not():
    """What follows from the family, the slug or the target is left out in the row's module."""
    for family in FAMILIES:
        for row in importlib.import_module(f"lowdim.catalogue.rows.{family}").ROWS:
            assert row.placed(family) in entries()
            assert not row.family, row.slug
            assert row.name != row.target, f"{row.slug}: leave out the name"
            assert not row.target.startswith("lowdim."), f"{row.slug}: the name in lowdim.{family} is enough"
            for chosen in row.variants:
                assert chosen.label != (row.name or row.target), f"{row.slug}: leave out the label"
                assert chosen.target != row.target, f"{row.slug}: leave out the target"
                assert not chosen.target.startswith(f"lowdim.{family}:"), row.slug
                assert chosen.kind != KINDS.get(family), f"{row.slug}: leave out the kind"


@available
def test_target_is_a_public_name_of_its_family(row):
    module, _, name = row.target.partition(":")
    assert module == f"lowdim.{row.family}"
    family = importlib.import_module(module)
    assert callable(getattr(family, name))
    assert name in family.__all__


@available
def test_variants_name_things_that_exist(row):
    from lowdim.methods import with_options

    # Restarts act beside the training of low-rank layers: what is trained is of another family than the row, which is what the
    # companion is. The layers alone are then a variant of the row too, as what the companion is compared with.
    beside = any(chosen.companion == row.target for chosen in row.variants)
    for chosen in row.variants:
        assert chosen.target.startswith((f"lowdim.{row.family}:", "lowdim.layers:") if beside else f"lowdim.{row.family}:")
        assert callable(chosen.build())
        assert len(set(chosen.rates)) == len(chosen.rates) == 5
        options = dict(chosen.options)
        with_options(dataclasses.replace(chosen, options={}), options)  # an option that the class lacks raises


@available
def test_available_system_has_docs_vectors_tests_and_reproduction(row):
    assert (ROOT / "docs" / "systems" / f"{row.slug}.md").is_file()
    assert list((ROOT / "tests" / "vectors" / row.slug).glob("*.safetensors"))
    slug = row.slug.replace("-", "_")
    assert callable(row.build_reproduction())
    folder = ROOT / "tests" / row.family
    tests = {path.name for path in folder.glob("test_*.py")}
    module = importlib.import_module(row.target.partition(":")[0])
    home = getattr(module, row.target.partition(":")[2]).__module__.rsplit(".", 1)[-1]
    assert any(name.startswith((f"test_{home}", f"test_{slug}")) for name in tests)


def test_docs_vectors_and_reproductions_belong_to_available_systems():
    slugs = {row.slug for row in AVAILABLE}
    others = {"index", "README"} | {v.name for v in BASELINES}
    assert {path.stem for path in (ROOT / "docs" / "systems").glob("*.md")} <= slugs | others
    # Vectors of a part that is shared may be there before its system.
    vectors = {path.name for path in (ROOT / "tests" / "vectors").iterdir() if path.is_dir()}
    assert vectors <= {row.slug for row in entries()}


def test_a_reproduction_is_of_its_own_system():
    """Its claim is the row's, which is found by the slug."""
    for row in AVAILABLE:
        tree = ast.parse((ROOT / "src" / "lowdim" / "reproduce" / f"{row.slug.replace('-', '_')}.py").read_text("utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Outcome"]
        slugs = [node.args[0] if node.args else {k.arg: k.value for k in node.keywords}["slug"] for node in calls]
        assert [ast.literal_eval(slug) for slug in slugs] == [row.slug] * len(calls), row.slug
        assert calls, row.slug


def test_the_tables_of_the_docs_are_those_of_the_catalogue():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert not tables.outdated(), "run `make tables`"
    text = tables.systems("systems/")
    for row in entries():
        assert (f"systems/{row.slug}.md" in text) == row.available
        assert row.name in text


def test_every_method_class_is_reachable_from_the_catalogue():
    from lowdim.adapters import Method, registered_methods

    targets = {v.target for v in variants().values()} | {row.target for row in AVAILABLE}
    ours = [c for c in registered_methods().values() if c.__module__.startswith("lowdim.")]  # tests register some of their own
    assert not [c.__name__ for c in ours if f"lowdim.adapters:{c.__name__}" not in targets]
    assert all(issubclass(c, Method) for c in ours)


def home_of(thing) -> str:
    """The file or folder of a system: `lowdim.FAMILY.SYSTEM`."""
    return ".".join(thing.__module__.split(".")[:3])


@pytest.mark.parametrize("family", ["optim", "layers"])
def test_every_trainable_class_is_reachable_from_the_catalogue(family):
    module = importlib.import_module(f"lowdim.{family}")
    # What systems are made of, and what only wraps any linear map.
    bases = {
        "AdamW",
        "AdamW8bit",
        "ProjectedOptimizer",
        "StructuredLinear",
        "LowRank",
        "LowRankLinear",
        "Int8Linear",
        "LorentzLinear",
    }
    bases |= {v.companion.partition(":")[2] for row in AVAILABLE for v in row.variants if v.companion}
    homes = {home_of(getattr(module, row.target.partition(":")[2])) for row in AVAILABLE if row.family == family}
    kinds = [getattr(module, name) for name in module.__all__ if name not in bases]
    wanted = {c.__name__ for c in kinds if isinstance(c, type) and (hasattr(c, "from_linear") or hasattr(c, "load_state_dict"))}
    # A system may hold more than one class (a layer and its convolution, a sampler).
    assert not {name for name in wanted if home_of(getattr(module, name)) not in homes}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "train"])
def test_public_names_resolve(family):
    module = importlib.import_module(f"lowdim.{family}")
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(module, name).__doc__, f"lowdim.{family}.{name} has no docstring"


def test_find_by_slug_and_by_variant():
    assert find("galore").number == 50
    assert find("galore-8bit").number == 50
    assert isinstance(find("lora-xs"), Entry)


def test_unknown_names_list_the_nearest():
    with pytest.raises(UnknownNameError, match=r"nearest: .*lamda"):
        variant("lamdaa")
    with pytest.raises(UnknownNameError, match=r"nearest: .*galore"):
        methods("lora,galor")
    with pytest.raises(UnknownNameError, match=r"nearest: .*randlora"):
        find("ranlora")


def test_a_system_that_is_not_trained_says_so(monkeypatch):
    with pytest.raises(UnknownNameError, match="LoRD is not a way to train"):
        variant("lord")
    waiting = dataclasses.replace(find("lord"), number=61, slug="waiting", target="")
    monkeypatch.setattr("lowdim.catalogue.lookup.ROWS", (*entries(), waiting))
    with pytest.raises(UnknownNameError, match="not built yet"):
        variant("waiting")


def test_methods_by_family_and_all():
    assert [v.name for v in methods("linear-probe, lora")] == ["linear-probe", "lora"]
    assert {v.name for v in methods("adapters")} == {v.name for r in AVAILABLE if r.family == "adapters" for v in r.variants}
    assert {v.name for v in methods("all")} == set(variants())
    assert [v.name for v in methods("lora,lora")] == ["lora"]


def test_listing_the_catalogue_does_not_import_torch():
    code = "import sys, lowdim.catalogue as c; c.entries(); c.methods('all'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
