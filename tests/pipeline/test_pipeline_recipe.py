"""Recipes of pipelines: errors name the line and the key; the shipped ones are complete."""

import re

import pytest
import yaml

from lowdim.errors import DataError
from lowdim.pipeline import PipelineRecipe, load_pipeline
from snippets import ROOT

RECIPES = sorted((ROOT / "recipes" / "compress").glob("*.yaml"))
HEAD = "model: stories260k\ndata: lowdim:shakespeare\n"


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        (f"{HEAD}sampels: 3\nsteps: [{{step: quantize}}]\n", 3, "sampels: there is no such key; nearest: samples"),
        (
            f"{HEAD}max_length: 2\nsteps: [{{step: quantize}}]\n",
            3,
            "max_length: Input should be greater than or equal to 4 (got 2)",
        ),
        (
            f"{HEAD}steps:\n- step: quantize\n  scheme: int3\n",
            5,
            "step 1.scheme: Input should be 'int8' or 'int4' (got 'int3')",
        ),
        (f"{HEAD}steps:\n- step: tune\n  stepz: 3\n", 5, "step 1.stepz: there is no such key; nearest: step"),
        (f"{HEAD}steps:\n- {{step: cache}}\n- step: prune\n", 5, "step 2: a step needs `step:` one of decompose, tune, cache"),
        (f"{HEAD}steps:\n- step: decompose\n  budget: half\n", 5, "step 1.budget: budget must be a share such as 0.5x"),
        (f"{HEAD}steps:\n- step: decompose\n  options: {{rank: 0}}\n", 4, "step 1: "),
        (f"{HEAD}steps:\n- step: sparsify\n  options: {{sparsety: 1}}\n", 4, "step 1: wina has no option 'sparsety'"),
        (f"{HEAD}steps:\n- {{step: decompose, budget: 0.5x, options: {{param_ratio: 0.5}}}}\n", 4, "determines param_ratio"),
        (f"{HEAD}steps:\n- {{step: export}}\n- {{step: tune}}\n", 3, "steps: export must be the last step"),
        (f"{HEAD}steps:\n- {{step: quantize}}\n- {{step: tune}}\n", 3, "steps: quantize must come after tune"),
        (f"{HEAD}steps:\n- {{step: cache}}\n- {{step: cache}}\n", 3, "steps: cache can be done once"),
        ("data: x\nsteps: [{step: quantize}]\n", None, "model is missing"),
        (f"{HEAD}task: similarity\nsteps: [{{step: cache}}]\n", None, "step 1 (cache): an encoder caches no keys"),
    ],
)
def test_errors_name_line_and_key(tmp_path, text, line, part):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=r"recipe\.yaml") as caught:
        load_pipeline(path)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert part in str(caught.value)


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(DataError, match="is not YAML"):
        load_pipeline(written(tmp_path, "model: [\n"))
    with pytest.raises(DataError, match="must hold keys and values; got list"):
        load_pipeline(written(tmp_path, "- step: tune\n"))
    with pytest.raises(ValueError, match=r"model is missing; .*data is missing; .*steps is missing"):
        load_pipeline(written(tmp_path, "{}\n"))


def test_changes_replace_values(tmp_path):
    path = written(tmp_path, f"{HEAD}steps: [{{step: quantize}}]\n")
    assert load_pipeline(path, out="elsewhere").out == "elsewhere"
    assert load_pipeline(path, out=None).out == "lowdim-pipeline"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_complete_and_commented(path):
    """Every field with its meaning and its real default, as in the other recipes."""
    recipe = load_pipeline(path)
    assert recipe.steps[-1].step == "export"
    said = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.match(r"\w", line):
            match = re.fullmatch(r"(\w+):.*?\s# .*\((required|default: (.+?))\)", line)
            assert match, f"no comment with a default: {line}"
            said[match[1]] = match[2] if match[3] is None else yaml.safe_load(match[3])
    assert list(said) == list(PipelineRecipe.model_fields)
    for name, field in PipelineRecipe.model_fields.items():
        assert said[name] == ("required" if field.is_required() else field.default), name
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"`compress/{path.name}`" in text


def test_both_kinds_of_model_have_a_recipe():
    assert {load_pipeline(path).task for path in RECIPES} == {"causal-lm", "similarity"}
