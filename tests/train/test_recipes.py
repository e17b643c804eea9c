import dataclasses
from pathlib import Path

import pytest

from lowdim.catalogue import variant
from lowdim.errors import DataError, UnknownNameError
from lowdim.methods import with_options
from lowdim.train.metrics import metric_for
from lowdim.train.recipes import Recipe, load_recipe
from lowdim.train.safe_yaml import read_yaml

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MINIMAL = "model: stories260k\ntask: causal-lm\ndata: lowdim:shakespeare\n"


def put(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_minimal_recipe_is_filled_in(tmp_path):
    recipe = load_recipe(put(tmp_path, MINIMAL))
    assert recipe == Recipe(model="stories260k", task="causal-lm", data=["lowdim:shakespeare"])
    assert (recipe.method, recipe.steps, recipe.lr, recipe.out) == ("lora", 100, None, "lowdim-run")
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 3


def test_changes_replace_values_and_are_checked(tmp_path):
    path = put(tmp_path, MINIMAL + "steps: 7\n")
    assert load_recipe(path, steps=None).steps == 7
    assert load_recipe(path, steps=9, out="x").steps == 9
    with pytest.raises(ValueError, match=r"steps: .*greater than or equal to 1 \(got 0\)"):
        load_recipe(path, steps=0)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    recipe = load_recipe(put(tmp_path, MINIMAL + "lr: 1e-3\noptions: {alpha: 2E1, text: '1e-3', name: 1e, other: -.5e+2}\n"))
    assert recipe.lr == 1e-3
    assert recipe.options == {"alpha": 20.0, "text": "1e-3", "name": "1e", "other": -50.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz: 3", r"no recipe has a key 'stepz'; nearest: steps"),
        ("learning_rate: 3", r"no recipe has a key 'learning_rate'"),
        ("3: 4", r"no recipe has a key 3; nearest"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, line, message):
    path = put(tmp_path, MINIMAL + line + "\n")
    with pytest.raises(UnknownNameError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps: 0", r"steps: .* \(got 0\)"),
        ("steps: many", r"steps: .* \(got 'many'\)"),
        ("lr: 0", r"lr: .*greater than 0"),
        ("lr: .nan", r"lr: .*finite"),
        ("lr: .inf", r"lr: .*finite"),
        ("warmup: 1.5", r"warmup: .*less than or equal to 1"),
        ("dtype: float64", r"dtype: .*'float32' or 'bfloat16'"),
        ("schedule: liner", r"schedule: .*'linear'.* \(got 'liner'\)"),
        ("text: no", r"text: .*string \(got False\)"),
        ("options: [1]", r"options: .*dictionary"),
        ("limit: 0", r"limit: "),
        ("seed: -1", r"seed: "),
        ("max_length: 3\nsteps: 0", r"max_length: .*; steps: |steps: .*; max_length: "),
    ],
)
def test_a_bad_value_names_its_key(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(put(tmp_path, MINIMAL + line + "\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "duplicate key 'model'"),
        ("model: stories260k\n options: {\n", "is not YAML"),
        ("- a\n- b\n", "must hold keys and values; got list"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not YAML: could not determine a constructor"),
        ("", "is empty"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_recipe(put(tmp_path, text))


def test_missing_parts(tmp_path):
    with pytest.raises(ValueError, match="data: Field required"):
        load_recipe(put(tmp_path, "model: minilm\n"))
    with pytest.raises(ValueError, match=r"data: .*at least 1 item"):
        load_recipe(put(tmp_path, "model: minilm\ndata: []\n"))
    with pytest.raises(DataError, match=r"no such file; nearest there: recipe\.yaml"):
        load_recipe(tmp_path / "recipes.yaml")


def test_recipes_are_shipped():
    assert len(SHIPPED) >= 4


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_fits_its_method_and_task(path):
    recipe = load_recipe(path)
    chosen = variant(recipe.method)
    fitted = with_options(dataclasses.replace(chosen, options={}), {**chosen.options, **recipe.options})
    assert set(recipe.options) <= set(fitted.options)
    metric_for(recipe.task, recipe.metric)


def _bomb(depth):
    levels = [f"  l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(["  l0: &l0 [x,x,x,x,x,x,x,x,x]", *levels])


@pytest.mark.parametrize("key", ["lr", "data", "options", "unknown"])
@pytest.mark.parametrize("depth", [6, 9, 30])
def test_aliases_that_grow_without_bound_are_refused(tmp_path, key, depth):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: stories260k\n{key}:\n{_bomb(depth)}\n")
    with pytest.raises(DataError, match=r"recipe\.yaml is not YAML: it stands for more than 100,000 values") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "an alias contains itself"),
        ("a: &a {b: *a}", "an alias contains itself"),
        ("a: &a {x: 1}\nb: &b {<<: [" + "*a," * 50_000 + "*a]}", "more than 100,000 values"),
        ("a: " + "[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: " + "{x: " * 5000, "nested too deeply"),
        ("- " * 5000, "nested too deeply"),
        ("x" * 1_000_001, "1,000,001 characters"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("seed: !!bool maybe", "maybe"),
        ("seed: !!int abc", "abc"),
        ("seed: !!int ''", "index"),
        ("seed: !!float xx", "xx"),
        ("seed: " + "9" * 5000, "digit"),
        ("seed: !!python/object:os.system x", "could not determine a constructor"),
        ("{a: 1, a: 2}", "duplicate key"),
        ("? [1]\n: 2", "unhashable"),
    ],
)
def test_yaml_that_cannot_be_read_is_one_short_error(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(text)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 500


def test_a_number_of_a_million_digits_is_read_in_no_time():
    with pytest.raises(ValueError, match="digit"):
        read_yaml("1" * 999_999)
    assert read_yaml("&a [1e-3, 2.E+3, .5e1, 1.5, 12]") == [0.001, 2000.0, 5.0, 1.5, 12]
    assert read_yaml("{a: &a [1, 2], b: *a}") == {"a": [1, 2], "b": [1, 2]}
    assert read_yaml("") is None


def test_many_bad_values_are_one_short_message(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: stories260k\ndata: [" + "1, " * 2000 + "]\nlr: " + "x" * 5000)
    with pytest.raises(ValueError, match="and 1996 more") as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 2000
